//! The network namespace of the pod: how it is found, and how the agent works in it.
//! Knows that namespace; `podns` makes it, and links, addresses and routes are set by `net`.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    thread,
};

use bulkhead_netlink::Socket;
use nix::sched::{CloneFlags, setns};

/// Where the pod's namespaces are kept by bind mounts.
pub(crate) const DIR: &str = bulkhead_proto::NAMESPACE_DIR;

/// Path by which containers join the pod's network namespace.
pub(crate) fn network() -> PathBuf {
    Path::new(DIR).join("net")
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
