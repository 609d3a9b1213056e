# The source of Kubernetes, as the published module has it, ready to build from. Source it after lib.sh.
# shellcheck shell=bash disable=SC2034,SC2154  # shares its names with lib.sh and with who sources it

kubernetes_version=1.36.3
# Sums of what the module takes from its own tree, which the published one leaves out; the rest is in its go.sum.
kubernetes_sums=$top/tests/parts/kubernetes.sum

# kubernetes_copy [SUMS]: a writable copy of the source in $work; SUMS are those of modules that only the caller needs.
kubernetes_copy() {
    module_copy k8s.io/kubernetes "v$kubernetes_version" h1:qDQdoMiluAE2Eab6Fa52YV+WjiGz9mZFFoagEA6cI+o=
    # Its staging modules are published apart.
    sed -i -E "s#^(\s+k8s\.io/[a-z-]+) => \./staging/src/.*#\1 => \1 v${kubernetes_version/#1/0}#" "$work/go.mod"
    cat "$kubernetes_sums" "$@" >>"$work/go.sum"
    cp "$work/go.sum" "$work/go.sum.pinned"
    export CGO_ENABLED=0
}

# kubernetes_flags: what the linker tells the programs of their version.
kubernetes_flags() {
    local module=k8s.io/component-base/version
    echo "-s -w -X $module.gitVersion=v$kubernetes_version -X $module.gitMajor=1 -X $module.gitMinor=36"
}

# kubernetes_pinned FILE: fail where a build took what has no sum here; FILE is where it belongs.
kubernetes_pinned() {
    ! grep -vxFf "$work/go.sum.pinned" "$work/go.sum" >&2 || die "these sums are not in $1"
}
