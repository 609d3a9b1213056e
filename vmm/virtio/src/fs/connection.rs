//! The socket to the backend: the vhost-user protocol, from the frontend's side.
//! Knows messages and deadlines; knows neither rings nor devices.
//!
//! The layouts of the messages are those of the crate `vhost`. Its connection is not used: it tries again
//! for ever where a deadline has passed, and a vCPU must not wait for ever.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    sync::Arc,
    time::{Duration, Instant},
};

use vhost::vhost_user::message::{
    FrontendReq, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserU64, VhostUserVirtioFeatures,
    VhostUserVringState,
};
use vm_memory::ByteValued;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::Metrics;

/// The version of the protocol, in the flags of each message.
const VERSION: u32 = 1;
/// Request, flags, size of what follows: 32 bits each, in the machine's byte order.
const HEADER: usize = 12;

/// A connection to a backend. After a message that was not answered as it must be, it is closed: what
/// comes next on it could belong to anything.
pub(super) struct Connection {
    socket: UnixStream,
    deadline: Instant,
    protocol: VhostUserProtocolFeatures,
    open: bool,
    metrics: Arc<Metrics>,
}

impl Connection {
    /// Claims the backend behind `socket` and agrees on the protocol with it. Answers the connection and
    /// the features of virtio that the backend has.
    pub(super) fn open(
        socket: UnixStream,
        patience: Duration,
        queues: usize,
        metrics: Arc<Metrics>,
    ) -> io::Result<(Self, u64)> {
        socket.set_nonblocking(false)?;
        // Messages are small against the socket's buffer: who does not read them at all is what this is for.
        socket.set_write_timeout(Some(patience))?;
        let protocol = VhostUserProtocolFeatures::empty();
        let mut this = Self { socket, deadline: Instant::now(), protocol, open: true, metrics };
        this.begin(patience)?;
        this.set(FrontendReq::SET_OWNER, &[], &[])?;
        let features = this.get(FrontendReq::GET_FEATURES)?;
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(unsupported("the backend has no protocol features"));
        }
        this.agree(queues)?;
        Ok((this, features & !VhostUserVirtioFeatures::all().bits()))
    }

    /// Gives the messages that follow so much time altogether.
    pub(super) fn begin(&mut self, patience: Duration) -> io::Result<()> {
        self.deadline = Instant::now() + patience;
        self.socket.set_read_timeout(Some(patience))
    }

    fn agree(&mut self, queues: usize) -> io::Result<()> {
        let needed = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ;
        let wanted = needed | VhostUserProtocolFeatures::RESET_DEVICE;
        let offered = self.get(FrontendReq::GET_PROTOCOL_FEATURES)?;
        let agreed = VhostUserProtocolFeatures::from_bits_truncate(offered) & wanted;
        if !agreed.contains(needed) {
            return Err(unsupported("the backend lacks the protocol feature REPLY_ACK or MQ"));
        }
        self.set(FrontendReq::SET_PROTOCOL_FEATURES, VhostUserU64::new(agreed.bits()).as_slice(), &[])?;
        self.protocol = agreed;
        if self.get(FrontendReq::GET_QUEUE_NUM)? < queues as u64 {
            return Err(unsupported("the backend has not enough queues"));
        }
        Ok(())
    }

    /// Whether the backend can still be spoken to.
    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    /// Ends the connection.
    pub(super) fn close(&mut self) {
        self.open = false;
        // Fails only where the backend was faster.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Whether the backend can forget its device's state.
    pub(super) fn can_reset(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::RESET_DEVICE)
    }

    /// Asks for a number.
    fn get(&mut self, request: FrontendReq) -> io::Result<u64> {
        let mut answer = VhostUserU64::default();
        self.exchange(request, 0, &[], &[], Some(answer.as_mut_slice()))?;
        Ok(answer.value)
    }

    /// Tells something, and waits until it is done. A refusal is an error and leaves the connection open.
    pub(super) fn set(&mut self, request: FrontendReq, body: &[u8], fds: &[RawFd]) -> io::Result<()> {
        if !self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            return self.exchange(request, 0, body, fds, None);
        }
        let mut answer = VhostUserU64::default();
        let flags = VhostUserHeaderFlag::NEED_REPLY.bits();
        self.exchange(request, flags, body, fds, Some(answer.as_mut_slice()))?;
        if answer.value != 0 {
            self.metrics.failures.increment();
            return Err(io::Error::other("the backend refused it"));
        }
        Ok(())
    }

    /// Stops a ring, and answers the position of the next request in it: once this returns, the backend
    /// does not touch the ring nor the buffers in it.
    pub(super) fn stop_ring(&mut self, index: u32) -> io::Result<u16> {
        let mut answer = VhostUserVringState::default();
        let question = VhostUserVringState::new(index, 0);
        let request = FrontendReq::GET_VRING_BASE;
        self.exchange(request, 0, question.as_slice(), &[], Some(answer.as_mut_slice()))?;
        let (number, position) = (answer.index, answer.num);
        match u16::try_from(position) {
            Ok(position) if number == index => Ok(position),
            _ => {
                self.metrics.failures.increment();
                self.close();
                Err(invalid("the backend answered for another ring"))
            }
        }
    }

    fn exchange(
        &mut self,
        request: FrontendReq,
        flags: u32,
        body: &[u8],
        fds: &[RawFd],
        answer: Option<&mut [u8]>,
    ) -> io::Result<()> {
        if !self.open {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the backend is gone"));
        }
        self.metrics.messages.increment();
        let done = self.send(request, flags, body, fds).and_then(|()| match answer {
            Some(answer) => self.receive(request, answer),
            None => Ok(()),
        });
        if done.is_err() {
            self.metrics.failures.increment();
            self.close();
        }
        done
    }

    fn send(&mut self, request: FrontendReq, flags: u32, body: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let mut message = Vec::with_capacity(HEADER + body.len());
        for word in [u32::from(request), VERSION | flags, body.len() as u32] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(body);
        let sent = retried(self.deadline, || Ok(self.socket.send_with_fds(&[message.as_slice()], fds)?))?;
        // The descriptors went with the first byte; a message this small goes in one piece in practice.
        let mut rest = &message[sent..];
        while !rest.is_empty() {
            let sent = retried(self.deadline, || self.socket.write(rest))?;
            rest = &rest[sent..];
        }
        Ok(())
    }

    fn receive(&mut self, request: FrontendReq, body: &mut [u8]) -> io::Result<()> {
        let mut header = [0; HEADER];
        self.fill(&mut header)?;
        let word = |n: usize| u32::from_ne_bytes([header[n], header[n + 1], header[n + 2], header[n + 3]]);
        let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
        if (word(0), word(4) & 7, word(8)) != (u32::from(request), flags, body.len() as u32) {
            return Err(invalid("the backend answered something else"));
        }
        self.fill(body)
    }

    fn fill(&mut self, mut out: &mut [u8]) -> io::Result<()> {
        while !out.is_empty() {
            // Descriptors that come along are not asked for, and closed by the kernel.
            let read = retried(self.deadline, || self.socket.read(out))?;
            if read == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the backend ended the connection"));
            }
            out = &mut out[read..];
        }
        Ok(())
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Does `what` again where a signal interrupted it (vCPU threads get them), but not after the deadline.
/// The socket's own timeout bounds each try.
fn retried(deadline: Instant, mut what: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        let late = Instant::now() >= deadline;
        match what() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted && !late => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(timed_out()),
            Ok(_) if late => return Err(timed_out()),
            other => return other,
        }
    }
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the backend does not answer")
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn unsupported(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, what)
}
