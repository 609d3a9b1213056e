//! The network namespace of the pod: made once, joined by every container.
//! Knows namespaces; addresses and routes come with the network.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Where the pod's namespaces are kept by bind mounts.
pub(crate) const DIR: &str = bulkhead_proto::NAMESPACE_DIR;

/// Path by which containers join the pod's network namespace.
pub(crate) fn network() -> PathBuf {
    Path::new(DIR).join("net")
}

/// Makes the pod's network namespace, with `lo` up in it, and writes `sysctls` there.
///
/// The work is done on a thread that ends: a namespace belongs to a thread, and the agent's must not change.
pub(crate) fn create_network(sysctls: Vec<(String, String)>) -> io::Result<()> {
    let path = network();
    thread::Builder::new()
        .name("netns".into())
        .stack_size(256 << 10)
        .spawn(move || -> io::Result<()> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            crate::sys::loopback_up()?;
            fs::write(&path, "")?;
            mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            for (key, value) in sysctls {
                crate::configure::write_sysctl(&key, &value)?;
            }
            Ok(())
        })?
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}
