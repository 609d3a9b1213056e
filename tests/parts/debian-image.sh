# Makes images of what Debian's packages have. Source it after image.sh; everything is done in the current folder, which
# is a scratch of its caller that has `images`: there the archives come to lie, and a list of them in `names`, each line
# an archive and the references that it stands for.
# shellcheck shell=bash disable=SC2034  # path is used by who sources it

path='"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]'

# image NAME CONFIG REFERENCE…: pack `rootfs` as NAME.tar.
image() {
    local name=$1 config=$2
    shift 2
    rm -rf oci
    pack_image "$1" "$config"
    mv image.tar "images/$name.tar"
    echo "$name.tar $*" >>images/names
}

# base_root: make `base`, a root with a shell. Hard links, as in the image it stands for: the path of one applet can be
# masked without the others. Not Debian's static busybox, whose shell runs its own applets whatever lies at their paths.
base_root() {
    unpacked libc6 busybox
    mkdir rootfs
    install_program bin/busybox bin/busybox
    (cd rootfs && base_files ../debian/bin/busybox)
    mv rootfs base
}

# base_files BUSYBOX: fill the current folder.
base_files() {
    busybox_root "$1" ln bin/busybox
    mkdir -p dev proc sys run etc root home tmp var/tmp var/run var/log
    printf '%s\n' root:x:0:0:root:/root:/bin/sh nobody:x:65534:65534:nobody:/:/bin/sh >etc/passwd
    printf '%s\n' root:x:0: nogroup:x:65534: >etc/group
    chmod 1777 tmp var/tmp
    chmod 0700 root
}

fresh_root() { rm -rf rootfs && cp -a base rootfs; }

# unpacked PACKAGE…: the files of Debian packages together in `debian`, whose /lib is /usr/lib as in an
# installed system, and so on. Of names with | between them the first that this release of Debian knows.
unpacked() {
    local names name files
    for name in lib lib64 bin sbin; do
        mkdir -p "debian/usr/$name"
        ln -sfn "usr/$name" "debian/$name"
    done
    for names in "$@"; do
        for name in ${names//|/ }; do
            ! apt-cache show "$name" >/dev/null 2>&1 || break
        done
        files=$(debian_files "$name")
        tar -C "$files" -cf - . | tar -C debian --keep-directory-symlink -xf -
    done
}

# needed_by PACKAGE…: them, and all that Debian says they need.
needed_by() {
    apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances "$@" |
        grep -E '^[a-z0-9]' | sort -u
}

# install_program FROM TO [OBJECT…]: a program of `debian` and every library it and the OBJECTs need, into
# `rootfs`.
install_program() {
    local from=$1 to=$2 loader=lib64/ld-linux-x86-64.so.2 libraries=lib/x86_64-linux-gnu object file
    shift 2
    install -D -m 0755 "debian/$from" "rootfs/$to"
    install -D -m 0755 "debian/$loader" "rootfs/$loader"
    for object in "$from" "$@"; do
        # What the loader itself says it would load.
        "debian/$loader" --inhibit-cache --library-path "debian/$libraries" --list "debian/$object" >needed ||
            die "$object of Debian needs a library that is not there: $(cat needed)"
        for file in $(awk '$2 == "=>" && $1 !~ "/" { print $1 }' needed); do
            install -D -m 0644 "debian/$libraries/$file" "rootfs/$libraries/$file"
        done
    done
}

# nginx_root: make `rootfs` with nginx, which still lacks its configuration.
nginx_root() {
    unpacked nginx libcrypt1 libpcre2-8-0 "libssl3t64|libssl3" zlib1g
    fresh_root
    install_program usr/sbin/nginx usr/sbin/nginx
    mkdir -p rootfs/etc/nginx rootfs/var/lib/nginx rootfs/var/log/nginx rootfs/srv
    echo "this is nginx" >rootfs/srv/index.html
}

# nginx_configuration PORT
nginx_configuration() {
    cat >rootfs/etc/nginx/nginx.conf <<CONF
user nobody nogroup;
worker_processes 2;
pid /var/run/nginx.pid;
error_log stderr notice;
events { worker_connections 64; }
http {
    access_log /dev/stdout;
    server {
        listen $1;
        root /srv;
    }
}
CONF
}
