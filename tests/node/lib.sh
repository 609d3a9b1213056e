# Where this checkout's node VM lives, and whether it runs. Source it after scripts/lib.sh and private.sh.
# shellcheck shell=bash disable=SC2034,SC2154  # shares its names with lib.sh and with who sources it

here=$top/tests/node
# Everything of a node is in this folder and ends with it. The sockets need short paths.
node=$short/node
# Where `stage` puts files, on the node's own disk.
stage=/var/lib/stage

# node_is_up: whether this checkout's node runs; its keeper's pid is then in $keeper.
node_is_up() {
    local started
    read -r keeper started 2>/dev/null <"$node/keeper.pid" || return 1
    [ "$(start_time "$keeper")" = "$started" ]
}

# end_node: end the node if it runs. Its keeper takes all processes with it and ends last.
end_node() {
    if ! node_is_up; then return; fi
    "$top/scripts/end-process" TERM "$keeper" 20 || "$top/scripts/end-process" KILL "$keeper" 20 ||
        die "process $keeper does not end"
}

# remote COMMAND…: the line for the node's shell that runs one command in this checkout, told of the same
# places. The shell stays in between, so that the death by a signal arrives as 128 + signal.
remote() {
    printf 'cd %q && BULKHEAD_CACHE=%q TERM=%q ' "$top" "$cache" "${TERM:-dumb}"
    printf '%q ' "$@"
    # shellcheck disable=SC2016  # the node's shell is to expand it
    printf '; exit $?'
}
