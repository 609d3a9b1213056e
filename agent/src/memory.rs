//! Volumes in the guest's memory, which containers of the pod have together, and folders in them that a container
//! mounts. Knows mounts and folders; must not know whose volumes they are.
//!
//! ```text
//! /run/bulkhead/memory/<name>                    a volume, from the first container that has it to the guest's end
//! /run/bulkhead/memory-parts/<container>/<n>     a folder in one, as long as there is the container that mounts it
//! ```
//! A part is mounted apart because containers write to the volume: what is mounted must be what was looked at, whatever
//! they put in its place meanwhile.

use std::{
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt},
    path::{Component, Path, PathBuf},
};

use bulkhead_proto::agent::{MemoryFolder, MemoryVolume};
use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{Mode, mkdirat},
};

use crate::volumes::{by_descriptor, hold, own};

/// Where the volumes lie.
const VOLUMES: &str = "/run/bulkhead/memory";
/// Where folders in them are mounted.
const PARTS: &str = "/run/bulkhead/memory-parts";

/// What one container mounts of volumes in memory; its parts are unmounted when this is dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    dir: PathBuf,
    shown: Vec<(PathBuf, PathBuf)>,
}

impl Memory {
    /// Finds the volumes for the container `id`, and makes those that are not there yet.
    pub(crate) fn make(id: &str, volumes: &[MemoryVolume]) -> io::Result<Self> {
        Self::below(Path::new(VOLUMES), Path::new(PARTS), id, volumes)
    }

    fn below(all: &Path, parts: &Path, id: &str, volumes: &[MemoryVolume]) -> io::Result<Self> {
        let mut memory = Self { dir: parts.join(id), shown: Vec::new() };
        for (number, volume) in volumes.iter().enumerate() {
            let place = memory.show(all, number, volume)?;
            memory.shown.push(((&volume.source).into(), place));
        }
        Ok(memory)
    }

    /// What is to be mounted in place of `source`, if there is something.
    pub(crate) fn of(&self, source: &Path) -> Option<&Path> {
        self.shown.iter().find(|(of, _)| of == source).map(|(_, place)| place.as_path())
    }

    /// Answers where a container finds what it mounts.
    fn show(&self, all: &Path, number: usize, volume: &MemoryVolume) -> io::Result<PathBuf> {
        let place = all.join(plain(&volume.name)?);
        let (whole, parts) = volume.folders.split_first().ok_or_else(|| invalid("a volume has a folder"))?;
        if !place.exists() {
            make_volume(&place, volume.size_bytes, whole)?;
        }
        let Some(last) = parts.last() else { return Ok(place) };
        let mut found = hold(&place)?;
        for part in parts {
            let name = plain(part.below.rsplit('/').next().unwrap_or_default())?;
            found = enter(&found, name, part)?;
        }
        let part = self.dir.join(number.to_string());
        // What the folder is now: a container may have made a file of this name.
        if fs::metadata(by_descriptor(&found))?.is_dir() {
            fs::create_dir_all(&part)?;
        } else {
            fs::create_dir_all(&self.dir)?;
            File::create(&part)?;
        }
        let (from, flags) = (by_descriptor(&found), MsFlags::MS_BIND);
        mount(Some(&from), &part, None::<&str>, flags, None::<&str>)
            .map_err(|e| io::Error::new(io::Error::from(e).kind(), format!("mount {}: {e}", last.below)))?;
        Ok(part)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for (_, place) in self.shown.iter().filter(|(_, place)| place.starts_with(&self.dir)) {
            let removed = umount2(place, MntFlags::MNT_DETACH).map_err(io::Error::from);
            // Never what is in it, where it could not be unmounted.
            let removed = removed.and_then(|()| fs::remove_dir(place).or_else(|_| fs::remove_file(place)));
            if let Err(error) = removed {
                tracing::warn!(%error, "cannot remove {}", place.display());
            }
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

/// A name that stays in its folder.
fn plain(name: &str) -> io::Result<&str> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(part)), None) if part == name => Ok(name),
        _ => Err(invalid("it is no name of a folder")),
    }
}

fn make_volume(place: &Path, size: u64, whole: &MemoryFolder) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(place)?;
    let options = format!("size={size},mode={:o},uid={},gid={}", whole.mode & 0o7777, whole.uid, whole.gid);
    let mounted = mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()));
    if mounted.is_err() {
        // Or the next container would take the folder for the volume.
        let _ = fs::remove_dir(place);
    }
    Ok(mounted?)
}

/// Opens what is in a folder under a name; a folder is made if there is nothing.
fn enter(folder: &OwnedFd, name: &str, wanted: &MemoryFolder) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let open = || openat(folder, name, flags, Mode::empty());
    let found = match open() {
        Err(Errno::ENOENT) => {
            mkdirat(folder, name, Mode::S_IRWXU)?;
            let made = open()?;
            own(&by_descriptor(&made).join("."), wanted.uid, wanted.gid, wanted.mode)?;
            made
        }
        found => found?,
    };
    if fs::metadata(by_descriptor(&found))?.is_symlink() {
        return Err(invalid("a link has the name of a folder to mount"));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn folder(below: &str) -> MemoryFolder {
        let own = nix::unistd::getuid().as_raw();
        let group = nix::unistd::getgid().as_raw();
        MemoryFolder { below: below.into(), mode: 0o2770, uid: own, gid: group, ..Default::default() }
    }

    #[test]
    fn a_folder_that_is_missing_is_made_and_one_that_is_there_stays() {
        let tmp = tempfile::tempdir().unwrap();
        let top = hold(tmp.path()).unwrap();
        let made = enter(&top, "a", &folder("a")).unwrap();
        let mode = || fs::metadata(tmp.path().join("a")).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(), 0o2770);
        enter(&made, "b", &folder("a/b")).unwrap();
        assert!(tmp.path().join("a/b").is_dir());
        fs::set_permissions(tmp.path().join("a"), fs::Permissions::from_mode(0o700)).unwrap();
        enter(&top, "a", &folder("a")).unwrap();
        assert_eq!(mode(), 0o700);
        fs::write(tmp.path().join("file"), "").unwrap();
        enter(&top, "file", &folder("file")).unwrap();
    }

    #[test]
    fn no_link_and_no_name_leads_out_of_a_volume() {
        let tmp = tempfile::tempdir().unwrap();
        symlink("/etc", tmp.path().join("link")).unwrap();
        let top = hold(tmp.path()).unwrap();
        enter(&top, "link", &folder("link")).unwrap_err();
        for name in ["", ".", "..", "a/b", "/etc", "a/"] {
            plain(name).unwrap_err();
        }
        assert_eq!(plain("0-7").unwrap(), "0-7");
    }
}
