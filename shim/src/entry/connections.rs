//! Connections of containerd: only its own user's are let in, and it is known when the last has gone.
//! Knows sockets; does not know what is said over them.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use containerd_shim_protos::ttrpc::r#async::transport::Listener;
use futures::StreamExt;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::watch,
};
use tracing::warn;

/// How many connections are open.
#[derive(Clone, Debug, Default)]
pub(super) struct Connections(Arc<watch::Sender<usize>>);

impl Connections {
    /// Resolves when there is none.
    pub(super) async fn gone(&self) {
        // The sender is here: it cannot be gone.
        let _ = self.0.subscribe().wait_for(|open| *open == 0).await;
    }

    /// What comes to `listener`. Connections from other users are closed at once (contract, S8).
    pub(super) fn of(&self, listener: UnixListener) -> Listener {
        let ours = nix::unistd::geteuid().as_raw();
        let accepted = futures::stream::unfold(listener, |listener| async {
            let stream = listener.accept().await.map(|(stream, _)| stream);
            Some((stream, listener))
        });
        let allowed = accepted.filter(move |stream| {
            let allowed = match stream {
                Ok(stream) => allowed(stream, ours),
                Err(_) => true,
            };
            futures::future::ready(allowed)
        });
        let counted = self.clone();
        Listener::new(allowed.map(move |stream| stream.map(|stream| Counted::new(stream, counted.clone()))))
    }
}

fn allowed(stream: &UnixStream, ours: u32) -> bool {
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == ours => true,
        Ok(peer) => {
            warn!(uid = peer.uid(), "connection of another user refused");
            false
        }
        Err(error) => {
            warn!(%error, "connection of an unknown user refused");
            false
        }
    }
}

/// A connection that is counted while it is open.
struct Counted {
    stream: UnixStream,
    connections: Connections,
}

impl Counted {
    fn new(stream: UnixStream, connections: Connections) -> Self {
        connections.0.send_modify(|open| *open += 1);
        Self { stream, connections }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.connections.0.send_modify(|open| *open -= 1);
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn the_last_connection_that_goes_is_noticed() {
        let connections = Connections::default();
        connections.gone().await;
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for held in [&mut first, &mut second] {
            let (stream, peer) = UnixStream::pair().unwrap();
            held.push((Counted::new(stream, connections.clone()), peer));
        }
        drop(first);
        let mut gone = std::pin::pin!(connections.gone());
        let early = tokio::time::timeout(Duration::from_millis(50), &mut gone).await;
        assert!(early.is_err(), "one is still open");
        drop(second);
        gone.await;
    }
}
