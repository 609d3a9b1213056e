# A registry on loopback that stands in for the public ones: containerd asks it first, whatever host an image
# names, and the host itself only for what it does not have. Source it after private.sh.
# shellcheck shell=bash disable=SC2154  # shares its names with private.sh and with who sources it

registry_hosts=$run/certs.d

# start_registry: start it unless it runs, and tell containerd, which reads this at each pull, where it is.
start_registry() {
    local log=$run/registry.log port
    if ! running "$run/registry.pid"; then
        mkdir -p "$run/registry" "$registry_hosts/_default"
        cat >"$run/registry.yml" <<CONF
version: 0.1
log: {level: info, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: "$run/registry"}
  delete: {enabled: true}
http: {addr: "127.0.0.1:0"}
CONF
        : >"$log"
        setsid "$run/bin/docker-registry" serve "$run/registry.yml" </dev/null >>"$log" 2>&1 &
        pid=$!
        echo "$pid $(start_time "$pid")" >"$run/registry.pid"
        wait_ready registry "$log" "listening on" || return 1
    fi
    port=$(sed -n 's/.*listening on 127\.0\.0\.1:\([0-9]*\).*/\1/p' "$log")
    [ -n "$port" ] || die "the registry did not say where it listens ($log)"
    registry=127.0.0.1:$port
    printf '[host."http://%s"]\n  capabilities = ["pull", "resolve"]\n' "$registry" >"$registry_hosts/_default/hosts.toml"
}

# offer ARCHIVE NAME REFERENCE…: put the image NAME of an OCI archive into the registry under names of public
# ones. docker.io/library/busybox:latest is the registry's library/busybox:latest.
offer() {
    local archive=$1 name=$2 reference
    shift 2
    private_ctr -n registry images import --no-unpack "$archive" >/dev/null || die "ctr could not import $archive"
    for reference in "$@"; do
        private_ctr -n registry images push --plain-http "$registry/${reference#*/}" "$name" >/dev/null ||
            die "ctr could not push $reference to the registry of this checkout"
    done
    # What is in the registry need not be in containerd as well.
    private_ctr -n registry images remove "$name" >/dev/null
}
