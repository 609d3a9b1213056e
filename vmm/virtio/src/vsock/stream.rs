//! One connection: its phase, what waits for the host, and what is owed to the guest.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Read, Write},
    net::Shutdown,
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::Arc,
};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    HOST_CID, PACKET_LIMIT,
    packet::{
        CREDIT_REQUEST, CREDIT_UPDATE, HEADER, Header, REQUEST, RESPONSE, RST, RW, SHUTDOWN,
        SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM,
    },
    transfer,
};
use crate::{
    Memory,
    ring::{Chain, RingError, total},
};

/// The longest first line of the host's: `CONNECT 4294967295` and its end.
const GREETING_LIMIT: usize = 19;

/// What names a connection: there is one guest and one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// How far a connection is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host connected; its `CONNECT` line is not whole yet.
    Greeting(Vec<u8>),
    /// The host's REQUEST is on its way to the guest.
    Requested,
    /// The guest's REQUEST is with the dialer.
    Dialing,
    /// Bytes flow.
    Open,
    /// The guest is gone; what waits for the host is still delivered.
    Draining,
    /// The host is gone or one of the two erred; a RST is owed to the guest.
    Dead,
}

/// What the guest did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Something that makes no sense in this phase.
    Unexpected,
    /// More bytes than it had credit for.
    Credit,
}

/// A socket in the device's epoll set, edge-triggered; dropped, it leaves the set and is closed.
#[derive(Debug)]
pub(super) struct Watched {
    socket: UnixStream,
    epoll: Arc<Epoll>,
}

impl Watched {
    pub(super) fn new(socket: UnixStream, epoll: Arc<Epoll>, id: u64) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        epoll.ctl(ControlOperation::Add, socket.as_raw_fd(), EpollEvent::new(events, id))?;
        Ok(Self { socket, epoll })
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // Closing alone does neither while whoever passed the socket in still holds it.
        let _ = self.epoll.ctl(ControlOperation::Delete, self.socket.as_raw_fd(), EpollEvent::default());
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) ports: Ports,
    pub(super) phase: Phase,
    /// The host's end, while there is one.
    socket: Option<Watched>,
    /// Not known to be empty, not known to be full, closed in both directions: what the edges said.
    readable: bool,
    writable: bool,
    hung_up: bool,
    /// Whether it stands in line for the guest's buffers.
    pub(super) queued: bool,
    /// REQUEST or RESPONSE, while it is owed.
    opening: Option<u16>,
    /// Bytes that the guest may have under way, that it sent, that the host took, and that it was told of.
    window: u32,
    received: u32,
    forwarded: u32,
    told: u32,
    /// Bytes that were sent to the guest, that it has room for, and that it took.
    sent: u32,
    guest_window: u32,
    guest_forwarded: u32,
    /// CREDIT_UPDATE is owed; CREDIT_REQUEST was sent and not answered.
    update_owed: bool,
    credit_asked: bool,
    /// What the guest sent and the host did not take yet; at most `window`.
    waiting: VecDeque<u8>,
    /// The guest sends no more, and receives no more.
    guest_ended: bool,
    guest_deaf: bool,
    /// The host sends no more, and receives no more.
    host_ended: bool,
    host_deaf: bool,
    /// The flags of the SHUTDOWN that the guest was sent, and whether the host was told of the guest's.
    shutdown_told: u32,
    end_told: bool,
}

impl Stream {
    pub(super) fn new(ports: Ports, phase: Phase, socket: Option<Watched>, window: u32) -> Self {
        Self {
            ports,
            phase,
            socket,
            window,
            readable: true,
            writable: true,
            hung_up: false,
            queued: false,
            opening: None,
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_window: 0,
            guest_forwarded: 0,
            update_owed: false,
            credit_asked: false,
            waiting: VecDeque::new(),
            guest_ended: false,
            guest_deaf: false,
            host_ended: false,
            host_deaf: false,
            shutdown_told: 0,
            end_told: false,
        }
    }

    /// Takes note of what epoll said about the socket.
    pub(super) fn note(&mut self, events: EventSet) {
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        self.readable |= gone || events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        self.writable |= gone || events.contains(EventSet::OUT);
        self.hung_up |= events.contains(EventSet::HANG_UP);
    }

    /// Reads the host's first line, byte by byte: what follows it is for the guest.
    /// Answers the guest's port once it is there; an error closes the connection.
    pub(super) fn read_greeting(&mut self) -> io::Result<Option<u32>> {
        let (Phase::Greeting(line), Some(watched)) = (&mut self.phase, &self.socket) else {
            return Ok(None);
        };
        let mut byte = [0];
        loop {
            match (&watched.socket).read(&mut byte) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) if byte[0] == b'\n' => break,
                Ok(_) if line.len() == GREETING_LIMIT => return Err(ErrorKind::InvalidData.into()),
                Ok(_) => line.push(byte[0]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        }
        parse_greeting(line).map(Some).ok_or_else(|| ErrorKind::InvalidData.into())
    }

    /// The greeting is read: the guest is asked.
    pub(super) fn request(&mut self, ports: Ports) {
        self.ports = ports;
        self.phase = Phase::Requested;
        self.opening = Some(REQUEST);
    }

    /// The dialer's answer: the guest is told.
    pub(super) fn dialed(&mut self, socket: Watched) {
        self.socket = Some(socket);
        self.phase = Phase::Open;
        self.opening = Some(RESPONSE);
    }

    /// The guest's RESPONSE: the host is told.
    pub(super) fn accepted(&mut self) -> Result<(), Fault> {
        if self.phase != Phase::Requested || self.opening.is_some() {
            return Err(Fault::Unexpected);
        }
        self.phase = Phase::Open;
        let line = format!("OK {}\n", self.ports.host);
        // Nothing was written before, so there is room for a line unless the host is gone.
        let written = self.socket.as_ref().map(|w| (&w.socket).write(line.as_bytes()));
        if !matches!(written, Some(Ok(n)) if n == line.len()) {
            self.kill();
        }
        Ok(())
    }

    /// Ends the connection here and now, and owes the guest a RST.
    pub(super) fn kill(&mut self) {
        self.phase = Phase::Dead;
        self.socket = None;
        self.waiting = VecDeque::new();
    }

    /// The guest is gone; `false` if nothing waits for the host, so that the connection is over.
    pub(super) fn drain(&mut self) -> bool {
        self.phase = Phase::Draining;
        !self.is_over()
    }

    /// Whether nothing is left to do.
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Draining && self.waiting.is_empty()
            // The host gave up before the guest heard of it.
            || self.phase == Phase::Requested && self.hung_up && self.opening.is_some()
    }

    /// What every packet of the guest's says about its receiving buffer.
    pub(super) fn learn_credit(&mut self, header: &Header) {
        self.guest_window = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_asked = false;
        }
    }

    /// Bytes that the guest has room for. One that took more than it was sent, or shrank its buffer
    /// below what is in it, has none.
    fn credit(&self) -> u32 {
        self.guest_window.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// The guest asks what it may send.
    pub(super) fn owe_credit(&mut self) {
        self.update_owed = true;
    }

    /// SHUTDOWN of the guest's.
    pub(super) fn guest_shutdown(&mut self, flags: u32) {
        self.guest_ended |= flags & SHUTDOWN_SEND != 0;
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            if let Some(watched) = &self.socket {
                // From here on the host's writes fail. It is an error only if they do already.
                let _ = watched.socket.shutdown(Shutdown::Read);
            }
        }
    }

    /// Data of the guest's: `len` bytes behind the header, which the chain holds.
    pub(super) fn receive(
        &mut self,
        memory: &Memory,
        chain: &Chain,
        len: u32,
    ) -> Result<Result<(), Fault>, RingError> {
        if self.phase != Phase::Open || self.guest_ended || self.opening.is_some() {
            return Ok(Err(Fault::Unexpected));
        }
        let under_way = self.received.wrapping_sub(self.told);
        if u64::from(under_way) + u64::from(len) > u64::from(self.window) {
            return Ok(Err(Fault::Credit));
        }
        self.received = self.received.wrapping_add(len);
        let mut done = 0;
        if self.waiting.is_empty()
            && self.writable
            && !self.host_deaf
            && let Some(watched) = &self.socket
        {
            while done < u64::from(len) && self.writable && !self.host_deaf {
                let (offset, rest) = (HEADER as u64 + done, u64::from(len) - done);
                match transfer::to_host(&watched.socket, memory, &chain.readable, offset, rest)? {
                    Ok(n) => done += n,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => self.writable = false,
                    Err(_) => self.host_deaf = true,
                }
            }
        }
        self.forwarded = self.forwarded.wrapping_add(done as u32);
        if !self.host_deaf && done < u64::from(len) {
            let mut rest = vec![0; (u64::from(len) - done) as usize];
            chain.read(memory, HEADER as u64 + done, &mut rest)?;
            if self.waiting.is_empty() {
                self.waiting = rest.into();
            } else {
                self.waiting.extend(rest);
            }
        }
        Ok(Ok(()))
    }

    /// Gives the host what waits for it.
    fn flush(&mut self) {
        while self.writable
            && !self.host_deaf
            && !self.waiting.is_empty()
            && let Some(watched) = &self.socket
        {
            match (&watched.socket).write(self.waiting.as_slices().0) {
                Ok(n) => {
                    self.waiting.drain(..n);
                    self.forwarded = self.forwarded.wrapping_add(n as u32);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(_) => self.host_deaf = true,
            }
        }
    }

    /// Draws the conclusions from whatever has changed.
    pub(super) fn settle(&mut self) {
        if self.phase == Phase::Requested && self.hung_up && self.opening.is_none() {
            self.kill();
        }
        if !matches!(self.phase, Phase::Open | Phase::Draining) {
            return;
        }
        self.flush();
        let host_closed = self.hung_up && (self.host_ended || self.guest_deaf);
        // Both directions came to their end, one after the other: nothing can be received any more.
        let both_ended = self.host_ended && self.guest_ended && self.waiting.is_empty();
        self.host_deaf |= host_closed || both_ended;
        if self.host_deaf {
            // Counted as taken: the guest's writers shall meet the SHUTDOWN, not wait for credit.
            self.forwarded = self.received;
        }
        if self.host_deaf || self.waiting.is_empty() {
            // The memory goes back, too.
            self.waiting = VecDeque::new();
        }
        if self.host_deaf && self.host_ended {
            self.socket = None;
        }
        if self.guest_ended && self.waiting.is_empty() {
            if self.guest_deaf && self.phase == Phase::Open {
                // All is delivered: this RST is what Linux's close waits for.
                return self.kill();
            }
            if let Some(watched) = self.socket.as_ref().filter(|_| !self.end_told) {
                let _ = watched.socket.shutdown(Shutdown::Write);
                self.end_told = true;
            }
        }
        let news = self.forwarded.wrapping_sub(self.told);
        self.update_owed |= news >= self.window / 4;
    }

    /// Whether a buffer of the guest's would be of use.
    pub(super) fn wants_buffer(&self) -> bool {
        match self.phase {
            Phase::Dead => true,
            Phase::Greeting(_) | Phase::Dialing | Phase::Draining => false,
            Phase::Requested => self.opening.is_some(),
            Phase::Open => {
                self.opening.is_some()
                    || self.update_owed
                    || self.may_read() && (self.credit() > 0 || !self.credit_asked)
                    || self.shutdown_owed()
            }
        }
    }

    fn may_read(&self) -> bool {
        self.socket.is_some() && self.readable && !self.host_ended && !self.guest_deaf
    }

    fn shutdown_flags(&self) -> u32 {
        let send = if self.host_ended { SHUTDOWN_SEND } else { 0 };
        send | if self.host_deaf { SHUTDOWN_RECEIVE } else { 0 }
    }

    fn shutdown_owed(&self) -> bool {
        self.shutdown_flags() & !self.shutdown_told != 0
    }

    /// Writes the next packet for the guest into `chain`, which has room for a header and more.
    /// Answers the packet's length; `None` if there is none after all.
    pub(super) fn fill(
        &mut self,
        cid: u64,
        memory: &Memory,
        chain: &Chain,
    ) -> Result<Option<u32>, RingError> {
        let Some((op, flags, len)) = self.next_packet(memory, chain)? else { return Ok(None) };
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: STREAM,
            op,
            flags,
            buf_alloc: self.window,
            fwd_cnt: self.forwarded,
        };
        chain.write(memory, 0, &header.bytes())?;
        self.told = self.forwarded;
        self.update_owed = false;
        Ok(Some(HEADER as u32 + len))
    }

    /// Operation, flags and length of the next packet; data is in its place in the chain already.
    fn next_packet(&mut self, memory: &Memory, chain: &Chain) -> Result<Option<(u16, u32, u32)>, RingError> {
        match self.phase {
            Phase::Dead => return Ok(Some((RST, 0, 0))),
            Phase::Requested | Phase::Open => {}
            Phase::Greeting(_) | Phase::Dialing | Phase::Draining => return Ok(None),
        }
        if let Some(op) = self.opening.take() {
            return Ok(Some((op, 0, 0)));
        }
        if self.phase == Phase::Requested {
            return Ok(None);
        }
        if let Some(len) = self.read_host(memory, chain)? {
            return Ok(Some((RW, 0, len)));
        }
        if self.shutdown_owed() {
            self.shutdown_told = self.shutdown_flags();
            return Ok(Some((SHUTDOWN, self.shutdown_told, 0)));
        }
        if self.update_owed {
            return Ok(Some((CREDIT_UPDATE, 0, 0)));
        }
        if self.may_read() && self.credit() == 0 && !self.credit_asked {
            self.credit_asked = true;
            return Ok(Some((CREDIT_REQUEST, 0, 0)));
        }
        Ok(None)
    }

    /// Reads from the host behind the place of the header, as much as fits and the guest has room for.
    fn read_host(&mut self, memory: &Memory, chain: &Chain) -> Result<Option<u32>, RingError> {
        let room = total(&chain.writable).saturating_sub(HEADER as u64);
        let limit = room.min(u64::from(self.credit())).min(PACKET_LIMIT);
        let Some(watched) = self.socket.as_ref().filter(|_| limit > 0 && self.may_read()) else {
            return Ok(None);
        };
        match transfer::from_host(&watched.socket, memory, &chain.writable, HEADER as u64, limit)? {
            Ok(0) => self.host_ended = true,
            Ok(n) => {
                self.sent = self.sent.wrapping_add(n as u32);
                return Ok(Some(n as u32));
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => self.readable = false,
            // The host closed without having read everything.
            Err(_) => (self.host_ended, self.host_deaf) = (true, true),
        }
        self.settle();
        Ok(None)
    }

    /// Bytes that it holds for the host.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.waiting.capacity()
    }
}

/// The port in `CONNECT <port>`.
fn parse_greeting(line: &[u8]) -> Option<u32> {
    let port = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?;
    // Digits alone: parse() takes a sign, too.
    if port.bytes().all(|b| b.is_ascii_digit()) { port.parse().ok() } else { None }
}
