//! Our end of the control socket: packets with descriptors.
//! Knows bytes; what the messages mean is others'.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use bulkhead_vmm_spec::wire::{MAX_MESSAGE, Message};
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// A connected SOCK_SEQPACKET socket.
pub(super) struct Channel(AsyncFd<OwnedFd>);

impl Channel {
    /// Takes over a socket.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self(sys::read_write(socket)?))
    }

    /// Sends one message with descriptors, of which the receiver gets copies.
    pub(super) async fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let text = serde_json::to_vec(message).map_err(io::Error::other)?;
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        loop {
            let mut ready = self.0.writable().await?;
            let sent = ready.try_io(|socket| {
                let rights = [ControlMessage::ScmRights(&fds)];
                let control = if fds.is_empty() { &[][..] } else { &rights[..] };
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                Ok(sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&text)], control, flags, None)?)
            });
            match sent {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(sent) => return sent.map(drop),
                Err(_) => {}
            }
        }
    }

    /// Waits for the next message. `None` at the end: the VMM is gone.
    pub(super) async fn receive(&self) -> io::Result<Option<Message>> {
        let mut bytes = vec![0; MAX_MESSAGE];
        loop {
            let mut ready = self.0.readable().await?;
            let received = ready.try_io(|socket| {
                let mut parts = [IoSliceMut::new(&mut bytes)];
                // The VMM sends no descriptors; what it would attach is refused by offering no room.
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
                let received = recvmsg::<()>(socket.as_raw_fd(), &mut parts, None, flags)?;
                Ok((received.bytes, received.flags.contains(MsgFlags::MSG_TRUNC)))
            });
            match received {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Ok(Err(error)) => return Err(error),
                Ok(Ok((0, _))) => return Ok(None),
                Ok(Ok((len, false))) => {
                    return serde_json::from_slice(&bytes[..len])
                        .map(Some)
                        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e));
                }
                Ok(Ok((_, true))) => return Err(io::Error::new(io::ErrorKind::InvalidData, "cut short")),
                Err(_) => {}
            }
        }
    }
}
