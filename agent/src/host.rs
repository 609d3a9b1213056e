//! Connections to the host.
//! Knows vsock; must not know what is said.

use std::{
    io,
    os::fd::AsRawFd,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bulkhead_proto::HOST_CID;
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockType, VsockAddr, connect, getsockopt, socket, sockopt::SocketError,
    },
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio_vsock::VsockStream;

use crate::sys;

/// Most bytes that are written at once.
///
/// Found by trial with the guest's Linux 6.12 and vhost-device-vsock 0.3: after writes of more than about
/// 32 KiB a stream stands still for ever, and with this limit it never did.
const WRITE_MAX: usize = 28 << 10;

/// How long the host may take to answer a dial. Linux's own limit of 2 s is too short for a host that starts
/// twenty machines at once; the shim has a deadline for the whole.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to the host.
pub(crate) struct HostStream(VsockStream);

impl HostStream {
    /// Dials a port of the host.
    pub(crate) async fn dial(port: u32) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
        sys::set_connect_timeout(&socket, CONNECT_TIMEOUT)?;
        match connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, port)) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let socket = sys::register(socket, Interest::WRITABLE)?;
        // Writable is what it becomes when it is connected, and when it never will be.
        socket.writable().await?.retain_ready();
        match getsockopt(socket.get_ref(), SocketError)? {
            0 => Ok(Self(VsockStream::from(socket.into_inner()))),
            error => Err(io::Error::from_raw_os_error(error)),
        }
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
