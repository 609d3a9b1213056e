//! A socket to the kernel's rtnetlink: asks, and waits for the answer with a deadline.
//! Speaks with the network namespace in which it was opened, whatever its thread enters later.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
            setsockopt, socket, sockopt::ReceiveTimeout,
        },
        time::TimeVal,
    },
};

use crate::{
    message::{Attributes, HEADER, Message, Request, text, u32_of},
    sys,
};

/// The kernel answers at once; one that does not within this long never will.
const DEADLINE: Duration = Duration::from_secs(10);
/// More than the kernel puts into one datagram of a dump (32 KiB).
const BUFFER: usize = 64 << 10;

/// Why the kernel did not do what it was asked.
#[derive(Debug)]
pub enum Error {
    /// The kernel refuses, in its own words where it has some.
    Refused(Errno, String),
    /// The socket failed, or no answer came.
    Io(io::Error),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(errno, words) if words.is_empty() => f.write_str(errno.desc()),
            Self::Refused(errno, words) => write!(f, "{} ({})", words.trim_end_matches('.'), errno.desc()),
            Self::Io(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Io(error) => error,
            Error::Refused(errno, _) => Self::new(Self::from(errno).kind(), error.to_string()),
        }
    }
}

impl Error {
    /// The kernel's refusal is one of these.
    pub fn is(&self, any: &[Errno]) -> bool {
        matches!(self, Self::Refused(errno, _) if any.contains(errno))
    }
}

/// A socket to rtnetlink.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The system has no descriptor left, or no rtnetlink.
    pub fn open() -> Result<Self, Error> {
        Self::bound(0)
    }

    /// As [`Socket::open`], and the kernel tells it of changes of links.
    ///
    /// # Errors
    /// As of [`Socket::open`].
    pub fn watch_links() -> Result<Self, Error> {
        Self::bound(libc::RTMGRP_LINK as u32)
    }

    fn bound(groups: u32) -> Result<Self, Error> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        // Words with a refusal, and not the refused message once more. A kernel that cannot say them may not.
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            let _ = sys::set_option(fd.as_fd(), option, 1);
        }
        Ok(Self { fd, sequence: 0 })
    }

    /// Has something done.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn ask(&mut self, request: &Request) -> Result<(), Error> {
        self.send(request, libc::NLM_F_REQUEST | libc::NLM_F_ACK)?;
        self.collect(|_| ())
    }

    /// Has a list told.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn dump(&mut self, request: &Request) -> Result<Vec<Message>, Error> {
        self.send(request, libc::NLM_F_REQUEST | libc::NLM_F_DUMP)?;
        let mut messages = Vec::new();
        self.collect(|message| messages.push(message))?;
        Ok(messages)
    }

    /// Waits for what the kernel tells by itself.
    ///
    /// # Errors
    /// Nothing was told until `deadline`.
    pub fn told(&mut self, deadline: Instant) -> Result<Vec<Message>, Error> {
        self.receive(deadline)
    }

    fn send(&mut self, request: &Request, flags: i32) -> Result<(), Error> {
        self.sequence += 1;
        let bytes = request.encode(flags, self.sequence);
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        Ok(())
    }

    /// Takes what answers the last request, up to its end.
    fn collect(&mut self, mut take: impl FnMut(Message)) -> Result<(), Error> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            for message in self.receive(deadline)? {
                if message.sequence != self.sequence {
                    continue;
                }
                match i32::from(message.kind) {
                    libc::NLMSG_ERROR | libc::NLMSG_DONE => return verdict(&message),
                    _ => take(message),
                }
            }
        }
    }

    fn receive(&mut self, deadline: Instant) -> Result<Vec<Message>, Error> {
        let left = deadline.saturating_duration_since(Instant::now());
        // A zero would wait for ever (socket(7)).
        let left = TimeVal::new(left.as_secs() as i64, i64::from(left.subsec_micros()).max(1));
        setsockopt(&self.fd, ReceiveTimeout, &left)?;
        let mut buffer = vec![0; BUFFER];
        loop {
            match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => return Ok(Message::split(&buffer[..length])),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    return Err(Error::Io(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the kernel does not answer",
                    )));
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// What an acknowledgement or the end of a dump says (`struct nlmsgerr`, `NLMSGERR_ATTR_MSG`).
fn verdict(message: &Message) -> Result<(), Error> {
    const WORDS: u16 = 1;
    let errno = message.body.get(..4).and_then(u32_of).unwrap_or(0) as i32;
    if errno == 0 {
        return Ok(());
    }
    // After an error comes the header of the request, and only that (NETLINK_CAP_ACK).
    let skip = if i32::from(message.kind) == libc::NLMSG_ERROR { 4 + HEADER } else { 4 };
    let words = Attributes(message.body.get(skip..).unwrap_or_default()).get(WORDS).map(text);
    Err(Error::Refused(Errno::from_raw(-errno), words.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_lists_its_links_and_refuses_with_a_reason() {
        let mut socket = Socket::open().unwrap();
        let links = socket.dump(&Request::new(libc::RTM_GETLINK, 0, &[0; 16])).unwrap();
        let name = |m: &Message| m.attributes(16).get(libc::IFLA_IFNAME).map(text);
        assert!(links.iter().filter_map(name).any(|name| name == "lo"), "{links:?}");
        let nobody = Request::new(libc::RTM_GETLINK, 0, &[0; 16]).text(libc::IFLA_IFNAME, "no-such-link");
        let error = socket.ask(&nobody).unwrap_err();
        assert!(error.is(&[Errno::ENODEV]), "{error}");
        let late = socket.told(Instant::now()).unwrap_err();
        assert!(late.to_string().contains("does not answer"), "{late}");
    }
}
