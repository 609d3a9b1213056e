# Where this checkout's private Kubernetes lives, how its parts are started, and whether it is up. Source it after
# private.sh.
# shellcheck shell=bash disable=SC2034,SC2154  # shares its names with private.sh and with who sources it

# Everything of a cluster lies in one folder and ends with it; tests have folders of their own.
k8s=${BULKHEAD_K8S_DIR:-$run/k8s}
k8s_sum=$(printf %s "$k8s" | sha256sum)
k8s_nodes=(node-1 node-2)

# The network that joins the nodes and this machine. It is the one that others could meet, so it is the checkout's own;
# those of pods and services are seen in the cluster's network namespaces alone.
k8s_net=10.$((16#${k8s_sum:0:2} % 64 + 64)).$((16#${k8s_sum:2:2}))
k8s_control=$k8s_net.1
k8s_host=$k8s_net.254
k8s_link=bk-${k8s_sum:0:8}
k8s_api=https://$k8s_control:6443
k8s_services=10.32.0.0/16
k8s_first_service=10.32.0.1
k8s_dns=10.32.0.10
k8s_pods=10.16.0.0/16

node_number() { echo "${1#node-}"; }
node_address() { echo "$k8s_net.1$(node_number "$1")"; }
node_pods() { echo "10.16.$(node_number "$1").0/24"; }
# Below it are the cgroups of the node's pods.
node_cgroup() { echo "bk-${k8s_sum:0:8}-$1"; }

# holder NAME: whether the process runs that holds the namespaces of `control` or of a node; its pid is then in $pid.
holder() { running "$k8s/$1/holder.pid"; }

# is_bare NODE: whether it is one without bulkhead (`k8s-enter NODE bare`).
is_bare() { [ -e "$k8s/$1/bare" ]; }

# node_path NODE: the PATH there. What a node itself has of bulkhead is found behind ours.
node_path() { if is_bare "$1"; then echo "$k8s/bin:$PATH"; else echo "$k8s/bulkhead:$k8s/bin:$PATH"; fi; }

# in_node NODE COMMAND…: run a command in a node, which has a network and a table of mounts of its own.
in_node() {
    local pid name=$1
    shift
    holder "$name" || die "$name does not run"
    PATH=$(node_path "$name") CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 nsenter --target "$pid" --net --mount -- "$@"
}

# k8s_is_up: whether every part runs that `k8s` has started.
k8s_is_up() {
    local file pid
    [ -e "$k8s/up" ] || return 1
    for file in "$k8s"/*/*.pid; do running "$file" || return 1; done
}

# start_part WHERE NAME COMMAND…: start a daemon of `control` or of a node, with its log beside its pid.
start_part() {
    local where=$1 name=$2 pid started config=(BULKHEAD_CONFIG="$k8s/bulkhead.toml")
    shift 2
    holder "$where" || die "$where does not run"
    ! is_bare "$where" || config=(--unset BULKHEAD_CONFIG)
    : >"$k8s/$where/$name.log"
    # A session of its own, and nothing is kept open but the log: see start_containerd.
    setsid env "${config[@]}" PATH="$(node_path "$where")" CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 \
        nsenter --target "$pid" --net --mount -- "$@" </dev/null >>"$k8s/$where/$name.log" 2>&1 &
    started=$!
    echo "$started $(start_time "$started")" >"$k8s/$where/$name.pid"
}

# part_ready WHERE NAME LINE: return when it says LINE in its log; see wait_ready.
part_ready() {
    local pid
    read -r pid _ <"$k8s/$1/$2.pid"
    wait_ready "$2 of $1" "$k8s/$1/$2.log" "$3" || exit 1
}

# start_node_containerd NODE, start_kubelet NODE: apart, because either can be started anew under running pods.
start_node_containerd() {
    start_part "$1" containerd "$k8s/bin/containerd" --config "$k8s/$1/containerd.toml"
}

start_kubelet() {
    start_part "$1" kubelet "$k8s/bin/kubelet" --config "$k8s/$1/kubelet.yaml" --kubeconfig "$k8s/$1/kubelet.kubeconfig" \
        --hostname-override "$1" --node-ip "$(node_address "$1")" --node-labels "io.bulkhead/runtime=true" --v 2
}

# kubectl ARGUMENTS…: the private one, as administrator.
k8s_kubectl() { "$k8s/bin/kubectl" --kubeconfig "$k8s/kubeconfig" "$@"; }
