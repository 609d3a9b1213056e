//! A connection that the guest brings as two streams, and a socket of the host at its other end.
//! Knows bytes and sockets; does not know who has connected to what.
//!
//! ```text
//!  socket of the host ──▶ stream to the guest      ends with what the socket gives, or when the guest takes no more
//!  socket of the host ◀── stream from the guest    ends with the guest's total, or when the socket takes no more
//! ```
//!
//! A half that ends does not end the other. That a peer has closed both of its halves is seen even if nobody writes: a
//! server that waits for its client's end, or a client for its server's, must see it.

use std::{io, os::fd::AsFd};

use bulkhead_proto::stream::Token;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf, pipe},
    },
    sync::{oneshot, watch},
    time::timeout,
};
use tracing::debug;

use super::{CHUNK, End, Expected, Hub, PREFACE, StdioError, draw};
use crate::metrics::counters::OpenStream;

/// A stream that the guest has brought; it counts as open as long as this lives.
pub(super) type Brought = (UnixStream, OpenStream);

/// The streams of a connection, which the guest may bring until this is dropped.
pub(crate) struct Connection {
    hub: Hub,
    tokens: [Token; 2],
    streams: [oneshot::Receiver<Brought>; 2],
    /// What the guest says of the end of each.
    totals: [watch::Receiver<Option<u64>>; 2],
}

impl Hub {
    /// Expects the guest's ends of a connection.
    pub(crate) fn expect_connection(&self) -> Result<Connection, StdioError> {
        let tokens = [draw()?, draw()?];
        let mut table = self.table();
        let mut expect = |token: Token| {
            let (give, stream) = oneshot::channel();
            let (tell, total) = watch::channel(None);
            table.totals.insert(token, tell);
            let expected = Expected { key: None, end: End::Whole(give), outputs: Default::default() };
            table.expected.insert(token, expected);
            (stream, total)
        };
        let ((to, takes_no_more), (from, total)) = (expect(tokens[0]), expect(tokens[1]));
        drop(table);
        let (streams, totals) = ([to, from], [takes_no_more, total]);
        Ok(Connection { hub: self.clone(), tokens, streams, totals })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.hub.withdraw(&self.tokens);
    }
}

impl Connection {
    /// The tokens of the stream to the guest and of that from it.
    pub(crate) fn tokens(&self) -> [Token; 2] {
        self.tokens
    }

    /// Moves bytes between the guest and the socket until both halves have ended. `refuse` tells the guest that the
    /// socket takes no more.
    pub(crate) async fn carry(mut self, peer: UnixStream, refuse: impl Future<Output = ()>) {
        let [to, from] = &mut self.streams;
        let Ok((Ok(to), Ok(from))) = timeout(PREFACE, async { (to.await, from.await) }).await else {
            return debug!("the guest has not brought the streams of a connection");
        };
        let closed = match Closed::watch(&peer) {
            Ok(closed) => closed,
            Err(error) => return debug!(%error, "a connection cannot be watched"),
        };
        let (reader, writer) = peer.into_split();
        let [takes_no_more, total] = &mut self.totals;
        let from_guest = async {
            // Until it has been told: it may have no room to be told by the end of the stream.
            let mut stream = from.0;
            if !from_guest(&mut stream, writer, total, &closed).await {
                refuse.await;
            }
        };
        tokio::join!(to_guest(reader, to.0, takes_no_more), from_guest);
    }
}

/// Nothing comes on the stream but its end.
async fn to_guest(
    mut from: OwnedReadHalf,
    stream: UnixStream,
    takes_no_more: &mut watch::Receiver<Option<u64>>,
) {
    let (mut end, mut to) = stream.into_split();
    let mut nothing = [0];
    let copy = async {
        let mut buffer = vec![0; CHUNK];
        while let Ok(count @ 1..) = from.read(&mut buffer).await
            && to.write_all(&buffer[..count]).await.is_ok()
        {}
        let _ = to.shutdown().await;
    };
    tokio::select! {
        () = copy => {}
        _ = takes_no_more.wait_for(Option::is_some) => {}
        _ = end.read(&mut nothing) => {}
    }
}

/// Answers whether all was taken that came.
async fn from_guest(
    stream: &mut UnixStream,
    mut to: OwnedWriteHalf,
    total: &mut watch::Receiver<Option<u64>>,
    closed: &Closed,
) -> bool {
    let copy = async {
        let (mut buffer, mut copied, mut may_change) = (vec![0; CHUNK], 0u64, true);
        while total.borrow_and_update().is_none_or(|total| copied < total) {
            tokio::select! {
                read = stream.read(&mut buffer) => match read {
                    Ok(count @ 1..) if to.write_all(&buffer[..count]).await.is_ok() => copied += count as u64,
                    Ok(1..) => return false,
                    Ok(0) | Err(_) => break,
                },
                changed = total.changed(), if may_change => may_change = changed.is_ok(),
            }
        }
        true
    };
    let all = tokio::select! {
        all = copy => all,
        () = closed.wait() => false,
    };
    let _ = to.shutdown().await;
    all
}

/// Tells when a peer has closed both of its halves.
struct Closed(pipe::Sender);

impl Closed {
    /// By a descriptor of its own, on which the kernel tells no other end: a half-close is one of reading, and this is
    /// registered for writing. (epoll_ctl(2): EPOLLHUP comes unasked, EPOLLRDHUP does not.)
    fn watch(peer: &UnixStream) -> io::Result<Self> {
        // Used as a pipe is, of which the runtime has the type that takes any descriptor.
        pipe::Sender::from_owned_fd_unchecked(peer.as_fd().try_clone_to_owned()?).map(Self)
    }

    async fn wait(&self) {
        // Fails only without a runtime.
        let _ = self.0.ready(Interest::READABLE).await;
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use bulkhead_proto::stream::encode_stream;
    use tokio::{net::UnixListener, sync::mpsc, task::JoinHandle};

    use super::*;
    use crate::metrics::counters::Counters;

    struct Ends {
        hub: Hub,
        /// The server on the host.
        server: UnixStream,
        /// The guest's ends.
        to: UnixStream,
        from: UnixStream,
        tokens: [Token; 2],
        /// The guest is told that the server takes no more.
        refused: oneshot::Receiver<()>,
        carried: JoinHandle<()>,
        _tmp: tempfile::TempDir,
    }

    /// A connection whose streams the guest has brought.
    async fn connected() -> Ends {
        let tmp = tempfile::tempdir().unwrap();
        let (inputs, _) = mpsc::unbounded_channel();
        let hub = Hub::new(inputs, Arc::<Counters>::default());
        let path = tmp.path().join("streams");
        tokio::spawn(hub.clone().serve(UnixListener::bind(&path).unwrap()));
        let connection = hub.expect_connection().unwrap();
        let tokens = connection.tokens();
        let bring = async |token: &Token| {
            let mut stream = UnixStream::connect(&path).await.unwrap();
            stream.write_all(&encode_stream(token)).await.unwrap();
            stream
        };
        let (to, from) = (bring(&tokens[0]).await, bring(&tokens[1]).await);
        let (server, peer) = UnixStream::pair().unwrap();
        let (refuse, refused) = oneshot::channel();
        let carried = tokio::spawn(connection.carry(peer, async { refuse.send(()).unwrap() }));
        Ends { hub, server, to, from, tokens, refused, carried, _tmp: tmp }
    }

    /// What comes until the end.
    async fn all(stream: &mut (impl AsyncReadExt + Unpin)) -> String {
        let mut text = String::new();
        in_time(stream.read_to_string(&mut text)).await.unwrap();
        text
    }

    async fn in_time<T>(what: impl Future<Output = T>) -> T {
        timeout(Duration::from_secs(10), what).await.expect("it does not come")
    }

    #[tokio::test]
    async fn each_half_ends_by_itself() {
        let mut ends = connected().await;
        ends.from.write_all(b"question").await.unwrap();
        ends.hub.ended(&ends.tokens[1], 8);
        assert_eq!(all(&mut ends.server).await, "question");
        ends.server.write_all(b"answer").await.unwrap();
        drop(ends.server);
        assert_eq!(all(&mut ends.to).await, "answer");
        assert_eq!(all(&mut ends.from).await, "", "the shim closes");
        in_time(ends.carried).await.unwrap();
        ends.refused.await.unwrap_err();
        assert!(ends.hub.table().totals.is_empty());
    }

    #[tokio::test]
    async fn the_other_half_may_end_first() {
        let mut ends = connected().await;
        ends.server.write_all(b"greeting").await.unwrap();
        ends.server.shutdown().await.unwrap();
        assert_eq!(all(&mut ends.to).await, "greeting");
        ends.from.write_all(b"reply").await.unwrap();
        ends.hub.ended(&ends.tokens[1], 5);
        assert_eq!(all(&mut ends.server).await, "reply");
        in_time(ends.carried).await.unwrap();
    }

    #[tokio::test]
    async fn a_server_that_closes_is_seen_though_nobody_writes() {
        let mut ends = connected().await;
        drop(ends.server);
        assert_eq!(all(&mut ends.to).await, "");
        assert_eq!(all(&mut ends.from).await, "");
        in_time(ends.carried).await.unwrap();
        in_time(ends.refused).await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_closes_is_seen_by_a_silent_server() {
        let mut ends = connected().await;
        for token in ends.tokens {
            ends.hub.ended(&token, 0);
        }
        assert_eq!(all(&mut ends.server).await, "");
        in_time(ends.carried).await.unwrap();
        // Wholly closed, not only half.
        ends.server.write_all(b"x").await.unwrap_err();
    }

    #[tokio::test]
    async fn a_guest_that_goes_ends_it() {
        let mut ends = connected().await;
        drop((ends.to, ends.from));
        assert_eq!(all(&mut ends.server).await, "");
        in_time(ends.carried).await.unwrap();
    }

    #[tokio::test]
    async fn streams_that_are_not_brought_leave_nothing() {
        let (inputs, _) = mpsc::unbounded_channel();
        let hub = Hub::new(inputs, Arc::<Counters>::default());
        let connection = hub.expect_connection().unwrap();
        assert_eq!(hub.table().expected.len(), 2);
        drop(connection);
        assert!(hub.table().expected.is_empty() && hub.table().totals.is_empty());
    }
}
