# What nerdctl needs in this checkout: its books and its default network, and how to take back what it has made.
# Source it after cri.sh.
# shellcheck shell=bash disable=SC2034,SC2154  # shares its names with cri.sh and with who sources it

nerdctl_toml=$run/nerdctl.toml
nerdctl_bridge=bn-${run_sum:0:8}
# Beside that of the pods: the next 64.
nerdctl_subnet=10.$((16#${run_sum:0:2} % 64 + 192)).$((16#${run_sum:2:2})).0/24

# write_nerdctl: the default network is as that of the pods, with ports of the host for the host itself, too.
write_nerdctl() {
    mkdir -p "$run/cni/nerdctl"
    cat >"$nerdctl_toml" <<CONF
address = "$address"
data_root = "$run/nerdctl"
cni_path = "$cni_plugins"
cni_netconfpath = "$run/cni/nerdctl"
cgroup_manager = "cgroupfs"
CONF
    cat >"$run/cni/nerdctl/nerdctl-bridge.conflist" <<CONF
{
  "cniVersion": "1.0.0",
  "name": "bridge",
  "nerdctlID": "${run_sum:0:64}",
  "nerdctlLabels": {"nerdctl/default-network": "true"},
  "plugins": [
    {
      "type": "bridge",
      "bridge": "$nerdctl_bridge",
      "isGateway": true,
      "hairpinMode": true,
      "ipam": {
        "type": "host-local",
        "dataDir": "$run/cni/state",
        "ranges": [[{"subnet": "$nerdctl_subnet", "gateway": "${nerdctl_subnet%.0/24}.1"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    },
    {"type": "portmap", "backend": "iptables", "capabilities": {"portMappings": true}},
    {"type": "tuning"}
  ]
}
CONF
}

private_nerdctl() { PATH=$run/bin:$PATH NERDCTL_TOML=$nerdctl_toml "$run/bin/nerdctl" "$@"; }

# cni_chains: the chains of CNI's plugins in the packet filter: "table chain" each.
cni_chains() {
    local table
    command -v iptables >/dev/null || return 0
    for table in nat filter; do
        iptables -t "$table" -S 2>/dev/null | sed -n "s/^-N \(CNI-.*\)/$table \1/p"
    done
}

# end_nerdctl: remove its containers in orderly fashion, so that their networks are given back, and the networks that
# a user has made.
end_nerdctl() {
    local ns names
    [ -x "$run/bin/nerdctl" ] && [ -d "$run/nerdctl" ] || return 0
    for ns in $(private_ctr namespaces list -q); do
        [ "$ns" != k8s.io ] || continue
        mapfile -t names < <(private_nerdctl --namespace "$ns" ps -aq --no-trunc)
        [ ${#names[@]} = 0 ] || private_nerdctl --namespace "$ns" rm -f "${names[@]}" >/dev/null ||
            say "not every container of nerdctl in namespace $ns could be removed: its tasks are ended"
        private_nerdctl --namespace "$ns" network prune -f >/dev/null ||
            say "not every network of nerdctl in namespace $ns could be removed"
    done
}

# remove_nerdctl_network: what is left of it when no container is: bridges, and chains that were not there before and
# that nobody else has a rule in.
remove_nerdctl_network() {
    local file bridge table chain rule
    [ -d "$run/nerdctl" ] || { rm -f "$run/chains-before"; return 0; }
    while read -r bridge; do
        ! ip link show "$bridge" >/dev/null 2>&1 || ip link delete "$bridge"
    done < <(find "$run/cni/nerdctl" -name '*.conflist' -exec sed -n 's/.*"bridge": *"\([^"]*\)".*/\1/p' {} +)
    if [ -e "$run/chains-before" ]; then
        while read -r table chain; do
            case $chain in
                CNI-HOSTPORT-* | CNI-FORWARD | CNI-ADMIN | CNI-ISOLATION-*)
                    # Shared by all containers: a rule with an address, or to a chain of one, is of one that runs.
                    ! iptables -t "$table" -S "$chain" | grep -qE -- '-j CNI-DN-| -s | -d ' || continue
                    while read -r rule; do
                        # As iptables quotes it for a shell.
                        eval "iptables -t $table ${rule/#-A/-D}"
                    done < <(iptables -t "$table" -S | grep -E -- "-j $chain( |\$)")
                    iptables -t "$table" -F "$chain"
                    ;;
            esac
            # Of one that is in use there is nothing to be said.
            iptables -t "$table" -X "$chain" 2>/dev/null || true
        done < <(cni_chains | grep -vxFf "$run/chains-before")
    fi
    # Volumes stay, as images do.
    find "$run/nerdctl" -mindepth 2 -maxdepth 2 ! -name volumes -exec rm -rf {} +
    rm -rf "$run/chains-before" "$run/cni/nerdctl"
}
