//! Connections to the host.
//! Knows vsock; must not know what is said.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bulkhead_proto::HOST_CID;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_vsock::{VsockAddr, VsockStream};

/// Most bytes that are written at once.
///
/// Found by trial with the guest's Linux 6.12 and vhost-device-vsock 0.3: after writes of more than about
/// 32 KiB a stream stands still for ever, and with this limit it never did.
const WRITE_MAX: usize = 28 << 10;

/// A connection to the host.
pub(crate) struct HostStream(VsockStream);

impl HostStream {
    /// Dials a port of the host.
    pub(crate) async fn dial(port: u32) -> io::Result<Self> {
        VsockStream::connect(VsockAddr::new(HOST_CID, port)).await.map(Self)
    }
}

impl AsyncRead for HostStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, to)
    }
}

impl AsyncWrite for HostStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let at_once = bytes.len().min(WRITE_MAX);
        Pin::new(&mut self.0).poll_write(cx, &bytes[..at_once])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
