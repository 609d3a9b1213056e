//! Mounts whose files have other owners than on their disk: id-mapped mounts (mount_setattr(2)).
//! Knows system calls; which ids are mapped, and why, is the plan's.
//!
//! Done on the host, since what the guest sees through virtio-fs is then what every process of the host would see, and
//! what the guest creates gets the owner that the disk is to have. A mapping is that of a user namespace, which is made
//! for the purpose and goes with the mount.

#![allow(unsafe_code)]

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::{sys::wait::waitpid, unistd::Pid};

use crate::plan::IdMaps;

/// `struct mount_attr`, linux/mount.h.
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

/// A user namespace that stands for a mapping.
pub(super) struct Owners(File);

impl Owners {
    /// Makes one, by a process that is in it for a moment.
    pub(super) fn new(maps: &IdMaps) -> io::Result<Self> {
        let (from, to) = io::pipe()?;
        let from_fd = from.as_raw_fd();
        let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
        // SAFETY: without CLONE_VM this is a fork; the child has a copy of everything.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } as i32;
        if pid == 0 {
            // SAFETY: plain system calls on numbers and on a byte of our own stack: a child of a process with threads
            // may do nothing else. It lives until the other end of the pipe is closed, by us or by our end, and holds
            // nothing else of ours open.
            unsafe {
                let mut byte = 0u8;
                libc::dup2(from_fd, 0);
                libc::close_range(1, libc::c_uint::MAX, 0);
                libc::read(0, (&raw mut byte).cast(), 1);
                libc::_exit(0)
            }
        }
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        let made = (|| {
            for (name, map) in maps.files() {
                fs::write(format!("/proc/{pid}/{name}"), map)?;
            }
            File::open(format!("/proc/{pid}/ns/user"))
        })();
        drop((from, to));
        let _ = waitpid(Pid::from_raw(pid), None);
        made.map(Self)
    }

    /// Shows `source` at `target` as of these owners. `below`: what is mounted below `source` is shown, too, and
    /// `owners_below`: as of these owners as well. With `follows`, so is what is mounted there later.
    pub(super) fn bind(
        &self,
        source: &Path,
        target: &Path,
        below: bool,
        owners_below: bool,
        follows: bool,
    ) -> io::Result<()> {
        let recursive = |on: bool| if on { libc::AT_RECURSIVE as u32 } else { 0 };
        let (source, target) = (c_path(source)?, c_path(target)?);
        let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | recursive(below);
        // SAFETY: the path outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), flags) };
        let tree = owned(fd)?;
        let propagation = if follows { libc::MS_SLAVE } else { libc::MS_PRIVATE };
        set(&tree, recursive(below), &MountAttr { propagation, ..MountAttr::default() })?;
        let owners = MountAttr {
            set: libc::MOUNT_ATTR_IDMAP,
            userns: self.0.as_raw_fd() as u64,
            ..MountAttr::default()
        };
        set(&tree, recursive(below && owners_below), &owners)?;
        // SAFETY: both paths outlive the call.
        let done = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                tree.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                target.as_ptr(),
                libc::MOVE_MOUNT_F_EMPTY_PATH,
            )
        };
        check(done)
    }
}

fn set(tree: &OwnedFd, flags: u32, attributes: &MountAttr) -> io::Result<()> {
    // SAFETY: the kernel reads one mount_attr of the size that is told, which outlives the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH as u32 | flags,
            &raw const *attributes,
            size_of::<MountAttr>(),
        )
    })
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

fn check(answer: libc::c_long) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn owned(answer: libc::c_long) -> io::Result<OwnedFd> {
    check(answer)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(answer as i32) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, chown};

    use nix::{
        mount::{MntFlags, MsFlags, mount, umount2},
        sched::{CloneFlags, unshare},
    };

    use super::*;
    use crate::plan::IdRange;

    fn maps() -> IdMaps {
        let ids = |host| vec![IdRange { container: 0, host, size: 1000 }];
        IdMaps { uids: ids(100_000), gids: ids(200_000) }
    }

    /// Does something in a mount namespace of a thread's own: a mount namespace as a sandbox has it is not touched.
    fn apart(work: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNS).unwrap();
                let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
                work();
            });
        });
    }

    fn owner(path: &Path) -> (u32, u32) {
        let meta = fs::metadata(path).unwrap();
        (meta.uid(), meta.gid())
    }

    #[test]
    fn files_have_other_owners_both_ways() {
        apart(|| {
            let dir = tempfile::tempdir_in("/var/tmp").unwrap();
            let (disk, seen) = (dir.path().join("disk"), dir.path().join("seen"));
            fs::create_dir(&disk).unwrap();
            fs::create_dir(&seen).unwrap();
            fs::write(disk.join("old"), "").unwrap();
            chown(disk.join("old"), Some(7), Some(8)).unwrap();
            let owners = Owners::new(&maps()).unwrap();
            owners.bind(&disk, &seen, true, false, false).unwrap();
            assert_eq!(owner(&seen.join("old")), (100_007, 200_008));
            chown(seen.join("old"), Some(100_009), Some(200_010)).unwrap();
            assert_eq!(owner(&disk.join("old")), (9, 10));
            umount2(&seen, MntFlags::MNT_DETACH).unwrap();
            owners.bind(&disk, &seen, false, false, false).unwrap();
            super::super::mount::make_read_only(&seen).unwrap();
            let error = chown(seen.join("old"), Some(100_001), None).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS));
            umount2(&seen, MntFlags::MNT_DETACH).unwrap();
        });
    }

    #[test]
    fn an_overlay_has_the_owners_of_its_layers_mapped() {
        apart(|| {
            let dir = tempfile::tempdir_in("/var/tmp").unwrap();
            let make = |name: &str| {
                let path = dir.path().join(name);
                fs::create_dir_all(&path).unwrap();
                path
            };
            let (a, b) = (make("snapshots/1/fs"), make("snapshots/12/fs"));
            let (upper, work, layers, target) = (make("upper"), make("work"), make("layers"), make("root"));
            fs::write(a.join("a"), "").unwrap();
            fs::write(b.join("b"), "").unwrap();
            chown(&upper, Some(100_000), Some(200_000)).unwrap();
            let options = [
                format!("lowerdir={}:{}", a.display(), b.display()),
                format!("upperdir={}", upper.display()),
                format!("workdir={}", work.display()),
            ];
            let owners = Owners::new(&maps()).unwrap();
            super::super::mount::mount_owned("overlay", "overlay", &options, &owners, &layers, &target)
                .unwrap();
            assert_eq!(fs::read_dir(&layers).unwrap().count(), 0, "nothing is seen there any more");
            for name in ["", "a", "b"] {
                assert_eq!(owner(&target.join(name)), (100_000, 200_000), "{name}");
            }
            umount2(&target, MntFlags::MNT_DETACH).unwrap();
        });
    }
}
