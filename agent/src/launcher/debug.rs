//! Runs a program in the namespaces of the guest itself, for who looks at the guest and not at a container.
//! Knows mounts and the guest's own folders; who may ask for it, and whose files are used, is decided by others.
//!
//! The guest's root has no program but the agent, so the program's files are those of a container's root. They are
//! shown, read-only, beside the guest's own file systems, in a copy of its mount namespace:
//! ```text
//!   /dev /proc /sys /tmp   the guest's, with all that is mounted there
//!   /run                   the guest's, and the pod's namespaces below it; not the share
//!   everything else        of the container's root
//! ```
//! The share is not there: what it shows would stay in use on the host for as long as the program runs. Files of any
//! container are below /proc/<pid>/root.

use std::{
    convert::Infallible,
    fs::{self, File},
    io,
    os::{
        fd::OwnedFd,
        unix::{fs::symlink, net::UnixStream},
    },
    path::Path,
};

use libcontainer::syscall::syscall::SyscallType;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::{chdir, pivot_root, setsid},
};

use super::{
    Debug, join,
    last_mile::{LastMileExecutor, why},
};
use crate::{boot::RUN_DIR, netns};

/// Folders that are the guest's own, with all that is mounted in them.
const OF_GUEST: [&str; 4] = ["dev", "proc", "sys", "tmp"];
/// The one of which only some is shown.
const RUN: &str = "run";

/// Files of a container are there to be used, by a process that may do anything.
const HARMLESS: MsFlags = MsFlags::MS_RDONLY.union(MsFlags::MS_NOSUID).union(MsFlags::MS_NODEV);

/// Runs the program. Answers its pid and the controlling end of its terminal.
pub(super) fn run(debug: &Debug, stdio: Vec<OwnedFd>) -> Result<(i32, Option<OwnedFd>), String> {
    join::spawn(&debug.last_mile, stdio, |last_mile, stdio, console| {
        become_program(debug, last_mile, stdio, console)
    })
}

fn become_program(
    debug: &Debug,
    last_mile: &LastMileExecutor,
    stdio: Vec<OwnedFd>,
    console: UnixStream,
) -> Result<Infallible, String> {
    let procs = debug.cgroup.join("cgroup.procs");
    fs::write(&procs, "0").map_err(|e| format!("join the cgroup, {}: {}", procs.display(), why(&e)))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| format!("copy the guest's mounts: {}", why(&e.into())))?;
    enter_view(&debug.root)
        .map_err(|e| format!("show the files of {} in the guest: {}", debug.root.display(), why(&e)))?;
    setsid().map_err(|e| format!("begin a session: {}", why(&e.into())))?;
    join::take_stdio(last_mile, stdio, &console)?;
    let syscall = SyscallType::default().create_syscall();
    syscall
        .close_range(0)
        .map_err(|e| format!("close what is not the program's: {}", super::worker::chain(&e)))?;
    last_mile.prepare_unconfined()?;
    last_mile.execute()
}

/// Makes the guest's folders with the files of `root` the root directory of this process, whose mounts nobody shares.
fn enter_view(root: &Path) -> io::Result<()> {
    // Below /run, of which only the file system itself is shown, hence not what is mounted here.
    let view = Path::new(RUN_DIR).join("debug");
    fs::create_dir_all(&view)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("debug"), &view, Some("tmpfs"), flags, Some("mode=0755,size=1m"))?;
    show_container(root, &view)?;
    for name in OF_GUEST {
        fs::create_dir(view.join(name))?;
        bind(&Path::new("/").join(name), &view.join(name), MsFlags::MS_REC)?;
    }
    fs::create_dir(view.join(RUN))?;
    bind(&Path::new("/").join(RUN), &view.join(RUN), MsFlags::empty())?;
    let namespaces = Path::new(netns::DIR);
    bind(namespaces, &view.join(namespaces.strip_prefix("/").unwrap_or(namespaces)), MsFlags::MS_REC)?;
    chdir(&view)?;
    // The old root comes to lie on the new one, from where it is taken (pivot_root(2)).
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    Ok(chdir("/")?)
}

/// Shows what lies at the top of a container's root and is not the guest's.
fn show_container(root: &Path, view: &Path) -> io::Result<()> {
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let (name, kind) = (entry.file_name(), entry.file_type()?);
        if name == RUN || OF_GUEST.iter().any(|own| name == *own) {
            continue;
        }
        let (from, to) = (root.join(&name), view.join(&name));
        if kind.is_symlink() {
            symlink(fs::read_link(&from)?, &to)?;
            continue;
        }
        if kind.is_dir() {
            fs::create_dir(&to)?;
        } else if kind.is_file() {
            File::create(&to)?;
        } else {
            continue;
        }
        bind(&from, &to, MsFlags::empty())?;
        // A bind mount takes its flags by a second call only (mount(2)).
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | HARMLESS;
        mount(None::<&str>, &to, None::<&str>, flags, None::<&str>)?;
    }
    Ok(())
}

fn bind(from: &Path, to: &Path, more: MsFlags) -> io::Result<()> {
    Ok(mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | more, None::<&str>)?)
}
