//! All connections: how they begin and end, which packet is whose, and whose turn it is.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    DIAL_LIMIT, Dialer, HOST_CID, Metrics, NARROW_WINDOW, RESET_LIMIT, STREAM_LIMIT, WIDE_STREAMS,
    WIDE_WINDOW,
    packet::{CREDIT_REQUEST, CREDIT_UPDATE, HEADER, Header, REQUEST, RESPONSE, RST, RW, SHUTDOWN, STREAM},
    stream::{Fault, Phase, Ports, Stream, Watched},
};
use crate::{
    Memory,
    ring::{Chain, RingError, total},
};

/// What names the listener in the epoll set; connections are named from 1 on.
const LISTENER: u64 = 0;
/// The first port of the host's ends of connections that the host opens, above those that programs listen at.
const FIRST_PORT: u32 = 1 << 30;
/// Events taken from the epoll set at once.
const BATCH: usize = 64;

pub(super) struct Hub {
    pub(super) cid: u64,
    listener: Option<UnixListener>,
    dialer: Box<dyn Dialer>,
    epoll: Arc<Epoll>,
    /// By the name that the epoll set and the dialer know; never used twice.
    streams: BTreeMap<u64, Stream>,
    /// Those that the guest knows of.
    names: BTreeMap<Ports, u64>,
    /// Those with something for the guest, in the order of their turns.
    ready: VecDeque<u64>,
    /// Refusals of packets that belong to no connection.
    resets: VecDeque<Header>,
    last_name: u64,
    next_port: u32,
    /// Whether somebody may wait in the listener's backlog.
    may_accept: bool,
    pub(super) metrics: Arc<Metrics>,
}

impl Hub {
    pub(super) fn new(
        cid: u64,
        listener: Option<UnixListener>,
        dialer: Box<dyn Dialer>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new()?);
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER);
            epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), event)?;
        }
        Ok(Self {
            cid,
            listener,
            dialer,
            epoll,
            streams: BTreeMap::new(),
            names: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            last_name: LISTENER,
            next_port: FIRST_PORT,
            may_accept: true,
            metrics,
        })
    }

    /// The descriptor that is readable when anything happened at any socket.
    pub(super) fn epoll_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Drops every connection.
    pub(super) fn clear(&mut self) {
        self.streams.clear();
        self.names.clear();
        self.ready.clear();
        self.resets.clear();
        self.may_accept = true;
    }

    /// Takes note of what happened at the sockets; with `act`, acts on it, too.
    pub(super) fn collect(&mut self, act: bool) {
        let mut events = [EpollEvent::default(); BATCH];
        // In bounds: what is left keeps the set readable.
        for _ in 0..STREAM_LIMIT / BATCH {
            // Without a timeout and with a set of our own this fails in no way that could be mended.
            let count = self.epoll.wait(0, &mut events).unwrap_or(0);
            for event in &events[..count] {
                let name = event.data();
                if name == LISTENER {
                    self.may_accept = true;
                } else if let Some(stream) = self.streams.get_mut(&name) {
                    stream.note(event.event_set());
                    if act {
                        self.serve(name);
                    }
                }
            }
            if count < BATCH {
                return;
            }
        }
    }

    /// Looks at every connection, whatever was noted.
    pub(super) fn serve_all(&mut self) {
        for name in self.streams.keys().copied().collect::<Vec<_>>() {
            self.serve(name);
        }
    }

    /// Does what can be done for a connection, and puts it in line if it has something for the guest.
    fn serve(&mut self, name: u64) {
        let Some(stream) = self.streams.get_mut(&name) else { return };
        if matches!(stream.phase, Phase::Greeting(_)) {
            match stream.read_greeting() {
                Ok(None) => return,
                Ok(Some(port)) => self.request(name, port),
                Err(_) => {
                    self.metrics.bad_greetings.increment();
                    self.remove(name);
                    return;
                }
            }
        }
        let Some(stream) = self.streams.get_mut(&name) else { return };
        stream.settle();
        if stream.is_over() {
            self.remove(name);
        } else if stream.wants_buffer() && !stream.queued {
            stream.queued = true;
            self.ready.push_back(name);
        }
    }

    /// Asks the guest on behalf of the host.
    fn request(&mut self, name: u64, guest: u32) {
        let ports = Ports { host: self.free_port(), guest };
        if let Some(stream) = self.streams.get_mut(&name) {
            stream.request(ports);
            self.names.insert(ports, name);
        }
    }

    fn remove(&mut self, name: u64) {
        if let Some(stream) = self.streams.remove(&name) {
            self.forget_ports(stream.ports, name);
            // Whoever found no room before may find it now.
            self.may_accept = true;
        }
    }

    /// From here on these ports are free for a new connection.
    fn forget_ports(&mut self, ports: Ports, name: u64) {
        if self.names.get(&ports) == Some(&name) {
            self.names.remove(&ports);
        }
    }

    fn insert(&mut self, ports: Ports, phase: Phase, socket: Option<UnixStream>) -> io::Result<u64> {
        let name = self.last_name + 1;
        let socket = socket.map(|s| Watched::new(s, self.epoll.clone(), name)).transpose()?;
        self.last_name = name;
        let window = if self.streams.len() < WIDE_STREAMS { WIDE_WINDOW } else { NARROW_WINDOW };
        self.streams.insert(name, Stream::new(ports, phase, socket, window));
        Ok(name)
    }

    /// Whether [`Hub::accept`] would find both somebody and room.
    pub(super) fn can_accept(&self) -> bool {
        self.listener.is_some() && self.may_accept && self.streams.len() < STREAM_LIMIT
    }

    /// Takes in whoever connected to the listener, as long as there is room.
    pub(super) fn accept(&mut self) {
        while self.can_accept()
            && let Some(listener) = &self.listener
        {
            match listener.accept() {
                Ok((socket, _)) => {
                    let ports = Ports { host: 0, guest: 0 };
                    // A socket that cannot be watched is closed: the host sees it.
                    if let Ok(name) = self.insert(ports, Phase::Greeting(Vec::new()), Some(socket)) {
                        self.serve(name);
                    }
                }
                // Nobody, or no descriptor free: until somebody connects, or a connection ends.
                Err(_) => self.may_accept = false,
            }
        }
    }

    /// A port that no other connection has at the host's end.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).filter(|&p| p != u32::MAX).unwrap_or(FIRST_PORT);
            // Found after [`STREAM_LIMIT`] steps at most.
            if !self.streams.values().any(|s| s.ports.host == port) {
                return port;
            }
        }
    }

    /// The dialer's answer.
    pub(super) fn dialed(&mut self, name: u64, socket: Option<UnixStream>) {
        let Some(stream) = self.streams.get_mut(&name).filter(|s| s.phase == Phase::Dialing) else {
            return; // The guest gave up meanwhile.
        };
        let watched = socket.and_then(|s| Watched::new(s, self.epoll.clone(), name).ok());
        match watched {
            Some(watched) => {
                self.metrics.guest_connections.increment();
                stream.dialed(watched);
            }
            None => {
                self.metrics.dials_refused.increment();
                stream.kill();
            }
        }
        self.serve(name);
    }

    /// Whether a packet of the guest's can be taken: it may cost a refusal.
    pub(super) fn has_room(&self) -> bool {
        self.resets.len() < RESET_LIMIT
    }

    /// Whether buffers of the guest's are of use.
    pub(super) fn wants_buffers(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Takes a packet of the guest's.
    pub(super) fn take(&mut self, memory: &Memory, chain: &Chain) -> Result<(), RingError> {
        self.metrics.packets_from_guest.increment();
        let mut bytes = [0; HEADER];
        let present = chain.read(memory, 0, &mut bytes)?;
        let header = Header::parse(&bytes);
        let carried = total(&chain.readable).saturating_sub(HEADER as u64);
        if present < HEADER || u64::from(header.len) > carried {
            self.metrics.malformed.increment();
            return Ok(());
        }
        if header.src_cid != self.cid {
            self.metrics.wrong_source.increment();
            return Ok(());
        }
        let refused = if header.dst_cid != HOST_CID {
            Some(&self.metrics.wrong_destination)
        } else if header.kind != STREAM {
            Some(&self.metrics.wrong_type)
        } else {
            None
        };
        if let Some(counter) = refused {
            counter.increment();
            self.refuse(&header);
            return Ok(());
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        match self.names.get(&ports).copied() {
            Some(name) => self.take_known(name, &header, memory, chain)?,
            None => self.take_unknown(ports, &header),
        }
        Ok(())
    }

    /// Answers a packet with a RST, unless it is one.
    fn refuse(&mut self, header: &Header) {
        if header.op != RST {
            self.resets.push_back(header.refusal());
        }
    }

    fn take_unknown(&mut self, ports: Ports, header: &Header) {
        match header.op {
            RST => self.metrics.resets_received.increment(),
            REQUEST => self.begin(ports, header),
            RESPONSE..=CREDIT_REQUEST => {
                self.metrics.unknown_connection.increment();
                self.refuse(header);
            }
            _ => {
                self.metrics.unknown_operation.increment();
                self.refuse(header);
            }
        }
    }

    /// The guest opens a connection.
    fn begin(&mut self, ports: Ports, header: &Header) {
        let dialing = self.streams.values().filter(|s| s.phase == Phase::Dialing).count();
        if self.streams.len() >= STREAM_LIMIT || dialing >= DIAL_LIMIT {
            self.metrics.crowded.increment();
            return self.refuse(header);
        }
        // Without a socket nothing fails.
        let Ok(name) = self.insert(ports, Phase::Dialing, None) else { return };
        self.names.insert(ports, name);
        if let Some(stream) = self.streams.get_mut(&name) {
            stream.learn_credit(header);
        }
        self.dialer.dial(name, ports.host);
    }

    fn take_known(
        &mut self,
        name: u64,
        header: &Header,
        memory: &Memory,
        chain: &Chain,
    ) -> Result<(), RingError> {
        let Some(stream) = self.streams.get_mut(&name) else { return Ok(()) };
        if header.op == RST {
            self.metrics.resets_received.increment();
            self.end(name);
            return Ok(());
        }
        if stream.phase == Phase::Dead {
            return Ok(()); // It crossed the RST.
        }
        stream.learn_credit(header);
        let connected = stream.phase == Phase::Open;
        let outcome = match header.op {
            RESPONSE => stream.accepted().inspect(|()| self.metrics.host_connections.increment()),
            SHUTDOWN if connected => {
                stream.guest_shutdown(header.flags);
                Ok(())
            }
            SHUTDOWN if stream.phase == Phase::Dialing => {
                self.end(name);
                return Ok(());
            }
            RW => {
                let outcome = stream.receive(memory, chain, header.len)?;
                if outcome.is_ok() {
                    self.metrics.bytes_from_guest.add(u64::from(header.len));
                }
                outcome
            }
            CREDIT_UPDATE if connected => Ok(()),
            CREDIT_REQUEST if connected => {
                stream.owe_credit();
                Ok(())
            }
            REQUEST..=CREDIT_REQUEST => Err(Fault::Unexpected),
            _ => {
                self.metrics.unknown_operation.increment();
                stream.kill();
                Ok(())
            }
        };
        if let Err(fault) = outcome {
            match fault {
                Fault::Unexpected => self.metrics.unexpected.increment(),
                Fault::Credit => self.metrics.credit_violations.increment(),
            }
            stream.kill();
        }
        self.serve(name);
        Ok(())
    }

    /// The guest's end is gone.
    fn end(&mut self, name: u64) {
        let Some(stream) = self.streams.get_mut(&name) else { return };
        let ports = stream.ports;
        if stream.drain() {
            self.forget_ports(ports, name);
        } else {
            self.remove(name);
        }
    }

    /// Writes one packet for the guest into `chain`. Answers its length; `None` if there is none.
    pub(super) fn fill(&mut self, memory: &Memory, chain: &Chain) -> Result<Option<u32>, RingError> {
        if let Some(header) = self.resets.pop_front() {
            chain.write(memory, 0, &header.bytes())?;
            self.metrics.packets_to_guest.increment();
            self.metrics.resets_sent.increment();
            return Ok(Some(HEADER as u32));
        }
        while let Some(name) = self.ready.pop_front() {
            let Some(stream) = self.streams.get_mut(&name) else { continue };
            stream.queued = false;
            let dead = stream.phase == Phase::Dead;
            let written = stream.fill(self.cid, memory, chain)?;
            if dead {
                self.metrics.resets_sent.increment();
                self.remove(name);
            } else {
                self.serve(name);
            }
            if let Some(len) = written {
                self.metrics.packets_to_guest.increment();
                self.metrics.bytes_to_guest.add(u64::from(len) - HEADER as u64);
                return Ok(written);
            }
        }
        Ok(None)
    }

    /// Connections, refusals that wait, and bytes that wait for the host.
    #[cfg(test)]
    pub(super) fn held(&self) -> (usize, usize, usize) {
        (self.streams.len(), self.resets.len(), self.streams.values().map(Stream::held).sum())
    }
}
