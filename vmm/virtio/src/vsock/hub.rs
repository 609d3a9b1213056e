//! All connections: how they begin and end, which packet is whose, and whose turn it is.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    Dialer, Metrics, NARROW_WINDOW, STREAM_LIMIT, WIDE_STREAMS, WIDE_WINDOW,
    packet::{HEADER, Header},
    socket::Watched,
    stream::{Phase, Ports, Stream},
};
use crate::{
    Memory,
    ring::{Chain, RingError},
};

mod inbound;

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
    /// Those that the dialer was asked for and did not answer, given up by the guest or not.
    dials: BTreeSet<u64>,
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
            dials: BTreeSet::new(),
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

    /// Drops every connection. The dialer goes on with what it was asked for, so that still counts.
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
            if stream.queued {
                // Or a guest without buffers could make the line longer and longer.
                self.ready.retain(|&n| n != name);
            }
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
        let asked = self.dials.remove(&name);
        let stream = self.streams.get_mut(&name).filter(|s| asked && s.phase == Phase::Dialing);
        let Some(stream) = stream else { return }; // The guest gave up meanwhile.
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

    /// Whether buffers of the guest's are of use.
    pub(super) fn wants_buffers(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
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
        // What is kept beside each connection.
        let line = self.ready.len().max(self.names.len());
        assert!(line <= self.streams.len() && self.dials.len() <= super::DIAL_LIMIT);
        (self.streams.len(), self.resets.len(), self.streams.values().map(Stream::held).sum())
    }
}
