# What containerd's CRI needs for pods in this checkout: handlers, a network of its own, a pause image.
# Source it after private.sh and registry.sh.
# shellcheck shell=bash disable=SC2034,SC2154  # shares its names with private.sh and with who sources it

# A checkout has a bridge and a subnet of its own, so that two on one machine do not meet.
run_sum=$(printf %s "$run" | sha256sum)
bridge=bh-${run_sum:0:8}
subnet=10.$((16#${run_sum:0:2} % 64 + 128)).$((16#${run_sum:2:2})).0/24

cni_plugins=$run/cni/bin
cni_conf=$run/cni/net.d
sandbox_image=localhost/bulkhead/pause:latest

# write_cni: a bridge on which the host and the pods see each other, and ports of the host where a pod asks.
write_cni() {
    mkdir -p "$cni_conf"
    ln -sfn "$("$top/tests/parts/cni-plugins")" "$cni_plugins"
    cat >"$cni_conf/10-bulkhead.conflist" <<CONF
{
  "cniVersion": "1.0.0",
  "name": "$bridge",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "$bridge",
      "isGateway": true,
      "hairpinMode": true,
      "ipam": {
        "type": "host-local",
        "dataDir": "$run/cni/state",
        "ranges": [[{"subnet": "$subnet"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
CONF
}

# write_crictl_config: for who does not set the environment that `env` prints it changes nothing.
write_crictl_config() {
    printf 'runtime-endpoint: unix://%s\nimage-endpoint: unix://%s\ntimeout: 60\n' "$address" "$address" >"$run/crictl.yaml"
}

# remove_network: the bridge and what is left in the books. Pods have been removed by now, or are dead.
remove_network() {
    ! ip link show "$bridge" >/dev/null 2>&1 || ip link delete "$bridge"
    rm -rf "$run/cni/state" "/var/lib/cni/results/$bridge"-*
}

# write_containerd_config VERSION: of containerd.
write_containerd_config() {
    case $1 in
        1.*) containerd_1 ;;
        *) containerd_2 ;;
    esac >"$run/containerd.toml"
    cat >>"$run/containerd.toml" <<CONF

[grpc]
  address = "$address"

[plugins."io.containerd.internal.v1.opt"]
  path = "$run/opt"

# Its socket and the plugins that it starts are the machine's own.
[plugins."io.containerd.nri.v1.nri"]
  disable = true
CONF
}

# handlers PREFIX: the runtimes by their CRI names, in the section PREFIX.
handlers() {
    local name sandboxer
    printf '\n[plugins.%s.runtimes.runc]\n  runtime_type = "io.containerd.runc.v2"\n' "$1"
    for name in bulkhead bulkhead-podsandbox; do
        printf '\n[plugins.%s.runtimes.%s]\n' "$1" "$name"
        printf '  runtime_type = "io.containerd.bulkhead.v2"\n'
        printf '  pod_annotations = ["io.bulkhead.*"]\n'
        printf '  privileged_without_host_devices = true\n'
        # containerd 1 has the classic way alone.
        [[ $1 == *grpc.v1.cri* ]] || [ "$name" != bulkhead ] || printf '  sandboxer = "shim"\n'
    done
}

containerd_2() {
    cat <<CONF
version = 3
root = "$run/root"
state = "$short/state"

[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "$sandbox_image"

[plugins."io.containerd.cri.v1.images".registry]
  config_path = "$registry_hosts"

[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true

[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["$cni_plugins"]
  conf_dir = "$cni_conf"

[plugins."io.containerd.cri.v1.runtime".containerd]
  default_runtime_name = "runc"
CONF
    handlers '"io.containerd.cri.v1.runtime".containerd'
    cat <<CONF

[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
CONF
}

containerd_1() {
    cat <<CONF
version = 2
root = "$run/root"
state = "$short/state"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$sandbox_image"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"

[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "$registry_hosts"

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "$cni_plugins"
  conf_dir = "$cni_conf"

[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "runc"
CONF
    handlers '"io.containerd.grpc.v1.cri".containerd'
}
