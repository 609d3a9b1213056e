# Where this checkout's private containerd lives, and whether it runs. Source it after lib.sh.
# shellcheck shell=bash disable=SC2034,SC2154  # shares its names with lib.sh and with who sources it

run=$top/.run
namespace=default

# A path of a unix socket has at most 107 bytes, and below this folder 36 more are needed
# (pods/<16 digits>/vsock_1025): a deep checkout gets a short folder beside it, linked from .run/short.
short=$run
[ ${#run} -le 60 ] || short=/run/bulkhead-$(printf %s "$run" | sha256sum | cut -c1-12)
# What clients of this containerd are told; $run/containerd.sock is the same socket.
address=$short/containerd.sock
pods=$short/pods

# start_time PID: in ticks since boot; with the pid it names one process for ever.
start_time() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    # The name in parentheses may hold spaces; the start time is the 20th field behind it.
    # shellcheck disable=SC2086
    set -- ${stat##*) }
    [ "$1" != Z ] || return 1
    echo "${20}"
}

# running FILE: whether the process runs still whose pid and start time are in FILE; its pid is then in $pid.
running() {
    local started
    read -r pid started 2>/dev/null <"$1" || return 1
    [ "$(start_time "$pid")" = "$started" ]
}

# is_up: whether the containerd that `up` started runs still; its pid is then in $pid.
is_up() { running "$run/containerd.pid"; }

# private_ctr ARGUMENTS…: ctr against the private containerd. Deprecations of the host (cgroup v1) are
# nothing that whoever called us can mend here.
private_ctr() { CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 "$run/bin/ctr" --address "$address" "$@"; }

# cgroup_roots: every hierarchy's mount point (one with cgroup v2, many with v1).
cgroup_roots() { awk '$3 == "cgroup" || $3 == "cgroup2" { print $2 }' /proc/mounts; }

# start_containerd: start it from what `up` laid down, and return when it serves. Its pid is then in $pid.
start_containerd() {
    local log=$run/containerd.log
    : >"$log"
    # A session of its own: neither the caller's terminal nor its make may end it. Nothing but the log
    # is kept open, or whoever reads our output would wait for a daemon.
    PATH=$run/bin:$PATH BULKHEAD_CONFIG=$run/config.toml \
        setsid "$run/bin/containerd" --config "$run/containerd.toml" </dev/null >>"$log" 2>&1 &
    pid=$!
    echo "$pid $(start_time "$pid")" >"$run/containerd.pid"
    wait_ready containerd "$log" "containerd successfully booted"
}

# wait_ready NAME LOG LINE: return when the daemon whose pid is in $pid says LINE in its log; fail when it ends
# or is late.
wait_ready() {
    local reader ended=
    # A job beside the daemon, not a `read` here: only in `wait` does a shell learn that a child has ended.
    timeout 60 grep -qm 1 "$3" < <(exec tail -n +1 -f "$2" 2>/dev/null) &
    reader=$!
    if wait -n -p ended "$reader" "$pid" && [ "$ended" = "$reader" ]; then return; fi
    kill "$reader" 2>/dev/null || true
    tail -n 20 "$2" >&2
    "$top/scripts/end-process" KILL "$pid" 10
    say "$1 did not start (log: $2)"
    return 1
}
