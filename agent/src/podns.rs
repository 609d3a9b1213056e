//! The namespaces that the containers of a pod share: network, System V IPC and message queues, host name; process
//! ids where a container asks for it, and users where the pod does. And /dev/shm.
//! Knows namespaces; which container joins which is written in its specification.
//!
//! A namespace belongs to the user namespace in which it was made, whose root has power over it. Where the pod has
//! one of its own it therefore comes first, and the others are made by a process within:
//! ```text
//! worker ── fork ──▶ holder ── user namespace ──▶ │                        │ ── net, ipc, uts ──▶ │
//!    ▲                                            ▼ which ids it maps ──▶  │                      ▼
//!    └──────────────────────────────────────────────────────────────────────  sysctls, lo, bind mounts
//! ```

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process, thread,
};

use bulkhead_proto::{NAMESPACE_DIR, SHM_DIR};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::{
        resource::{RLIM_INFINITY, Resource, setrlimit},
        wait::waitpid,
    },
    unistd::{ForkResult, Gid, Uid, setegid, seteuid, setresgid, setresuid},
};

use crate::users::Users;

/// Size of the pod's /dev/shm: what containerd's CRI gives a pod, 64 MiB.
const SHM_OPTIONS: &str = "mode=1777,size=65536k";

/// What every pod has of its own.
const SHARED: CloneFlags =
    CloneFlags::CLONE_NEWNET.union(CloneFlags::CLONE_NEWIPC).union(CloneFlags::CLONE_NEWUTS);

/// Path of the namespace of processes that containers of the pod may share.
pub(crate) fn pid() -> PathBuf {
    Path::new(NAMESPACE_DIR).join("pid")
}

/// Path of the pod's user namespace, where it has one.
pub(crate) fn users() -> PathBuf {
    Path::new(NAMESPACE_DIR).join("user")
}

/// Makes the pod's /dev/shm.
pub(crate) fn create_shm() -> io::Result<()> {
    fs::create_dir_all(SHM_DIR)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(Some("shm"), SHM_DIR, Some("tmpfs"), flags, Some(SHM_OPTIONS))?)
}

/// Makes the pod's namespaces, with `sysctls` written there.
///
/// The work is done on a thread that ends: a namespace belongs to a thread, and the agent's must not change.
/// The host name is that of the guest at the time of the call.
pub(crate) fn create(sysctls: Vec<(String, String)>) -> io::Result<()> {
    thread::Builder::new()
        .name("podns".into())
        .stack_size(256 << 10)
        .spawn(move || -> io::Result<()> {
            unshare(SHARED)?;
            furnish(&sysctls, None)
        })?
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}

/// Makes the pod's user namespace and, of that one, its other namespaces.
///
/// Called in a worker of the launcher, which has one thread and is about to end.
pub(crate) fn create_with_users(users: &Users, sysctls: &[(String, String)]) -> io::Result<()> {
    let (mut ours, theirs) = UnixStream::pair()?;
    match crate::sys::fork_single_threaded()? {
        ForkResult::Child => {
            drop(ours);
            hold_namespaces(theirs)
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            let made = (|| {
                heed(&mut ours)?;
                for (name, map) in users.maps() {
                    fs::write(format!("/proc/{child}/{name}"), &map)
                        .map_err(|e| io::Error::new(e.kind(), format!("{name} {:?}: {e}", map.trim_end())))?;
                }
                ours.write_all(&[0])?;
                heed(&mut ours)?;
                keep(format!("/proc/{child}/ns/user").into(), &self::users())?;
                // From here on with the guest's powers in namespaces of the pod: its root may not set all sysctls.
                setns(crate::sys::pidfd(child.as_raw())?, SHARED)?;
                furnish(sysctls, Some(users))
            })();
            drop(ours);
            let _ = waitpid(child, None);
            made
        }
    }
}

/// In the process that has the new namespaces first. It ends when it is no longer listened to.
fn hold_namespaces(mut worker: UnixStream) -> ! {
    let mut go_on = |done: nix::Result<()>| {
        let said = done.err().map_or(0, |e| e as i32);
        let told = worker.write_all(&said.to_ne_bytes()).and_then(|()| worker.read_exact(&mut [0]));
        if said != 0 || told.is_err() {
            process::exit(0);
        }
    };
    // These are limits of the namespace as well as of a process: each process has its own below them.
    for resource in [Resource::RLIMIT_MEMLOCK, Resource::RLIMIT_SIGPENDING, Resource::RLIMIT_MSGQUEUE] {
        let _ = setrlimit(resource, RLIM_INFINITY, RLIM_INFINITY);
    }
    go_on(unshare(CloneFlags::CLONE_NEWUSER));
    go_on(unshare(SHARED));
    process::exit(0)
}

/// Takes the holder's word of what it did.
fn heed(holder: &mut UnixStream) -> io::Result<()> {
    let mut said = [0; 4];
    holder.read_exact(&mut said)?;
    match i32::from_ne_bytes(said) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// In the pod's new namespaces: sets them up, and keeps them.
fn furnish(sysctls: &[(String, String)], users: Option<&Users>) -> io::Result<()> {
    crate::sys::loopback_up()?;
    for (key, value) in sysctls {
        let write = || crate::configure::write_sysctl(key, value);
        // Those of ipc have an owner, and heed nobody's power but his (ipc/ipc_sysctl.c).
        let written = match users.filter(|_| crate::configure::is_ipc(key)) {
            None => write(),
            Some(users) => as_user(users.root(), write),
        };
        written.map_err(|e| io::Error::new(e.kind(), format!("set sysctl {key} to {value:?}: {e}")))?;
    }
    for name in ["net", "ipc", "uts"] {
        keep(Path::new("/proc/thread-self/ns").join(name), &Path::new(NAMESPACE_DIR).join(name))?;
    }
    Ok(())
}

/// Does something as another user of the guest. Called where there is one thread.
fn as_user(user: (u32, u32), work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    setegid(Gid::from_raw(user.1))?;
    seteuid(Uid::from_raw(user.0))?;
    let done = work();
    seteuid(Uid::from_raw(0))?;
    setegid(Gid::from_raw(0))?;
    done
}

/// Makes the namespace of processes that containers share, and in it the process that holds it open: a
/// namespace of processes lives as long as its first one, which also takes those whose parents have ended.
///
/// Called in a worker of the launcher, which has one thread and is about to end.
pub(crate) fn create_pid() -> io::Result<()> {
    let path = pid();
    if path.exists() {
        return Ok(());
    }
    let (mut ours, mut theirs) = UnixStream::pair()?;
    match crate::sys::fork_single_threaded()? {
        ForkResult::Child => {
            drop(ours);
            let said = match fork_first() {
                Ok(first) => first,
                Err(e) => -e.raw_os_error().unwrap_or(libc::EIO),
            };
            let _ = theirs.write_all(&said.to_ne_bytes());
            process::exit(0)
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            let mut said = [0; 4];
            let told = ours.read_exact(&mut said);
            let _ = waitpid(child, None);
            told?;
            match i32::from_ne_bytes(said) {
                first if first > 0 => keep(format!("/proc/{first}/ns/pid").into(), &path),
                errno => Err(io::Error::from_raw_os_error(-errno)),
            }
        }
    }
}

/// Makes a namespace of processes with its first process, and answers the pid of that. The pod's user namespace, where
/// there is one, owns it.
fn fork_first() -> io::Result<i32> {
    match File::open(users()) {
        Ok(users) => {
            setns(users, CloneFlags::CLONE_NEWUSER)?;
            become_root()?;
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    unshare(CloneFlags::CLONE_NEWPID)?;
    match crate::sys::fork_single_threaded()? {
        ForkResult::Child => hold(),
        ForkResult::Parent { child } => Ok(child.as_raw()),
    }
}

/// Who has entered a user namespace is nobody in it at first.
pub(crate) fn become_root() -> nix::Result<()> {
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}

/// The first process of the shared namespace, as a pod's pause container would be.
fn hold() -> ! {
    crate::sys::set_name(c"pause");
    crate::sys::close_all();
    // The kernel reaps what it adopts, and signals from within do nothing to a first process without handlers.
    crate::sys::ignore_children();
    // Containers see this process in /proc: its root is the guest's.
    crate::sys::forbid_tracing();
    loop {
        nix::unistd::pause();
    }
}

/// Keeps a namespace by a bind mount at `to`.
fn keep(from: PathBuf, to: &Path) -> io::Result<()> {
    fs::write(to, "")?;
    mount(Some(&from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).inspect_err(|_| {
        let _ = fs::remove_file(to);
    })?;
    Ok(())
}
