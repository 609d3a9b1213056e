# Makes images as OCI archives for `ctr image import`. Source it after lib.sh, in a script whose bytes
# together with what it packs key the result: the same input gives the same bytes.
# shellcheck shell=bash disable=SC2154  # scratch comes from lib.sh

image_sum() { sha256sum <"$1" | cut -d' ' -f1; }

image_tar() { LC_ALL=C tar --sort=name --format=gnu --numeric-owner --mtime=@0 "$@"; }

# image_blob FILE: move it to its place by content; put its digest and size into $digest and $size.
image_blob() {
    digest=$(image_sum "$1")
    size=$(stat -c %s "$1")
    mv "$1" "oci/blobs/sha256/$digest"
}

# pack_image NAME CONFIG: in a scratch folder that has `rootfs`, write `image.tar`. CONFIG is the inner
# object of the image's configuration, JSON (image-spec, config.md).
pack_image() {
    local layer config manifest digest size
    mkdir -p oci/blobs/sha256
    image_tar -C rootfs -cf layer .
    layer=$(image_sum layer)
    printf '%s' '{"created":"1970-01-01T00:00:00Z","architecture":"amd64","os":"linux",' "\"config\":$2," \
        "\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[\"sha256:$layer\"]}}" >config
    image_blob config
    config="{\"mediaType\":\"application/vnd.oci.image.config.v1+json\",\"digest\":\"sha256:$digest\",\"size\":$size}"
    image_blob layer
    printf '%s' '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",' "\"config\":$config," \
        "\"layers\":[{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar\",\"digest\":\"sha256:$digest\",\"size\":$size}]}" >manifest
    image_blob manifest
    manifest="{\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"digest\":\"sha256:$digest\",\"size\":$size,"
    manifest+="\"platform\":{\"architecture\":\"amd64\",\"os\":\"linux\"},"
    manifest+="\"annotations\":{\"io.containerd.image.name\":\"$1\",\"org.opencontainers.image.ref.name\":\"${1##*:}\"}}"
    printf '%s' "{\"schemaVersion\":2,\"mediaType\":\"application/vnd.oci.image.index.v1+json\",\"manifests\":[$manifest]}" >oci/index.json
    printf '%s' '{"imageLayoutVersion":"1.0.0"}' >oci/oci-layout
    image_tar --owner=0 --group=0 -C oci -cf image.tar blobs index.json oci-layout
}

# busybox_root BUSYBOX LINK…: lay it into the current folder, and beside it each of its applets as LINK makes it
# when given the applet's path.
busybox_root() {
    local applet
    install -D -m 0755 "$1" bin/busybox
    shift
    ./bin/busybox --list-full | while read -r applet; do
        if [ "$applet" = linuxrc ] || [ -e "$applet" ]; then continue; fi
        mkdir -p "$(dirname "$applet")"
        "$@" "$applet"
    done
}
