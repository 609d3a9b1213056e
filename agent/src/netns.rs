//! The network namespace of the pod: made once, joined by every container.
//! Knows namespaces; links, addresses and routes are set by `net`.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    thread,
};

use bulkhead_netlink::Socket;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
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
    on_a_thread(move || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        crate::sys::loopback_up()?;
        fs::write(&path, "")?;
        mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        for (key, value) in sysctls {
            crate::configure::write_sysctl(&key, &value)?;
        }
        Ok(())
    })
}

/// Opens a socket to rtnetlink that speaks with the namespace `netns`, from wherever it is used.
pub(crate) fn socket_in(netns: File) -> io::Result<Socket> {
    within(netns, || Ok(Socket::open()?))
}

/// Does something in the namespace `netns`.
pub(crate) fn within<T: Send + 'static>(
    netns: File,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    on_a_thread(move || {
        setns(&netns, CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let thread = thread::Builder::new().name("netns".into()).stack_size(256 << 10).spawn(work)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}
