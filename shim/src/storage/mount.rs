//! Mounts what containerd describes in fstab's words.
//! Knows mount(2); what is mounted and why is the callers' business.

use std::{
    io,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount as sys_mount, umount2},
    sched::{CloneFlags, unshare},
    sys::statvfs::{FsFlags, statvfs},
};

use super::idmap::Owners;

/// The kernel copies at most one page of mount data (mount(2)).
const PAGE: usize = 4096;

/// Words of fstab that are flags: word, flag, whether the word clears it (mount(8)).
const FLAGS: [(&str, MsFlags, bool); 25] = [
    ("async", MsFlags::MS_SYNCHRONOUS, true),
    ("atime", MsFlags::MS_NOATIME, true),
    ("bind", MsFlags::MS_BIND, false),
    ("defaults", MsFlags::empty(), false),
    ("dev", MsFlags::MS_NODEV, true),
    ("diratime", MsFlags::MS_NODIRATIME, true),
    ("dirsync", MsFlags::MS_DIRSYNC, false),
    ("exec", MsFlags::MS_NOEXEC, true),
    ("mand", MsFlags::MS_MANDLOCK, false),
    ("noatime", MsFlags::MS_NOATIME, false),
    ("nodev", MsFlags::MS_NODEV, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, false),
    ("noexec", MsFlags::MS_NOEXEC, false),
    ("nomand", MsFlags::MS_MANDLOCK, true),
    ("norelatime", MsFlags::MS_RELATIME, true),
    ("nostrictatime", MsFlags::MS_STRICTATIME, true),
    ("nosuid", MsFlags::MS_NOSUID, false),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC), false),
    ("relatime", MsFlags::MS_RELATIME, false),
    ("remount", MsFlags::MS_REMOUNT, false),
    ("ro", MsFlags::MS_RDONLY, false),
    ("rw", MsFlags::MS_RDONLY, true),
    ("strictatime", MsFlags::MS_STRICTATIME, false),
    ("suid", MsFlags::MS_NOSUID, true),
    ("sync", MsFlags::MS_SYNCHRONOUS, false),
];

/// What a mount keeps when it is mounted again to be read-only.
const KEPT: [(FsFlags, MsFlags); 6] = [
    (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
    (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
    (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
    (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
    (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
    (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
];

/// Why something could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel refused.
    #[error("mount {kind} {source_name} at {}", target.display())]
    Mount {
        /// File system type.
        kind: String,
        /// What was to be mounted.
        source_name: String,
        /// Where.
        target: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The owners of files could not be mapped.
    #[error("map the owners of the files in {}; its file system may not be able to", path.display())]
    Owners {
        /// Which files.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An overlay whose layers have no directory in common but the root.
    #[error("mount overlay at {}: its layers share no directory whose owners could be mapped", target.display())]
    NoBase {
        /// Where.
        target: PathBuf,
    },
    /// More layers than fit, even with short names.
    #[error("mount {kind} at {}: its options have {length} bytes, the kernel takes {PAGE}", target.display())]
    TooLong {
        /// File system type.
        kind: String,
        /// Where.
        target: PathBuf,
        /// How long they are.
        length: usize,
    },
}

/// Mounts `source` as `kind` at `target`, which exists.
///
/// An overlay whose options do not fit into a page is mounted from the directory that its layers share, by
/// a thread of its own: the working directory belongs to the whole process otherwise.
pub fn mount(kind: &str, source: &str, options: &[String], target: &Path) -> Result<(), MountError> {
    let (flags, data) = parse(options);
    if data.len() < PAGE {
        return mount_here(kind, source, flags, &data, target);
    }
    let Some((base, short)) = shorten(&data) else {
        return Err(MountError::TooLong { kind: kind.into(), target: target.into(), length: data.len() });
    };
    mount_from(&base, kind, source, flags, &short, target)
}

/// Like [`mount`], but the owners of the files are `owners`. Those of an overlay are of its lower layers, which are
/// seen at the directory `layers` for the time of the call.
pub(super) fn mount_owned(
    kind: &str,
    source: &str,
    options: &[String],
    owners: &Owners,
    layers: &Path,
    target: &Path,
) -> Result<(), MountError> {
    let fault = |path: &Path| {
        let path = path.to_owned();
        move |source| MountError::Owners { path, source }
    };
    if kind != "overlay" {
        mount(kind, source, options, target)?;
        let (flags, _) = parse(options);
        let below = flags.contains(MsFlags::MS_REC);
        let read_only = flags.contains(MsFlags::MS_RDONLY);
        owners.bind(target, target, below, below, false).map_err(fault(target))?;
        return if read_only { make_read_only(target) } else { Ok(()) };
    }
    let (flags, data) = parse(options);
    let (base, short) = shorten(&data).ok_or_else(|| MountError::NoBase { target: target.to_owned() })?;
    owners.bind(&base, layers, false, false, false).map_err(fault(&base))?;
    make_read_only(layers)?;
    let mounted = mount_from(layers, kind, source, flags, &short, target);
    // The overlay has its own hold of its layers.
    umount2(layers, MntFlags::MNT_DETACH).map_err(|e| fault(layers)(e.into()))?;
    mounted
}

/// Mounts with the working directory `base`, on a thread that ends.
fn mount_from(
    base: &Path,
    kind: &str,
    source: &str,
    flags: MsFlags,
    data: &str,
    target: &Path,
) -> Result<(), MountError> {
    if data.len() >= PAGE {
        return Err(MountError::TooLong { kind: kind.into(), target: target.into(), length: data.len() });
    }
    let fault = |source_error: io::Error| MountError::Mount {
        kind: kind.into(),
        source_name: source.into(),
        target: target.into(),
        source: source_error,
    };
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_FS).map_err(|e| fault(e.into()))?;
                std::env::set_current_dir(base).map_err(fault)?;
                mount_here(kind, source, flags, data, target)
            })
            .join()
            .unwrap_or_else(|_| Err(fault(io::Error::other("the mounting thread panicked"))))
    })
}

fn mount_here(kind: &str, source: &str, flags: MsFlags, data: &str, target: &Path) -> Result<(), MountError> {
    let fault = |e: nix::errno::Errno| MountError::Mount {
        kind: kind.into(),
        source_name: source.into(),
        target: target.into(),
        source: e.into(),
    };
    let data = (!data.is_empty()).then_some(data);
    // A bind takes no other flag at first (mount(2)); the rest is laid on by a remount.
    if flags.contains(MsFlags::MS_BIND) {
        let bind = flags & (MsFlags::MS_BIND | MsFlags::MS_REC);
        sys_mount(Some(source), target, None::<&str>, bind, None::<&str>).map_err(fault)?;
        let rest = flags - bind;
        if !rest.is_empty() {
            let again = rest | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
            sys_mount(None::<&str>, target, None::<&str>, again, None::<&str>).map_err(fault)?;
        }
        return Ok(());
    }
    sys_mount(Some(source), target, Some(kind), flags, data).map_err(fault)
}

/// Shows `source` at `target`, which exists. What is mounted below `source` later appears at `target` as well
/// if it `follows`. Nothing that happens below `target` is seen at `source`: in a copy that still shares its
/// mounts (mount_namespaces(7)), taking it back would unmount what lies below the original.
pub fn bind(source: &Path, target: &Path, recursive: bool, follows: bool) -> Result<(), MountError> {
    let fault = |e: nix::errno::Errno| MountError::Mount {
        kind: "bind".into(),
        source_name: source.display().to_string(),
        target: target.into(),
        source: e.into(),
    };
    let none = None::<&str>;
    let depth = if recursive { MsFlags::MS_REC } else { MsFlags::empty() };
    sys_mount(Some(source), target, none, MsFlags::MS_BIND | depth, none).map_err(fault)?;
    let propagation = if follows { MsFlags::MS_SLAVE } else { MsFlags::MS_PRIVATE };
    sys_mount(none, target, none, propagation | MsFlags::MS_REC, none).map_err(fault)
}

/// Makes one mount read-only where it is, not those below it.
pub fn make_read_only(target: &Path) -> Result<(), MountError> {
    change(target, "read-only bind", MsFlags::MS_RDONLY)
}

/// Undoes [`make_read_only`].
pub(super) fn make_writable(target: &Path) -> Result<(), MountError> {
    change(target, "writable bind", MsFlags::empty())
}

/// Whether a mount, or its file system, is read-only.
pub(super) fn is_read_only(target: &Path) -> Result<bool, MountError> {
    let flags = statvfs(target).map_err(|e| bind_fault("bind", target, e))?.flags();
    Ok(flags.contains(FsFlags::ST_RDONLY))
}

/// Mounts a bind again where it is, with what it has and with `access`.
fn change(target: &Path, kind: &str, access: MsFlags) -> Result<(), MountError> {
    let fault = |e| bind_fault(kind, target, e);
    let has = statvfs(target).map_err(fault)?.flags();
    let kept = KEPT.iter().filter(|(flag, _)| has.contains(*flag)).map(|(_, flag)| *flag);
    let flags = kept.fold(MsFlags::MS_REMOUNT | MsFlags::MS_BIND | access, |all, flag| all | flag);
    sys_mount(None::<&str>, target, None::<&str>, flags, None::<&str>).map_err(fault)
}

fn bind_fault(kind: &str, target: &Path, source: nix::errno::Errno) -> MountError {
    MountError::Mount {
        kind: kind.into(),
        source_name: "none".into(),
        target: target.into(),
        source: source.into(),
    }
}

fn parse(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match FLAGS.iter().find(|(word, _, _)| word == option) {
            Some((_, flag, true)) => flags.remove(*flag),
            Some((_, flag, false)) => flags.insert(*flag),
            None => data.push(option.as_str()),
        }
    }
    (flags, data.join(","))
}

/// Takes the directory that all lower layers share out of `lowerdir=`, and answers it with the shorter
/// options.
fn shorten(data: &str) -> Option<(PathBuf, String)> {
    let layers: Vec<&str> = data.split(',').find_map(|o| o.strip_prefix("lowerdir="))?.split(':').collect();
    let first = layers.first()?;
    let mut end = layers.iter().skip(1).fold(first.len(), |end, layer| {
        first.bytes().zip(layer.bytes()).take(end).take_while(|(a, b)| a == b).count()
    });
    end = first[..end].rfind('/')?;
    if end == 0 {
        return None;
    }
    let base = &first[..end];
    let short: Vec<&str> = layers.iter().map(|l| &l[end + 1..]).collect();
    let options =
        data.split(',')
            .map(|o| {
                if o.starts_with("lowerdir=") {
                    format!("lowerdir={}", short.join(":"))
                } else {
                    o.to_owned()
                }
            })
            .collect::<Vec<_>>()
            .join(",");
    Some((base.into(), options))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_flags_and_the_rest_data() {
        let words = ["ro", "nosuid", "lowerdir=/a:/b", "rw"].map(String::from);
        assert_eq!(parse(&words), (MsFlags::MS_NOSUID, "lowerdir=/a:/b".to_owned()));
    }

    #[test]
    fn many_layers_are_named_from_the_directory_they_share() {
        let layers: Vec<String> = (0..200).map(|n| format!("/var/lib/c/snapshots/{n}/fs")).collect();
        let data = format!("index=off,lowerdir={},upperdir=/u,workdir=/w", layers.join(":"));
        let (base, short) = shorten(&data).unwrap();
        assert_eq!(base, Path::new("/var/lib/c/snapshots"));
        assert!(short.starts_with("index=off,lowerdir=0/fs:1/fs:"), "{short}");
        assert!(short.ends_with(":199/fs,upperdir=/u,workdir=/w"));
        assert!(short.len() < data.len());
    }

    #[test]
    fn a_refusal_names_what_and_where() {
        let error = mount("nofs", "none", &[], Path::new("/nope")).unwrap_err();
        assert!(error.to_string().contains("mount nofs none at /nope"), "{error}");
    }
}
