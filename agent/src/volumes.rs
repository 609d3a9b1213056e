//! Copies of volumes that the host exchanges as a whole.
//! Knows files and folders; must not know whose volumes they are.
//!
//! To the guest's kernel nothing happens to a file when the host changes it: who watches one (inotify(7)) hears nothing.
//! So such a volume is copied, and when the host has exchanged its version the same is done here, in the same order:
//! ```text
//! ..2026_11_29/page     the version before            ┐ a folder for each version
//! ..2026_11_30/page     the version from now on        ┘
//! ..data ─▶ ..2026_11_30    put into the place of the old link by rename(2): this is what is watched
//! page ─▶ ..data/page
//! ```

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink},
    },
    path::{Component, Path, PathBuf},
};

use bulkhead_proto::{VOLUME_LINK, agent::FollowedVolume};
use nix::fcntl::OFlag;

/// Where the copies lie.
const DIR: &str = "/run/bulkhead/volumes";
/// The link until it is renamed.
const NEXT_LINK: &str = "..data_tmp";

/// The copies of one container, by what they are copies of; removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Copies {
    dir: PathBuf,
    volumes: Vec<(PathBuf, PathBuf)>,
}

impl Copies {
    /// Copies volumes for the container `id`. One that cannot be copied has no copy: the host may have exchanged it
    /// meanwhile.
    pub(crate) fn make(id: &str, volumes: &[FollowedVolume]) -> Self {
        Self::below(Path::new(DIR), id, volumes)
    }

    fn below(dir: &Path, id: &str, volumes: &[FollowedVolume]) -> Self {
        let mut copies = Self { dir: dir.join(id), volumes: Vec::new() };
        for (number, volume) in volumes.iter().enumerate() {
            let (source, copy) = (Path::new(&volume.source), copies.dir.join(number.to_string()));
            let copied = fs::create_dir_all(&copy)
                .and_then(|()| exchange(source, &copy, &volume.version))
                .and_then(|()| like(&copy, &fs::metadata(source)?));
            match copied {
                Ok(()) => copies.volumes.push((source.into(), copy)),
                Err(error) => {
                    tracing::warn!(%error, "cannot copy {}: nobody in the guest will hear of its changes", volume.source);
                }
            }
        }
        copies
    }

    /// The copy of `source`, if there is one.
    pub(crate) fn of(&self, source: &Path) -> Option<&Path> {
        self.volumes.iter().find(|(of, _)| of == source).map(|(_, copy)| copy.as_path())
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        if let Err(error) = absent(fs::remove_dir_all(&self.dir)) {
            tracing::warn!(%error, "cannot remove {}", self.dir.display());
        }
    }
}

/// Has `copy` become what `source` is with the version named so.
///
/// # Errors
/// It is no name of a version, or a file cannot be read or written. Until the link is renamed what was there is there
/// still; after that the new version is, perhaps with links of files that came or went not put right until the next.
pub(crate) fn exchange(source: &Path, copy: &Path, version: &str) -> io::Result<()> {
    let mut parts = Path::new(version).components();
    if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
        let text = format!("{version:?} is no name of a version");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let link = copy.join(VOLUME_LINK);
    if fs::read_link(&link).is_ok_and(|now| now == Path::new(version)) {
        return Ok(());
    }
    let folder = copy.join(version);
    // Of an attempt that failed.
    absent(fs::remove_dir_all(&folder))?;
    absent(fs::remove_file(copy.join(NEXT_LINK)))?;
    copy_tree(&source.join(version), &folder)?;
    symlink(version, copy.join(NEXT_LINK))?;
    fs::rename(copy.join(NEXT_LINK), &link)?;
    show(copy, &folder)?;
    for entry in fs::read_dir(copy)?.flatten() {
        let old = entry.file_name() != version && entry.file_type()?.is_dir();
        if old {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Has the links of a volume name what is in the folder of its version, and nothing else.
fn show(copy: &Path, folder: &Path) -> io::Result<()> {
    let names = |dir: &Path| fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect();
    let (wanted, there): (BTreeSet<OsString>, BTreeSet<OsString>) = {
        let wanted: io::Result<_> = names(folder);
        let there: io::Result<_> = names(copy);
        (wanted?, there?)
    };
    for name in wanted.difference(&there) {
        symlink(Path::new(VOLUME_LINK).join(name), copy.join(name))?;
    }
    for name in there.difference(&wanted) {
        let path = copy.join(name);
        if fs::read_link(&path).is_ok_and(|to| to.starts_with(VOLUME_LINK)) && name != NEXT_LINK {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// A file, a link or a folder with all that is in it, with owners and modes. Anything else is left out.
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    let what = fs::symlink_metadata(from)?;
    if what.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
        return lchown(to, Some(what.uid()), Some(what.gid()));
    }
    if what.is_dir() {
        fs::create_dir(to)?;
        for entry in fs::read_dir(from)? {
            let name = entry?.file_name();
            copy_tree(&from.join(&name), &to.join(&name))?;
        }
    } else if what.is_file() {
        fs::copy(from, to)?;
    } else {
        return Ok(());
    }
    like(to, &what)
}

/// Gives it the owner and the mode of what it is a copy of.
pub(crate) fn like(copy: &Path, what: &fs::Metadata) -> io::Result<()> {
    own(copy, what.uid(), what.gid(), what.mode())
}

/// Gives a file owners and a mode.
pub(crate) fn own(path: &Path, uid: u32, gid: u32, mode: u32) -> io::Result<()> {
    lchown(path, Some(uid), Some(gid))?;
    // After the owner, whose change takes the bits of set-user-id.
    fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o7777))
}

/// Opens what is there, whatever it is, but follows no link.
pub(crate) fn hold(path: &Path) -> io::Result<OwnedFd> {
    let flags = (OFlag::O_PATH | OFlag::O_NOFOLLOW).bits();
    Ok(File::options().read(true).custom_flags(flags).open(path)?.into())
}

/// The path by which what is open can be reached.
pub(crate) fn by_descriptor(fd: &OwnedFd) -> PathBuf {
    Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string())
}

fn absent(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

    use super::*;

    /// A volume with one version, as Kubernetes writes it.
    fn volume(dir: &Path, version: &str, files: &[(&str, &str)]) {
        let folder = dir.join(version);
        fs::create_dir_all(&folder).unwrap();
        for (name, text) in files {
            fs::create_dir_all(folder.join(name).parent().unwrap()).unwrap();
            fs::write(folder.join(name), text).unwrap();
        }
        absent(fs::remove_file(dir.join(VOLUME_LINK))).unwrap();
        symlink(version, dir.join(VOLUME_LINK)).unwrap();
        show(dir, &folder).unwrap();
    }

    fn followed(source: &Path, version: &str) -> FollowedVolume {
        let (source, version) = (source.display().to_string(), version.into());
        FollowedVolume { source, version, ..Default::default() }
    }

    /// Every name with what it says, or where it leads.
    fn listed(dir: &Path) -> Vec<String> {
        let mut all = Vec::new();
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
            let kind = entry.file_type().unwrap();
            if kind.is_symlink() {
                all.push(format!("{name} -> {}", fs::read_link(path).unwrap().display()));
            } else if kind.is_dir() {
                all.extend(listed(&path).into_iter().map(|below| format!("{name}/{below}")));
            } else {
                all.push(format!("{name}: {}", fs::read_to_string(path).unwrap()));
            }
        }
        all.sort();
        all
    }

    #[test]
    fn a_copy_follows_and_whoever_watches_hears_of_it() {
        let tmp = tempfile::tempdir().unwrap();
        let source = tmp.path().join("source");
        volume(&source, "..1", &[("page", "first"), ("old", "gone soon"), ("deep/er", "down")]);
        fs::set_permissions(source.join("..1/page"), fs::Permissions::from_mode(0o440)).unwrap();
        let copies = Copies::below(&tmp.path().join("v"), "c", &[followed(&source, "..1")]);
        let copy = copies.of(&source).unwrap().to_owned();
        assert_eq!(listed(&copy), listed(&source));
        assert_eq!(fs::metadata(copy.join("page")).unwrap().mode() & 0o7777, 0o440);

        let watch = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        watch.add_watch(&copy, AddWatchFlags::IN_MOVED_TO).unwrap();
        volume(&source, "..2", &[("page", "second"), ("new", "there"), ("deep/er", "down")]);
        fs::remove_dir_all(source.join("..1")).unwrap();
        exchange(&source, &copy, "..2").unwrap();
        assert_eq!(listed(&copy), listed(&source));
        assert!(listed(&copy).contains(&"new -> ..data/new".to_owned()));
        let heard: Vec<_> = watch.read_events().unwrap().into_iter().filter_map(|event| event.name).collect();
        assert_eq!(heard, [VOLUME_LINK]);
        // The same once more is nothing.
        exchange(&source, &copy, "..2").unwrap();
        watch.read_events().unwrap_err();
        drop(copies);
        assert!(!tmp.path().join("v/c").exists());
    }

    #[test]
    fn what_fails_leaves_what_was_there() {
        let tmp = tempfile::tempdir().unwrap();
        let source = tmp.path().join("source");
        volume(&source, "..1", &[("page", "first")]);
        let copies = Copies::below(&tmp.path().join("v"), "c", &[followed(&source, "..1")]);
        let copy = copies.of(&source).unwrap();
        let before = listed(copy);
        for version in ["..nowhere", "", ".", "..", "a/b", "/", "/etc"] {
            exchange(&source, copy, version).unwrap_err();
            assert_eq!(listed(copy), before, "{version}");
        }
        assert!(copies.of(tmp.path()).is_none());
        let gone = Copies::below(&tmp.path().join("v"), "d", &[followed(&source, "..0")]);
        assert!(gone.of(&source).is_none(), "its version has gone");
    }
}
