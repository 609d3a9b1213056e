# Shared by the scripts of tests/parts, each of which makes one real client or server and prints its
# path: kept in the cache by version, checked against a pinned sum, safe when two run at once.
# shellcheck shell=bash

. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh"

parts=$cache/parts
mkdir -p "$parts"

# What a failed build leaves behind is of no use to the next one.
scratches=() scratches_of=

# scratch: put the path of a new folder, on the same disk as its final place, into $scratch.
scratch() {
    scratch=$(mktemp -d -p "$parts" build.XXXXXX)
    # A command substitution begins with its parent's, which are not its own to remove.
    [ "$scratches_of" = "$BASHPID" ] || scratches=() scratches_of=$BASHPID
    scratches+=("$scratch")
    # Here, because a command substitution has traps of its own.
    trap 'rm -rf "${scratches[@]}"' EXIT
}

# publish STAGED PLACE: an atomic rename, so that a present result is a whole one.
publish() {
    mkdir -p "$(dirname "$2")"
    rm -rf "$2"
    mv "$1" "$2"
}

# find_go: put a Go toolchain into $go. Any from 1.21 on fetches by itself the newer one a module asks for.
find_go() {
    go=$(command -v go || true)
    [ -n "$go" ] || { [ ! -x /usr/local/go/bin/go ] || go=/usr/local/go/bin/go; }
    if [ -z "$go" ] || ! go_is_new "$go"; then
        packages golang-go
        go=/usr/bin/go
        go_is_new "$go" || fetch_go
    fi
    # Its build cache and toolchain downloads need a home, which a CI job may not have.
    export HOME="${HOME:-/root}" GOFLAGS=-buildvcs=false GOTOOLCHAIN=auto GOWORK=off
}

go_is_new() {
    local version
    version=$("$1" env GOVERSION)
    version=${version#go1.}
    version=${version%%[!0-9]*}
    [ -n "$version" ] && [ "$version" -ge 21 ]
}

# Debian 12's Go is too old to fetch its successor by itself, but can download it as a module.
fetch_go() {
    local version=go1.26.8
    local sum=h1:ZOmGe1OnfREDMIdb1Qi4G9JSuDPBLGExZMQ4nis1RXM=
    local place=$parts/go/$version
    if [ ! -x "$place/bin/go" ]; then
        say "fetching the Go toolchain $version"
        with_lock "$parts/lock/go" unpack_go "golang.org/toolchain" "v0.0.1-$version.linux-amd64" "$sum" "$place"
    fi
    go=$place/bin/go
}

unpack_go() {
    [ ! -x "$4/bin/go" ] || return 0
    scratch
    module_dir "$1" "$2" "$3"
    cp -R "$dir/." "$scratch"
    chmod -R u+w "$scratch"
    # Modules carry no executable bits.
    chmod +x "$scratch"/bin/* "$scratch"/pkg/tool/*/*
    publish "$scratch" "$4"
}

# module_dir MODULE VERSION SUM: download a module, check its sum, put its folder into $dir.
module_dir() {
    local answer got
    answer=$(cd / && "$go" mod download -json "$1@$2") || die "the module $1@$2 could not be downloaded: $answer"
    got=$(sed -n 's/^\t"Sum": "\(.*\)",\?$/\1/p' <<<"$answer")
    [ "$got" = "$3" ] || die "the module $1@$2 has the sum $got, pinned is $3"
    dir=$(sed -n 's/^\t"Dir": "\(.*\)",\?$/\1/p' <<<"$answer")
}

# module_copy MODULE VERSION SUM: a writable copy of a module in $work, without its vendor folder:
# its own go.sum pins everything below it.
module_copy() {
    module_dir "$@"
    scratch
    work=$scratch
    cp -R "$dir/." "$work"
    chmod -R u+w "$work"
    rm -rf "$work/vendor"
}

# go_build OUTPUT PACKAGE ARGUMENTS…: build in $work.
go_build() {
    local output=$1 package=$2
    shift 2
    say "building ${output##*/}"
    (cd "$work" && nice "$go" build -mod=mod -trimpath -o "$output" "$@" "$package")
}

# cargo_part NAME VERSION SHA256: install a published program into the cache, statically linked, and
# print its path.
cargo_part() {
    local place=$parts/$1-$2
    if [ ! -x "$place/bin/$1" ]; then
        with_lock "$parts/lock/$1-$2" cargo_install "$1" "$2" "$3" "$place"
    fi
    echo "$place/bin/$1"
}

cargo_install() {
    [ ! -x "$4/bin/$1" ] || return 0
    local started=$SECONDS log=$parts/$1-$2.log file got
    scratch
    find_cargo
    say "building $1 $2 (log: $log)"
    # From the root folder and without the caller's settings: this tree's .cargo/config.toml is for
    # its own programs. The index pins the package, the package's own lock file pins all below it.
    (
        cd /
        unset CARGO_TARGET_DIR CARGO_BUILD_TARGET CARGO_ENCODED_RUSTFLAGS
        RUSTFLAGS="-C target-feature=+crt-static" LIBSECCOMP_LINK_TYPE=static \
            LIBSECCOMP_LIB_PATH=/usr/lib/x86_64-linux-gnu LIBCAPNG_LINK_TYPE=static \
            LIBCAPNG_LIB_PATH=/usr/lib/x86_64-linux-gnu CARGO_PROFILE_RELEASE_STRIP=symbols \
            nice "$cargo" install --locked --target x86_64-unknown-linux-gnu --root "$scratch/root" \
            --target-dir "$scratch/target" --version "=$2" "$1"
    ) >"$log" 2>&1 </dev/null || { tail -n 30 "$log" >&2; die "$1 $2 did not build"; }
    for file in "${CARGO_HOME:-${HOME:-/root}/.cargo}"/registry/cache/*/"$1-$2.crate"; do
        got=$(sha256sum <"$file" | cut -d' ' -f1)
        [ "$got" = "$3" ] || die "$file has the sum $got, pinned is $3"
    done
    # A static program that was given a shared library links well and dies at once.
    "$scratch/root/bin/$1" --version >/dev/null 2>&1 || die "$1 $2 was built but does not run"
    publish "$scratch/root" "$4"
    say "$1 $2 built in $((SECONDS - started)) s"
}

# debian_files PACKAGE: the files of a Debian package in the cache, without installing it (it may
# conflict with what the machine has); prints the folder.
debian_files() {
    local place=$parts/debian-$1
    [ -d "$place" ] || with_lock "$parts/lock/debian-$1" debian_unpack "$1" "$place"
    echo "$place"
}

debian_unpack() {
    [ ! -d "$2" ] || return 0
    scratch
    say "fetching the Debian package $1"
    # apt checks the sum against the signed lists, which a fresh machine may not have yet.
    (
        cd "$scratch"
        debian_download "$1" || { apt_get update && debian_download "$1"; }
    ) >"$scratch/log" 2>&1 || { cat "$scratch/log" >&2; die "apt-get could not download $1"; }
    dpkg-deb -x "$scratch"/*.deb "$scratch/files"
    publish "$scratch/files" "$2"
}

debian_download() { apt_get -o APT::Sandbox::User=root download "$1"; }
