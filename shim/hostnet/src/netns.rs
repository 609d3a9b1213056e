//! A network namespace: opened or made, entered by threads that do one thing there and end.
//! Knows nothing of what is in it.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use bulkhead_netlink::Socket;
use nix::sched::{CloneFlags, setns, unshare};

use crate::{NetError, error::Doing};

/// A network namespace. It lives as long as this does, or anything else that is in it.
#[derive(Clone, Debug)]
pub struct Netns {
    file: Arc<File>,
    name: Option<PathBuf>,
}

impl Netns {
    /// The namespace at `path`.
    ///
    /// # Errors
    /// [`NetError::Open`]: there is nothing, or something else.
    pub fn open(path: &Path) -> Result<Self, NetError> {
        let failed = |source| NetError::Open { path: path.to_owned(), source };
        // Not blocking: the path is a user's, and may lead to a fifo.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        let netns = Self { file: Arc::new(file), name: Some(path.to_owned()) };
        // The cheapest proof that it is one: a thread goes there.
        netns.within(|| ()).map_err(|error| match error {
            NetError::System { source, .. } if source.raw_os_error() == Some(libc::EINVAL) => {
                failed(io::Error::new(io::ErrorKind::InvalidInput, "it is no network namespace"))
            }
            NetError::System { source, .. } => failed(source),
            other => other,
        })?;
        Ok(netns)
    }

    /// A new, empty one.
    ///
    /// # Errors
    /// The system makes none.
    pub fn create() -> Result<Self, NetError> {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        };
        let file = on_a_thread(make)?.doing(|| "make a network namespace".into())?;
        Ok(Self { file: Arc::new(file), name: None })
    }

    /// Fails for the namespace of this process or of the host's first one: what is done to a pod's links must
    /// never be done to those.
    ///
    /// # Errors
    /// [`NetError::Host`].
    pub fn check_not_hosts(&self) -> Result<(), NetError> {
        let of = |path: &str| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
        let ours = self.identity()?;
        if [of("/proc/self/ns/net"), of("/proc/1/ns/net")].contains(&Some(ours)) {
            return Err(NetError::Host(self.name.clone().unwrap_or_default()));
        }
        Ok(())
    }

    /// Device and inode, which name a namespace while it lives.
    ///
    /// # Errors
    /// None that was ever seen.
    pub fn identity(&self) -> Result<(u64, u64), NetError> {
        let metadata = self.file.metadata().doing(|| "look at a network namespace".into())?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Where it was opened; `None` for one that was made here and has no name.
    pub fn name(&self) -> Option<&Path> {
        self.name.as_deref()
    }

    /// A path that leads to it within this process while this lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A path by which another program finds it while this test runs.
    #[cfg(test)]
    pub(crate) fn path_for_others(&self) -> String {
        self.path().display().to_string().replace("self", &std::process::id().to_string())
    }

    /// Opens a socket that speaks with this namespace, from wherever it is used.
    pub(crate) fn socket(&self) -> Result<Socket, NetError> {
        self.within(Socket::open)?.doing(|| "open a netlink socket".into())
    }

    /// As [`crate::open_tap`], in this namespace.
    ///
    /// # Errors
    /// As of [`crate::open_tap`].
    pub fn open_tap(&self, name: &str) -> Result<OwnedFd, NetError> {
        self.within(|| crate::open_tap(name))?
    }

    /// Does something on a thread that is in this namespace.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        let file = &self.file;
        on_a_thread(|| setns(file, CloneFlags::CLONE_NEWNET).map(|()| work()))?
            .doing(|| "enter a network namespace".into())
    }
}

/// A thread's network namespace is its own; this one's goes with it.
fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).stack_size(256 << 10);
        let thread = thread.spawn_scoped(scope, work).doing(|| "start a thread".into())?;
        let ended = || NetError::System {
            what: "work in a network namespace".into(),
            source: io::Error::other("the thread that does it ended"),
        };
        thread.join().map_err(|_| ended())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_namespace_is_named() {
        let text = Netns::open(Path::new("/no/such/netns")).unwrap_err().to_string();
        assert!(text.starts_with("cannot open the network namespace /no/such/netns: No such file"), "{text}");
        let text = Netns::open(Path::new("/proc/self/status")).unwrap_err().to_string();
        assert!(text.contains("/proc/self/status") && text.contains("no network namespace"), "{text}");
        let text = Netns::open(Path::new("/proc/self/ns/uts")).unwrap_err().to_string();
        assert!(text.contains("no network namespace"), "{text}");
        let host = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
        assert!(host.check_not_hosts().unwrap_err().to_string().contains("of the host"));
    }

    #[test]
    fn a_new_one_is_another_one() {
        let (one, other) = (Netns::create().unwrap(), Netns::create().unwrap());
        one.check_not_hosts().unwrap();
        assert_ne!(one.identity().unwrap(), other.identity().unwrap());
        assert_eq!(Netns::open(&one.path()).unwrap().identity().unwrap(), one.identity().unwrap());
    }
}
