//! How agent, zygote and workers talk: descriptors beside bytes, and frames of JSON.
//! Knows bytes and descriptors; must not know what is asked.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use serde::{Serialize, de::DeserializeOwned};

/// Most descriptors in one message: the worker's socket and three streams.
const FDS_MAX: usize = 4;

/// Longest frame in bytes. A specification is a few hundred KiB at worst.
const FRAME_MAX: usize = 16 << 20;

/// Sends one byte with `fds` beside it.
pub(super) fn send_fds(socket: BorrowedFd<'_>, fds: &[RawFd]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &[IoSlice::new(&[fds.len() as u8])],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Receives what [`send_fds`] sent; `None` at the end of the stream.
pub(super) fn recv_fds(socket: BorrowedFd<'_>) -> io::Result<Option<Vec<OwnedFd>>> {
    let mut byte = [0];
    let mut space = nix::cmsg_space!([RawFd; FDS_MAX]);
    let mut iov = [IoSliceMut::new(&mut byte)];
    let message =
        recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            fds.extend(received.into_iter().map(own));
        }
    }
    let (bytes, count) = (message.bytes, byte[0]);
    if bytes == 0 {
        return Ok(None);
    }
    if fds.len() != count as usize {
        return Err(io::Error::other(format!("{count} descriptors announced, {} received", fds.len())));
    }
    Ok(Some(fds))
}

#[allow(unsafe_code)]
pub(super) fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us by SCM_RIGHTS; nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A frame: length in four bytes, big endian, then JSON.
pub(super) fn encode(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, value)?;
    let len = frame.len() - 4;
    if len > FRAME_MAX {
        return Err(io::Error::other(format!("a frame of {len} bytes is longer than {FRAME_MAX}")));
    }
    frame[..4].copy_from_slice(&(len as u32).to_be_bytes());
    Ok(frame)
}

/// Length of the body that follows a frame's header.
pub(super) fn body_len(header: [u8; 4]) -> io::Result<usize> {
    match u32::from_be_bytes(header) as usize {
        len if len <= FRAME_MAX => Ok(len),
        len => Err(io::Error::other(format!("a frame of {len} bytes is longer than {FRAME_MAX}"))),
    }
}

/// Reads one frame.
pub(super) fn read_frame<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<T> {
    let mut header = [0; 4];
    from.read_exact(&mut header)?;
    let mut body = vec![0; body_len(header)?];
    from.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}

/// Writes one frame.
pub(super) fn write_frame(to: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    to.write_all(&encode(value)?)
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsFd, os::unix::net::UnixStream};

    use proptest::prelude::*;

    use super::{super::Reply, *};

    proptest! {
        #[test]
        fn a_frame_survives_the_wire(pid: i32, text: String) {
            for reply in [Reply::Launched { pid }, Reply::Done, Reply::Refused { text }] {
                let frame = encode(&reply).unwrap();
                prop_assert_eq!(read_frame::<Reply>(&mut frame.as_slice()).unwrap(), reply);
            }
        }

        #[test]
        fn any_bytes_are_refused_without_panic(bytes: Vec<u8>) {
            let _ = read_frame::<Reply>(&mut bytes.as_slice());
        }
    }

    #[test]
    fn descriptors_travel_beside_bytes() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut inner, passed) = UnixStream::pair().unwrap();
        send_fds(a.as_fd(), &[passed.as_raw_fd()]).unwrap();
        drop(passed);
        let received = recv_fds(b.as_fd()).unwrap().unwrap();
        let mut received = UnixStream::from(received.into_iter().next().unwrap());
        inner.write_all(b"x").unwrap();
        let mut byte = [0];
        received.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        drop(a);
        assert!(recv_fds(b.as_fd()).unwrap().is_none());
    }
}
