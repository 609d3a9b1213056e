//! Sockets of helper programs: handing over one that listens already, and waiting for one to appear.
//! Knows no program.

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};
use tokio::{io::unix::AsyncFd, time::MissedTickBehavior};

use crate::sys;

/// A listening socket, and a connection to it that waits to be accepted.
///
/// A connection needs no accept to be made, so the two ends can go to two programs that start at the
/// same moment: neither waits for the other. The name is gone when this returns.
pub(crate) fn listener_and_client(path: &Path) -> io::Result<(OwnedFd, OwnedFd)> {
    remove(path)?;
    let listener = UnixListener::bind(path)?;
    let client = UnixStream::connect(path);
    remove(path)?;
    Ok((listener.into(), client?.into()))
}

/// Removes a socket's name, if there is one.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Names of sockets that programs make; they are removed with this.
#[derive(Debug, Default)]
pub(crate) struct Names(pub(crate) Vec<PathBuf>);

impl Names {
    /// Removes them now; their makers must be dead.
    pub(crate) fn remove(&self) {
        for path in &self.0 {
            if let Err(error) = remove(path) {
                tracing::warn!(%error, "cannot remove {}", path.display());
            }
        }
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Waits for a program to listen on a path.
pub(crate) struct Awaited {
    path: PathBuf,
    watch: AsyncFd<OwnedFd>,
}

impl Awaited {
    /// Starts to watch; to be called before the program is started. What is at the path is removed.
    pub(crate) fn new(path: &Path) -> io::Result<Self> {
        remove(path)?;
        let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        watch.add_watch(path.parent().unwrap_or(Path::new("/")), AddWatchFlags::IN_CREATE)?;
        let watch = sys::readable(watch.into())?;
        Ok(Self { path: path.to_owned(), watch })
    }

    /// Answers a connection as soon as there can be one. The caller sets the deadline.
    pub(crate) async fn connected(self) -> io::Result<UnixStream> {
        // A socket gets its name by bind(2) and begins to listen by listen(2), its maker's next
        // system call. The name is an event; of the call after it the kernel tells nobody. Only a
        // connection tried in the few microseconds in between is refused, and only then is this used.
        let mut tick = tokio::time::interval(Duration::from_millis(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            match UnixStream::connect(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => self.event().await?,
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    tick.tick().await;
                }
                answer => return answer,
            }
        }
    }

    /// Waits until something was made in the directory, and forgets it.
    async fn event(&self) -> io::Result<()> {
        loop {
            let mut guard = self.watch.readable().await?;
            // What was made does not matter: the connection tells.
            let mut events = [0; 4096];
            match nix::unistd::read(guard.get_inner(), &mut events) {
                Ok(_) => return Ok(()),
                Err(Errno::EAGAIN) => guard.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_is_connected_before_anyone_accepts() {
        use std::io::{Read, Write};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, client) = listener_and_client(&path).unwrap();
        assert!(!path.exists());
        UnixStream::from(client).write_all(b"early").unwrap();
        let mut text = String::new();
        UnixListener::from(listener).accept().unwrap().0.read_to_string(&mut text).unwrap();
        assert_eq!(text, "early");
    }

    #[tokio::test]
    async fn a_socket_made_later_is_found_and_other_files_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let awaited = tokio::spawn(Awaited::new(&path).unwrap().connected());
        tokio::task::yield_now().await;
        std::fs::write(dir.path().join("other"), "").unwrap();
        tokio::task::yield_now().await;
        assert!(!awaited.is_finished());
        let listener = UnixListener::bind(&path).unwrap();
        awaited.await.unwrap().unwrap();
        listener.accept().unwrap();
    }

    #[tokio::test]
    async fn a_socket_that_does_not_listen_yet_is_waited_for() {
        use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let awaited = tokio::spawn(Awaited::new(&path).unwrap().connected());
        let late = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(late.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        assert!(!awaited.is_finished(), "nobody listens yet");
        listen(&late, Backlog::new(1).unwrap()).unwrap();
        awaited.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn what_was_left_at_the_path_is_not_taken_for_the_new_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let stale = UnixListener::bind(&path).unwrap();
        let awaited = Awaited::new(&path).unwrap();
        drop(stale);
        assert!(!path.exists());
        let _fresh = UnixListener::bind(&path).unwrap();
        awaited.connected().await.unwrap();
    }
}
