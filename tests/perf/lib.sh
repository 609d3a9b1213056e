# Shared by the measurements on KVM: source it after scripts/lib.sh.
# shellcheck shell=bash disable=SC2154  # $top, $cargo and $profile are lib.sh's

# bench_program: build the program that measures machines, like what it measures; print its path.
bench_program() {
    local said
    said=$(cd "$top" && nice "$cargo" bench --no-run --locked --profile "$profile" -p bulkhead-hypervisor --bench kvm \
        --message-format json-render-diagnostics) || die "the benchmark could not be built"
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' <<<"$said" | grep . || die "cargo names no benchmark"
}
