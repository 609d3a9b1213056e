//! The socket to the shim: packets with descriptors, in and out.
//! Knows bytes and messages; what they mean is the machine's.

use std::{
    io::{self, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::Arc,
};

use bulkhead_vmm_spec::wire::{Event, MAX_FDS, MAX_MESSAGE, Message, Slot};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, send};
use serde::de::DeserializeOwned;

use crate::sys;

/// The descriptors of one message; each can be taken once.
#[derive(Debug, Default)]
pub(crate) struct Attached(Vec<Option<OwnedFd>>);

impl Attached {
    /// Takes the descriptor in that slot.
    ///
    /// # Errors
    /// There is none, or it was taken: what names it is in the text.
    pub(crate) fn take(&mut self, slot: Slot, what: &str) -> io::Result<OwnedFd> {
        let found = self.0.get_mut(slot.0).and_then(Option::take);
        found.ok_or_else(|| {
            let text = format!("the message attaches no descriptor {} for {what}", slot.0);
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })
    }
}

/// Our end of the socket. Everything that is said goes through here, from any thread.
#[derive(Clone, Debug)]
pub(crate) struct Door(Arc<OwnedFd>);

impl Door {
    /// The door at a descriptor that this process was started with.
    ///
    /// # Errors
    /// It is not open.
    pub(crate) fn at(fd: RawFd) -> io::Result<Self> {
        Ok(Self(Arc::new(sys::inherited(fd)?)))
    }

    /// Waits for the next message, or with `wait` unset answers WouldBlock if there is none. `None` at the
    /// end: the shim is gone.
    ///
    /// # Errors
    /// The socket fails, or the message is not one; the text says how.
    pub(crate) fn receive<M: DeserializeOwned>(&self, wait: bool) -> io::Result<Option<(M, Attached)>> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let mut flags = MsgFlags::MSG_CMSG_CLOEXEC;
        if !wait {
            flags |= MsgFlags::MSG_DONTWAIT;
        }
        let received = recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        let mut attached = Attached::default();
        // A list of descriptors that was cut short is an error; what did arrive is closed by dropping it.
        let whole = match received.cmsgs() {
            Ok(messages) => {
                for message in messages {
                    if let ControlMessageOwned::ScmRights(fds) = message {
                        attached.0.extend(sys::received(&fds).into_iter().map(Some));
                    }
                }
                true
            }
            Err(_) => false,
        };
        let (len, cut) = (received.bytes, received.flags.contains(MsgFlags::MSG_TRUNC));
        if cut || !whole {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message that is too long"));
        }
        if len == 0 {
            return Ok(None);
        }
        let message = serde_json::from_slice(&bytes[..len]).map_err(|e| {
            io::Error::new(io::ErrorKind::InvalidData, format!("a message that is none: {e}"))
        })?;
        Ok(Some((message, attached)))
    }

    /// Says something, without waiting.
    ///
    /// # Errors
    /// The shim is gone, or does not listen.
    pub(crate) fn say(&self, message: &Message) -> io::Result<()> {
        let text = serde_json::to_vec(message).map_err(io::Error::other)?;
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        send(self.0.as_raw_fd(), &text, flags)?;
        Ok(())
    }

    /// Tells an event. A shim that does not take it is gone, which shows elsewhere.
    pub(crate) fn tell(&self, event: Event) {
        let _ = self.say(&Message::Event(event));
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
