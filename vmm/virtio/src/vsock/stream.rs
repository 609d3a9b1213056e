//! One connection: its phase, what waits for the host, and what is owed to the guest.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Write},
    net::Shutdown,
};

use vmm_sys_util::epoll::EventSet;

use super::{
    packet::{HEADER, Header, REQUEST, RESPONSE, SHUTDOWN_RECEIVE, SHUTDOWN_SEND},
    socket::{Watched, read_greeting},
    transfer,
};
use crate::{
    Memory,
    ring::{Chain, RingError},
};

mod outbound;

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

    /// Reads on in the host's first line. Answers the guest's port once it is there; an error closes the
    /// connection.
    pub(super) fn read_greeting(&mut self) -> io::Result<Option<u32>> {
        match (&mut self.phase, &self.socket) {
            (Phase::Greeting(line), Some(watched)) => read_greeting(&watched.socket, line),
            _ => Ok(None),
        }
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
            match transfer::to_host(&watched.socket, memory, &chain.readable, HEADER as u64, len.into())? {
                Ok(n) => done = n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(_) => self.host_deaf = true,
            }
        }
        self.forwarded = self.forwarded.wrapping_add(done as u32);
        if !self.host_deaf && done < u64::from(len) {
            let mut rest = vec![0; (u64::from(len) - done) as usize];
            chain.read(memory, HEADER as u64 + done, &mut rest)?;
            if self.waiting.capacity() == 0 {
                // The window at once, so that it never grows beyond.
                self.waiting = VecDeque::with_capacity(self.window as usize);
            }
            self.waiting.extend(rest);
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
        // A quarter of what the guest may send, which Linux bounds by its own window, too. Whatever it has
        // under way, this is met in the end: where all was taken, or where it may send on anyway.
        let quarter = (self.window.min(self.guest_window) / 4).max(1);
        self.update_owed |= self.forwarded.wrapping_sub(self.told) >= quarter;
    }

    /// Bytes that it holds for the host.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.waiting.capacity()
    }
}
