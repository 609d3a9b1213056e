//! What the containers of a pod share besides the network: System V IPC and message queues, host name,
//! /dev/shm, and process ids where a container asks for it.
//! Knows namespaces; which container joins which is written in its specification.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
};

use bulkhead_proto::{NAMESPACE_DIR, SHM_DIR};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::ForkResult,
};

/// Size of the pod's /dev/shm: what containerd's CRI gives a pod, 64 MiB.
const SHM_OPTIONS: &str = "mode=1777,size=65536k";

/// Path of the namespace of processes that containers of the pod may share.
pub(crate) fn pid() -> PathBuf {
    Path::new(NAMESPACE_DIR).join("pid")
}

/// Makes the pod's ipc and uts namespaces, with `sysctls` written there, and its /dev/shm.
///
/// The work is done on a thread that ends: a namespace belongs to a thread, and the agent's must not change.
/// The host name is that of the guest at the time of the call.
pub(crate) fn create(sysctls: Vec<(String, String)>) -> io::Result<()> {
    fs::create_dir_all(SHM_DIR)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("shm"), SHM_DIR, Some("tmpfs"), flags, Some(SHM_OPTIONS))?;
    thread::Builder::new()
        .name("podns".into())
        .stack_size(256 << 10)
        .spawn(move || -> io::Result<()> {
            unshare(CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
            for (key, value) in sysctls {
                crate::configure::write_sysctl(&key, &value)?;
            }
            for name in ["ipc", "uts"] {
                keep(Path::new("/proc/thread-self/ns").join(name), &Path::new(NAMESPACE_DIR).join(name))?;
            }
            Ok(())
        })?
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
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
    unshare(CloneFlags::CLONE_NEWPID)?;
    match crate::sys::fork_single_threaded()? {
        ForkResult::Child => hold(),
        ForkResult::Parent { child } => keep(format!("/proc/{child}/ns/pid").into(), &path),
    }
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
