//! Mount points that an image does not have, made in the container's root before it is shared read-only: the guest
//! could not make them there any more.
//! Knows names and directories; what is mounted there is the guest's affair.
//!
//! The root's content is the image's, and so is every symbolic link in it: all names are resolved in the root, as
//! the container will, and never lead out of it.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{Mode, mkdirat},
};
use oci_spec::runtime::Mount;

use crate::plan::Bind;

/// What is to be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    /// In the container.
    pub path: PathBuf,
    /// An empty file, for a file that is bound to it; else a directory.
    pub file: bool,
}

/// Where something is to be mounted, in order; `binds` come from the host.
pub fn of(mounts: &[Mount], binds: &[Bind]) -> Vec<Point> {
    let file = |path: &Path| {
        let bind = binds.iter().rev().find(|bind| bind.destination == path);
        bind.is_some_and(|bind| bind.source.exists() && !bind.source.is_dir())
    };
    mounts.iter().map(Mount::destination).map(|path| Point { path: path.clone(), file: file(path) }).collect()
}

/// Makes what is missing of `points` in `root`, in their order. One that lies below another is not made: it will be
/// in what is mounted there.
pub fn make(root: &Path, points: &[Point]) -> io::Result<()> {
    let root = nix::fcntl::open(root, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    for (n, point) in points.iter().enumerate() {
        let below = |other: &Point| point.path != other.path && point.path.starts_with(&other.path);
        if !points[..n].iter().any(below) {
            make_one(&root, point)?;
        }
    }
    Ok(())
}

fn make_one(root: &OwnedFd, point: &Point) -> io::Result<()> {
    let names: Vec<_> = point
        .path
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    let mut so_far = PathBuf::from(".");
    for (n, name) in names.iter().enumerate() {
        let parent = so_far.clone();
        so_far.push(name);
        match open(root, &so_far, OFlag::O_PATH) {
            Ok(_) => continue,
            Err(Errno::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
        let parent = open(root, &parent, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        if point.file && n + 1 == names.len() {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            nix::fcntl::openat(&parent, *name, flags | OFlag::O_WRONLY, Mode::from_bits_truncate(0o755))?;
        } else {
            mkdirat(&parent, *name, Mode::from_bits_truncate(0o755))?;
        }
    }
    Ok(())
}

fn open(root: &OwnedFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn point(path: &str, file: bool) -> Point {
        Point { path: path.into(), file }
    }

    #[test]
    fn what_is_missing_is_made_and_what_lies_below_another_is_not() {
        let tmp = tempfile::tempdir().unwrap();
        let points =
            [point("/dev", false), point("/dev/shm", false), point("/a/b", false), point("/etc/hosts", true)];
        for _ in 0..2 {
            make(tmp.path(), &points).unwrap();
        }
        assert!(tmp.path().join("dev").is_dir() && !tmp.path().join("dev/shm").exists());
        assert!(tmp.path().join("a/b").is_dir() && tmp.path().join("etc/hosts").is_file());
    }

    #[test]
    fn links_of_an_image_do_not_lead_out_of_it() {
        let tmp = tempfile::tempdir().unwrap();
        let (root, outside) = (tmp.path().join("root"), tmp.path().join("outside"));
        std::fs::create_dir_all(&root).unwrap();
        std::fs::create_dir_all(&outside).unwrap();
        symlink(&outside, root.join("absolute")).unwrap();
        symlink("../outside", root.join("relative")).unwrap();
        std::fs::create_dir(root.join("outside")).unwrap();
        make(&root, &[point("/relative/x", false), point("/../y", false)]).unwrap();
        assert!(root.join("outside/x").is_dir(), "as the container would find it");
        assert!(root.join("y").is_dir());
        assert!(make(&root, &[point("/absolute/x", false)]).is_err(), "it leads to nothing in the root");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    }
}
