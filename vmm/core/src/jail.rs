//! The wall around this process: after [`enter`] it is nobody, sees nothing, and can gain nothing.
//! Knows the host's namespaces and credentials; knows nothing of machines.
//!
//! | what | how |
//! |---|---|
//! | own uid and gid, never 0, no other groups | setgroups, setresgid, setresuid |
//! | empty root directory, read-only | a tmpfs of no size, pivot_root, the old root detached |
//! | own mount, ipc, uts and cgroup namespaces | unshare; the pid namespace is made by who starts us |
//! | own net namespace, or that of the pod and no way to make a socket | unshare, or made by who starts us |
//! | own user namespace without any mapping | unshare as the new uid, where the host allows it |
//! | no capability, none to be had | bounding set emptied, capset, no_new_privs |
//! | bounded descriptors, no core dump | setrlimit |
//! | dies with its parent | PR_SET_PDEATHSIG again, for a change of uid clears it |
//!
//! What comes after is the filter of system calls (`seccomp`), a thread at a time.

use std::{io, path::Path};

use bulkhead_vmm_spec::wire::Identity;
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::resource::{Resource, setrlimit},
    unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid},
};

use crate::sys;

/// Descriptors that a machine of many devices and streams may hold.
const MAX_DESCRIPTORS: u64 = 4096;
/// Any directory that every host has; the empty root is mounted over it, in our own namespace only.
const PLACE: &str = "/proc";

/// Why the wall does not stand.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JailError {
    /// Nobody runs a machine as root.
    #[error("a machine must not run as root: uid {0}, gid {1}")]
    Root(u32, u32),
    /// The system refused a step.
    #[error("cannot {what}: {source}; start it as root, outside of a container that forbids this")]
    Step {
        /// The step.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Names the step in an error.
fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> JailError {
    move |error| JailError::Step { what, source: error.into() }
}

/// Locks this process, which must still have one thread only, into the jail.
///
/// # Errors
/// Any step that fails: there is no half a jail, the process must end.
pub(crate) fn enter(identity: Identity) -> Result<(), JailError> {
    let Identity { uid, gid, in_pod_network } = identity;
    if uid == 0 || gid == 0 {
        return Err(JailError::Root(uid, gid));
    }
    limit()?;
    let mut namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    if !in_pod_network {
        namespaces |= CloneFlags::CLONE_NEWNET;
    }
    unshare(namespaces).map_err(step("make namespaces"))?;
    empty_root()?;
    empty_bounding_set()?;
    setgroups(&[]).map_err(step("leave all groups"))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid).map_err(step("change the group"))?;
    setresuid(uid, uid, uid).map_err(step("change the user"))?;
    // Where the host forbids it to users, the rest of the wall stands without it.
    if unshare(CloneFlags::CLONE_NEWUSER).is_ok() {
        // It begins with every capability, over nothing but itself.
        empty_bounding_set()?;
    }
    sys::drop_capabilities().map_err(step("drop capabilities"))?;
    sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map_err(step("give up new privileges"))?;
    sys::prctl(libc::PR_SET_DUMPABLE, 0).map_err(step("refuse to be traced"))?;
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong).map_err(step("die with the parent"))
}

fn limit() -> Result<(), JailError> {
    for (resource, value) in [(Resource::RLIMIT_NOFILE, MAX_DESCRIPTORS), (Resource::RLIMIT_CORE, 0)] {
        match setrlimit(resource, value, value) {
            // The host's own limit is lower: that one holds then.
            Ok(()) | Err(Errno::EPERM) => {}
            Err(error) => return Err(step("set a limit")(error)),
        }
    }
    Ok(())
}

/// Makes an empty directory the root of this process.
fn empty_root() -> Result<(), JailError> {
    let nothing = None::<&Path>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(nothing, "/", nothing, private, nothing).map_err(step("keep mounts to itself"))?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID;
    let options = Some("size=4k,nr_inodes=1,mode=555");
    mount(Some("none"), PLACE, Some("tmpfs"), flags, options).map_err(step("make an empty root"))?;
    chdir(PLACE).map_err(step("enter the empty root"))?;
    // Both the same: the old root ends up mounted over the new one, and is taken off (pivot_root(2)).
    pivot_root(".", ".").map_err(step("change the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("leave the old root"))?;
    chdir("/").map_err(step("enter the new root"))?;
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(nothing, "/", nothing, flags, nothing).map_err(step("write-protect the root"))
}

/// Takes every capability out of the set from which programs could regain them.
fn empty_bounding_set() -> Result<(), JailError> {
    for capability in 0.. {
        match sys::prctl(libc::PR_CAPBSET_DROP, capability) {
            Ok(()) => {}
            // Past the last one that this kernel knows.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
            Err(error) => return Err(step("empty the bounding set")(error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
