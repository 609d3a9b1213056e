# Shared by the scripts of this tree: source it, after `set -euo pipefail`.
# shellcheck shell=bash disable=SC2034  # what is set here is used by who sources it

# The checkout, without symbolic links: mount tables and processes show paths this way.
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# What is slow to make and safe to lose. Everything below is keyed by version or content.
cache=${BULKHEAD_CACHE:-/var/cache/bulkhead}

# All remarks go to stderr: stdout is for what a script answers (a path, an environment).
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# with_lock FILE COMMAND…: one process at a time, others wait and then find the work done.
# The command does not inherit the lock: a daemon it leaves behind must not hold it.
with_lock() {
    local file=$1 fd
    shift
    mkdir -p "$(dirname "$file")"
    exec {fd}>"$file"
    if ! flock -n "$fd"; then
        say "waiting for another process that holds $file"
        flock "$fd"
    fi
    # Not `"$@" || …`, which would switch off `set -e` inside the command.
    "$@" {fd}>&-
    exec {fd}>&-
}

# packages NAME…: install the Debian packages that are missing; silent when none is.
packages() {
    local missing=() name
    for name in "$@"; do
        dpkg-query -W -f '${db:Status-Status}\n' "$name" 2>/dev/null | grep -qx installed || missing+=("$name")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "these packages are missing, and only root can install them: ${missing[*]}"
    with_lock /run/lock/bulkhead-apt install_packages "${missing[@]}"
}

install_packages() {
    local log
    log=$(mktemp)
    say "installing Debian packages: $*"
    # The lists of packages may be absent (a fresh image) or too old to fetch what they name.
    if ! apt_get install "$@" >"$log" 2>&1; then
        if ! { apt_get update && apt_get install "$@"; } >"$log" 2>&1; then
            tail -n 15 "$log" >&2
            rm -f "$log"
            die "apt-get could not install: $*"
        fi
    fi
    rm -f "$log"
}

# Waits for a dpkg that runs already (another project, unattended upgrades).
apt_get() {
    DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=300 \
        -o APT::Install-Recommends=false "$@" </dev/null
}

# progress LABEL: read a command's many lines, say one in a hundred as a count.
progress() { awk -v label="$1" 'NR % 250 == 0 { printf "%s: %d steps\n", label, NR; fflush() }' >&2; }

# The cargo profile of everything that is built here; what is tested is what is shipped.
profile=${PROFILE:-release}

# built NAME: the path of a program of ours.
built() { echo "${CARGO_TARGET_DIR:-$top/target}/x86_64-unknown-linux-gnu/${profile/#dev/debug}/$1"; }

# toolchain: find cargo and install what it needs beside itself to compile this workspace. libseccomp is linked
# statically into the agent; protoc is not needed.
toolchain() {
    find_cargo
    packages gcc libc6-dev libseccomp-dev
}

# find_cargo: put cargo into $cargo, or say how to get it. Under sudo that of the user who called it.
find_cargo() {
    local home
    cargo=$(command -v cargo || true)
    for home in "${HOME:-/root}" "$(getent passwd "${SUDO_USER:-root}" | cut -d: -f6)"; do
        [ -z "$cargo" ] && [ -x "$home/.cargo/bin/cargo" ] || continue
        cargo=$home/.cargo/bin/cargo
        export RUSTUP_HOME="${RUSTUP_HOME:-$home/.rustup}"
    done
    [ -n "$cargo" ] || die "cargo is missing. Install Rust as rust-lang.org/tools/install says, or on Debian 13 with: apt-get install rustup && rustup default stable. Then try again"
}

# write_config FILE STATE_DIR: a config.toml that points to what is built here, and to $BACKEND where that is set.
# Keys that are not in it have their defaults, which configs/config.toml explains.
write_config() {
    local kernel image virtiofsd vsock
    kernel=$("$top/guest-image/build-kernel")
    image=$("$top/scripts/build" image)
    virtiofsd=$("$top/tests/parts/virtiofsd")
    vsock=$("$top/tests/parts/vhost-device-vsock")
    mkdir -p "$(dirname "$1")"
    cat >"$1" <<EOF
# Generated: what configs/config.toml explains, pointing to what this checkout built.
state_dir = "$2"

[hypervisor]
kernel = "$kernel"
image = "$image"
virtiofsd = "$virtiofsd"
vhost_device_vsock = "$vsock"
${BACKEND:+backend = "$BACKEND"}
EOF
}
