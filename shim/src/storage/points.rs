//! Mount points in a container's root that the image lacks. The guest makes them where it can write; in a root
//! that is shared read-only they are made here, before it is.
//! Trusts nothing in the root: no symbolic link of an image leads out of it. Knows no mounts.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Component, Path},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2},
    sys::stat::{Mode, mkdirat},
};

/// Makes what is missing of `destination` below `root`: its last part a folder, or an empty file. What cannot be
/// made, in a root that nobody can write, is left to the guest to tell of.
pub(super) fn make_point(root: &Path, destination: &Path, folder: bool) -> io::Result<()> {
    match make(root, destination, folder) {
        Ok(()) | Err(Errno::EROFS | Errno::EEXIST | Errno::ENOTDIR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn make(root: &Path, destination: &Path, folder: bool) -> nix::Result<()> {
    let path = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let root = openat(AT_FDCWD, root, path | OFlag::O_DIRECTORY, Mode::empty())?;
    // As if the root were that of the process (openat2(2)).
    let inside =
        OpenHow::new().flags(path).resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let mut parts = destination.components().filter(|part| matches!(part, Component::Normal(_))).peekable();
    let mut so_far = std::path::PathBuf::new();
    let mut parent: OwnedFd = openat2(&root, ".", inside)?;
    while let Some(part) = parts.next() {
        so_far.push(part);
        let found = match openat2(&root, &so_far, inside) {
            Err(Errno::ENOENT) => None,
            found => Some(found?),
        };
        parent = match found {
            Some(found) => found,
            None if folder || parts.peek().is_some() => {
                mkdirat(&parent, part.as_os_str(), Mode::from_bits_truncate(0o755))?;
                openat2(&root, &so_far, inside)?
            }
            None => {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                openat(&parent, part.as_os_str(), flags, Mode::from_bits_truncate(0o644))?
            }
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn what_is_missing_is_made_and_what_is_there_is_kept() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/hosts"), "kept").unwrap();
        for (point, folder) in
            [("/etc/hosts", false), ("/etc/hostname", false), ("/var/run/a/b", true), ("/etc", true)]
        {
            make_point(root.path(), Path::new(point), folder).unwrap();
        }
        assert_eq!(fs::read_to_string(root.path().join("etc/hosts")).unwrap(), "kept");
        assert_eq!(fs::read_to_string(root.path().join("etc/hostname")).unwrap(), "");
        assert!(root.path().join("var/run/a/b").is_dir());
    }

    #[test]
    fn links_of_the_image_lead_where_they_would_in_the_container() {
        let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(root.path().join("run")).unwrap();
        fs::create_dir_all(root.path().join("var")).unwrap();
        symlink("/run", root.path().join("var/run")).unwrap();
        symlink(outside.path(), root.path().join("out")).unwrap();
        symlink("../../../../../../../..", root.path().join("up")).unwrap();
        make_point(root.path(), Path::new("/var/run/secrets"), true).unwrap();
        assert!(root.path().join("run/secrets").is_dir());
        // Where it leads there is nothing in the root, and nothing may be made outside.
        make_point(root.path(), Path::new("/out/x"), true).unwrap();
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        make_point(root.path(), Path::new("/up/x"), true).unwrap();
        assert!(root.path().join("x").is_dir());
        make_point(root.path(), Path::new("/../../y"), true).unwrap();
        assert!(root.path().join("y").is_dir());
    }

    #[test]
    fn a_root_that_is_not_there_is_told() {
        assert!(make_point(Path::new("/no/such/root"), Path::new("/etc"), true).is_err());
    }
}
