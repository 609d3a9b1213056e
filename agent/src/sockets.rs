//! Sockets of the guest that stand for sockets of the host, and the connections of containers to them.
//! Knows sockets, mounts and the streams of a process; must not know what is on the host.
//!
//! A unix socket's inode is seen through the share, but who listens there does so in the host's kernel. So the container
//! sees a socket of the guest in its place:
//! ```text
//! /run/bulkhead/sockets/<container>/<n>          the n-th socket; in the place of one that is mounted itself
//! /run/bulkhead/sockets/<container>/volume-<n>   a folder of the share with sockets bound over those in it; in the
//!                                                place of a folder that is mounted
//! ```
//! For each that connects the host is asked (Connect); what it answers (Connected) is closed, or carried.

use std::{
    collections::HashMap,
    fs, io,
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::FileTypeExt, net::UnixListener as StdListener},
    },
    path::{Component, Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bulkhead_proto::agent::{ConnectedRequest, HostSocket, Stdio};
use nix::{
    fcntl::{OFlag, openat},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::Mode,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest, unix::AsyncFd},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};

use crate::{
    error::{Doing, Error, Result},
    events::Events,
    stdio::{self, BUFFER, Stream},
    volumes::{self, by_descriptor, hold},
};

/// Where the sockets lie.
const DIR: &str = "/run/bulkhead/sockets";

/// The next connection of the guest.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// The sockets of one container. When this is dropped they are removed, and its connections are closed.
pub(crate) struct Sockets {
    dir: PathBuf,
    /// What is to be mounted in place of what.
    shown: Vec<(PathBuf, Shown)>,
    calls: Arc<Calls>,
    listeners: JoinSet<()>,
}

/// What is mounted in place of something of the share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    /// Where it is.
    pub(crate) place: PathBuf,
    /// Whether it is a folder on which sockets are mounted.
    pub(crate) is_volume: bool,
}

/// The connections of one container.
struct Calls {
    container: String,
    events: Events,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Those for which the host has not answered yet.
    waiting: HashMap<u64, Call>,
    /// Those that are carried, each with what tells that the host's socket takes no more.
    open: HashMap<u64, Arc<Notify>>,
    carried: JoinSet<()>,
}

struct Call {
    peer: UnixStream,
    /// One of the connections that the pod may have.
    place: OwnedSemaphorePermit,
}

impl Sockets {
    /// Makes the sockets of the container `id`, which may have connections as long as there is room. One in a folder that
    /// cannot be shown is left out: then the container sees the host's, to which nobody can connect.
    pub(crate) fn make(
        id: &str,
        wanted: &[HostSocket],
        events: &Events,
        room: &Arc<Semaphore>,
    ) -> Result<Self> {
        let calls =
            Arc::new(Calls { container: id.to_owned(), events: events.clone(), state: Mutex::default() });
        let dir = Path::new(DIR).join(id);
        let mut sockets = Self { dir, shown: Vec::new(), calls, listeners: JoinSet::new() };
        for (number, socket) in (0..).zip(wanted) {
            let added = sockets.add(number, socket, room);
            if socket.below.is_empty() {
                added.doing(|| format!("make a socket for container {id}"))?;
            } else if let Err(error) = added {
                let (source, below) = (&socket.source, &socket.below);
                tracing::warn!(%error, "container {id}: nobody can connect to {below} in {source}");
            }
        }
        Ok(sockets)
    }

    /// What is to be mounted in place of `source`, if there is something.
    pub(crate) fn of(&self, source: &Path) -> Option<&Shown> {
        self.shown.iter().find(|(of, _)| of == source).map(|(_, shown)| shown)
    }

    fn add(&mut self, number: u32, wanted: &HostSocket, room: &Arc<Semaphore>) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let source = Path::new(&wanted.source);
        let place = self.dir.join(number.to_string());
        let listener;
        if wanted.below.is_empty() {
            listener = listen(&self.dir, number)?;
            volumes::own(&place, wanted.uid, wanted.gid, wanted.mode)?;
            self.shown.push((source.into(), Shown { place, is_volume: false }));
        } else {
            let original = find(&self.volume(source)?, Path::new(&wanted.below))?;
            let facts = fs::metadata(by_descriptor(&original))?;
            if !facts.file_type().is_socket() {
                return Err(io::Error::other("it is no socket any more"));
            }
            listener = listen(&self.dir, number)?;
            volumes::like(&place, &facts)?;
            bind(&place, &by_descriptor(&original), MsFlags::empty())?;
        }
        self.listeners.spawn(accept(listener, number, Arc::clone(&self.calls), Arc::clone(room)));
        Ok(())
    }

    /// Where a folder of the share is mounted, for sockets to be mounted on it.
    fn volume(&mut self, source: &Path) -> io::Result<PathBuf> {
        if let Some(shown) = self.of(source) {
            return Ok(shown.place.clone());
        }
        let place = self.dir.join(format!("volume-{}", self.shown.len()));
        fs::create_dir(&place)?;
        bind(source, &place, MsFlags::MS_REC)?;
        self.shown.push((source.into(), Shown { place: place.clone(), is_volume: true }));
        Ok(place)
    }

    /// The host's answer to a connection; or that it takes no more of one that is carried.
    pub(crate) async fn connected(&self, request: &ConnectedRequest) -> Result<()> {
        let connection = request.connection;
        let gone = || Error::NotFound(format!("container {} has no such connection", self.calls.container));
        let none = request.in_token.is_empty() && request.out_token.is_empty();
        let call = {
            let mut state = self.calls.state();
            match state.open.get(&connection) {
                Some(refused) if none => {
                    refused.notify_one();
                    return Ok(());
                }
                _ => state.waiting.remove(&connection).ok_or_else(gone)?,
            }
        };
        if none {
            // Closed by the drop of the call.
            return Ok(());
        }
        let streams = Stdio {
            stdin_token: request.in_token.clone(),
            stdout_token: request.out_token.clone(),
            ..Default::default()
        };
        let both = stdio::dial(&streams).await?.both();
        let both = both.ok_or_else(|| Error::Invalid("a connection needs two streams".into()))?;
        let (calls, refused) = (Arc::clone(&self.calls), Arc::new(Notify::new()));
        let mut state = self.calls.state();
        // Else what has ended would be kept.
        while state.carried.try_join_next().is_some() {}
        state.open.insert(connection, Arc::clone(&refused));
        state.carried.spawn(async move {
            if let Err(error) = carry(call.peer, both, &refused, &calls.events).await {
                tracing::warn!(%error, "a connection to the host cannot be carried");
            }
            calls.state().open.remove(&connection);
            drop(call.place);
        });
        Ok(())
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        self.listeners.abort_all();
        let mut state = self.calls.state();
        state.carried.abort_all();
        state.waiting.clear();
        // Never what is in a folder: where it could not be unmounted that would be the host's.
        for (_, shown) in self.shown.iter().filter(|(_, shown)| shown.is_volume) {
            let removed = umount2(&shown.place, MntFlags::MNT_DETACH).map_err(io::Error::from);
            if let Err(error) = removed.and_then(|()| fs::remove_dir(&shown.place)) {
                tracing::warn!(%error, "cannot remove {}", shown.place.display());
            }
        }
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let _ = fs::remove_file(entry.path());
        }
        match fs::remove_dir(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, "cannot remove {}", self.dir.display());
            }
            _ => {}
        }
    }
}

impl Calls {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has the host asked for each that connects. As long as the pod has as many connections as it may have, one waits here
/// and others in the queue of the socket.
async fn accept(listener: UnixListener, socket: u32, calls: Arc<Calls>, room: Arc<Semaphore>) {
    loop {
        let peer = match listener.accept().await {
            Ok((peer, _)) => peer,
            Err(error) => return tracing::warn!(%error, "connections to the host are not accepted any more"),
        };
        // Not before: a socket that nobody uses must not take the place of one.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        let connection = NEXT.fetch_add(1, Ordering::Relaxed);
        calls.state().waiting.insert(connection, Call { peer, place });
        calls.events.connect(&calls.container, socket, connection);
    }
}

/// Listens at a socket named by its number.
fn listen(dir: &Path, number: u32) -> io::Result<UnixListener> {
    // By its descriptor: the path may be longer than the 107 bytes of unix(7).
    let listener = StdListener::bind(by_descriptor(&hold(dir)?).join(number.to_string()))?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Opens what is below a folder, by names alone: no link leads out of it.
fn find(folder: &Path, below: &Path) -> io::Result<OwnedFd> {
    let mut found = hold(folder)?;
    for part in below.components() {
        let Component::Normal(name) = part else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no path below a folder"));
        };
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        found = openat(&found, name, flags, Mode::empty())?;
    }
    Ok(found)
}

fn bind(source: &Path, target: &Path, more: MsFlags) -> io::Result<()> {
    Ok(mount(Some(source), target, None::<&str>, MsFlags::MS_BIND | more, None::<&str>)?)
}

/// Moves bytes until both halves have ended. One that ends does not end the other.
async fn carry(
    peer: UnixStream,
    (from_host, to_host): (Stream, Stream),
    refused: &Notify,
    events: &Events,
) -> io::Result<()> {
    let end = Closed::watch(&peer)?;
    let (reader, writer) = peer.into_split();
    tokio::join!(send(reader, to_host, refused, events, &end), receive(from_host, writer, events, &end));
    Ok(())
}

/// What the container says, until it has said all, or the host takes no more.
async fn send(mut from: OwnedReadHalf, stream: Stream, refused: &Notify, events: &Events, peer: &Closed) {
    let Stream { token, socket } = stream;
    let (mut end, mut to) = tokio::io::split(socket);
    let copy = async {
        let (mut total, mut buffer) = (0, Vec::with_capacity(BUFFER));
        // At the error of a peer that has closed before it had read everything, all of its own is read.
        while let Ok(1..) = from.read_buf(&mut buffer).await {
            to.write_all(&buffer).await?;
            total += buffer.len() as u64;
            buffer.clear();
        }
        io::Result::Ok(total)
    };
    let mut nothing = [0];
    let sent = tokio::select! {
        sent = copy => sent.ok(),
        // Nothing comes on this stream but its end, which gets lost while the device has no room for more.
        _ = end.read(&mut nothing) => None,
        () = refused.notified() => None,
    };
    match sent {
        Some(total) => {
            events.stream_end(&token, total);
            // The host closes, when it has everything.
            let _ = end.read(&mut nothing).await;
        }
        // Whoever writes on must hear that nobody reads.
        None => peer.refuse_input(),
    }
}

/// What the host says, until it has said all, or the container takes no more.
async fn receive(stream: Stream, mut to: OwnedWriteHalf, events: &Events, peer: &Closed) {
    let Stream { token, mut socket } = stream;
    let (mut buffer, mut total) = (Vec::with_capacity(BUFFER), 0);
    let copy = async {
        loop {
            buffer.clear();
            match socket.read_buf(&mut buffer).await {
                Ok(1..) if to.write_all(&buffer).await.is_ok() => total += buffer.len() as u64,
                Ok(1..) => break false,
                Ok(0) | Err(_) => break true,
            }
        }
    };
    let ended = tokio::select! {
        ended = copy => ended,
        () = peer.wait() => false,
    };
    if !ended {
        // The end of a connection that the guest closes may get lost.
        events.stream_end(&token, total);
    }
    // The writing half is shut down when it is dropped: the peer sees the end, and may go on speaking.
}

/// Tells when a peer has closed both of its halves.
struct Closed(AsyncFd<OwnedFd>);

impl Closed {
    /// By a descriptor of its own, on which the kernel tells no other end: a half-close is one of reading, and this is
    /// registered for writing. (epoll_ctl(2): EPOLLHUP comes unasked, EPOLLRDHUP does not.)
    fn watch(peer: &UnixStream) -> io::Result<Self> {
        crate::sys::register(peer.as_fd().try_clone_to_owned()?, Interest::WRITABLE).map(Self)
    }

    async fn wait(&self) {
        // Fails only without a runtime.
        let _ = self.0.ready(Interest::READABLE).await;
    }

    fn refuse_input(&self) {
        // Fails when the peer has gone, who then writes no more.
        let _ = self
            .0
            .get_ref()
            .try_clone()
            .map(std::os::unix::net::UnixStream::from)
            .and_then(|peer| peer.shutdown(Shutdown::Read));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_is_below_a_folder_is_found_by_names_alone() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        fs::create_dir_all(dir.join("folder/deep")).unwrap();
        let _server = StdListener::bind(dir.join("folder/deep/a.sock")).unwrap();
        let _other = StdListener::bind(dir.join("other")).unwrap();
        symlink("deep", dir.join("folder/link")).unwrap();
        symlink("../other", dir.join("folder/out")).unwrap();
        let is_socket = |below: &str| {
            let found = find(&dir.join("folder"), Path::new(below))?;
            io::Result::Ok(fs::metadata(by_descriptor(&found))?.file_type().is_socket())
        };
        assert!(is_socket("deep/a.sock").unwrap());
        assert!(!is_socket("deep").unwrap());
        for leads_elsewhere in ["link/a.sock", "../other", "/etc/passwd", "deep/none", "deep/../../other"] {
            is_socket(leads_elsewhere).unwrap_err();
        }
        assert!(!is_socket("out").is_ok_and(|socket| socket), "a link is held, not followed");
    }

    #[test]
    fn a_socket_may_have_a_long_path() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("c".repeat(128));
        fs::create_dir(&dir).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = listen(&dir, 7).unwrap();
            assert!(fs::metadata(dir.join("7")).unwrap().file_type().is_socket());
            let path = by_descriptor(&hold(&dir).unwrap()).join("7");
            // The folder's descriptor is closed by now.
            path.metadata().unwrap_err();
            drop(listener);
        });
    }
}
