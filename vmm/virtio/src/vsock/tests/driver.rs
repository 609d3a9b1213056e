//! A guest's side of the socket device, honest by default. Everything runs in the test's own thread:
//! sockets and rings answer at once, so that nothing is waited for, and what does not move is stuck.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

use super::super::{packet::*, *};
use crate::{
    Device,
    testing::{BUFFERS, Bench, DriverRing},
};

pub(super) const CID: u64 = 3;
/// The port that the guest connects to, and the one that it connects from or listens at.
pub(super) const HOST_PORT: u32 = 1024;
pub(super) const GUEST_PORT: u32 = 5000;
/// Where the guest's outgoing packets are.
const OUTGOING: u64 = BUFFERS + (5 << 20);

/// What the device asked for.
pub(super) type Dials = Arc<Mutex<Vec<(u64, u32)>>>;

struct Recorder(Dials);

impl Dialer for Recorder {
    fn dial(&mut self, id: u64, port: u32) {
        self.0.lock().unwrap().push((id, port));
    }
}

/// A device whose dials are written down.
pub(super) fn device(listener: Option<UnixListener>) -> (Vsock, Dials) {
    let dials = Dials::default();
    (Vsock::new(CID, listener, Box::new(Recorder(dials.clone()))).unwrap(), dials)
}

pub(super) struct Guest {
    pub(super) bench: Bench<Vsock>,
    pub(super) dials: Dials,
    /// Where the host's programs connect to.
    pub(super) address: SocketAddr,
    /// Bytes of each receiving buffer.
    buffer: u32,
    /// Whether buffers are offered again once they were read.
    pub(super) refill: bool,
    next_buffer: u64,
    next_packet: u64,
    pub(super) inbox: VecDeque<(Header, Vec<u8>)>,
}

impl Guest {
    /// A guest with receiving buffers of so many bytes.
    pub(super) fn new(buffer: u32) -> Self {
        let mut guest = Self::inactive(buffer);
        guest.bench.activate(1 << VIRTIO_RING_F_EVENT_IDX).unwrap();
        guest.offer_buffers(QUEUE_SIZE);
        guest
    }

    /// As [`Guest::new`], but its driver is not ready, and has offered nothing.
    pub(super) fn inactive(buffer: u32) -> Self {
        // An abstract name: no file to clean up.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("bulkhead-vsock-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let (device, dials) = device(Some(UnixListener::bind_addr(&address).unwrap()));
        Self {
            bench: Bench::new(device),
            dials,
            address,
            buffer,
            refill: true,
            next_buffer: 0,
            next_packet: 0,
            inbox: VecDeque::new(),
        }
    }

    pub(super) fn offer_buffers(&mut self, count: u16) {
        for _ in 0..count {
            let slot = self.next_buffer % u64::from(QUEUE_SIZE);
            let at = BUFFERS + slot * u64::from(self.buffer);
            self.bench.rings[0].offer(&[(at, self.buffer, true)]);
            self.next_buffer += 1;
        }
        self.bench.kick(0);
    }

    /// Takes what the device wrote into the inbox. Answers whether there was anything.
    pub(super) fn look(&mut self) -> bool {
        self.bench.settle();
        let before = self.inbox.len();
        let mut taken = 0;
        while let Some((head, written)) = self.bench.rings[0].take_used() {
            let at = BUFFERS + u64::from(head) * u64::from(self.buffer);
            let bytes = self.bench.bytes(at, written as usize);
            let header = Header::parse(bytes[..HEADER].try_into().unwrap());
            assert_eq!(header.len as usize, bytes.len() - HEADER, "{header:?}");
            assert_eq!((header.dst_cid, header.kind), (CID, STREAM));
            self.inbox.push_back((header, bytes[HEADER..].to_vec()));
            taken += 1;
        }
        if self.refill && taken > 0 {
            self.offer_buffers(taken);
        }
        self.inbox.len() > before
    }

    /// The next packet for the guest.
    pub(super) fn next(&mut self) -> (Header, Vec<u8>) {
        self.try_next().expect("a packet for the guest")
    }

    pub(super) fn try_next(&mut self) -> Option<(Header, Vec<u8>)> {
        while self.inbox.is_empty() && self.look() {}
        self.inbox.pop_front()
    }

    /// The next packet's operation.
    pub(super) fn next_op(&mut self) -> u16 {
        self.next().0.op
    }

    /// No packet is there.
    pub(super) fn silent(&mut self) {
        self.look();
        assert_eq!(self.inbox, []);
    }

    /// Offers a packet: its header and its payload in buffers of their own.
    pub(super) fn offer_packet(&mut self, header: Header, payload: &[u8]) {
        let slot = self.next_packet % 32;
        let at = OUTGOING + slot * (64 << 10);
        self.next_packet += 1;
        self.bench.fill(at, &header.bytes());
        let mut buffers = vec![(at, HEADER as u32, false)];
        if !payload.is_empty() {
            assert!(payload.len() <= (64 << 10) - 64);
            self.bench.fill(at + 64, payload);
            // In two pieces, where it can be cut.
            let cut = payload.len() as u32 / 3;
            buffers.push((at + 64, cut, false));
            buffers.push((at + 64 + u64::from(cut), payload.len() as u32 - cut, false));
        }
        self.bench.rings[1].offer(&buffers);
    }

    /// Sends a packet as it is, and sees the device take it.
    pub(super) fn send_raw(&mut self, header: Header, payload: &[u8]) {
        self.offer_packet(header, payload);
        self.bench.kick(1);
        assert!(self.bench.rings[1].take_used().is_some(), "the device left {header:?} in the ring");
    }

    pub(super) fn counted(&self, name: &str) -> u64 {
        let metrics = self.bench.device.lock().unwrap().metrics();
        metrics.into_iter().find(|(n, _)| *n == name).unwrap().1
    }

    /// Connections, refusals and bytes that the device holds.
    pub(super) fn held(&self) -> (usize, usize, usize) {
        self.bench.device.lock().unwrap().hub.held()
    }

    /// The guest connects; answers both ends.
    pub(super) fn connect(&mut self, guest_port: u32) -> (End, UnixStream) {
        let mut end = End::new(HOST_PORT, guest_port);
        self.send_raw(end.header(REQUEST), &[]);
        let (id, port) = self.dials.lock().unwrap().pop().expect("a dial");
        assert_eq!(port, HOST_PORT);
        let (host, stream) = pair();
        self.bench.device.lock().unwrap().dialed(id, Some(stream));
        let (header, _) = self.next();
        assert_eq!((header.op, header.src_port, header.dst_port), (RESPONSE, HOST_PORT, guest_port));
        end.learn(&header);
        (end, host)
    }

    /// The host connects and asks for the guest's port; the guest has not answered yet.
    pub(super) fn called(&mut self, line: &[u8]) -> UnixStream {
        let host = self.called_only(line);
        self.look();
        host
    }

    /// As [`Guest::called`], without a look at what came of it.
    pub(super) fn called_only(&mut self, line: &[u8]) -> UnixStream {
        let mut host = UnixStream::connect_addr(&self.address).unwrap();
        host.set_nonblocking(true).unwrap();
        host.write_all(line).unwrap();
        host
    }

    /// The driver sets its rings up anew after a reset.
    pub(super) fn start_again(&mut self) {
        let sizes = [QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE];
        let mut at = 0x1000;
        for (ring, size) in self.bench.rings.iter_mut().zip(sizes) {
            let zeros = vec![0; DriverRing::bytes(size) as usize];
            self.bench.memory.write_slice(&zeros, GuestAddress(at)).unwrap();
            *ring = DriverRing::new(&self.bench.memory, at, size);
            at += zeros.len() as u64;
        }
        (self.next_buffer, self.next_packet) = (0, 0);
        self.inbox.clear();
        self.bench.activate(0).unwrap();
        self.offer_buffers(QUEUE_SIZE);
    }
}

/// The guest's end of a connection.
pub(super) struct End {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    /// What the device said about credit, and what was sent.
    pub(super) window: u32,
    pub(super) forwarded: u32,
    pub(super) sent: u32,
    /// What the guest says about credit.
    pub(super) own_window: u32,
    pub(super) taken: u32,
}

impl End {
    pub(super) fn new(host_port: u32, guest_port: u32) -> Self {
        Self { host_port, guest_port, window: 0, forwarded: 0, sent: 0, own_window: 256 << 10, taken: 0 }
    }

    pub(super) fn header(&self, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: self.guest_port,
            dst_port: self.host_port,
            len: 0,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: self.own_window,
            fwd_cnt: self.taken,
        }
    }

    pub(super) fn learn(&mut self, header: &Header) {
        self.window = header.buf_alloc;
        self.forwarded = header.fwd_cnt;
    }

    pub(super) fn credit(&self) -> u32 {
        self.window - self.sent.wrapping_sub(self.forwarded)
    }

    /// Sends as much as credit allows. Answers how much that was.
    pub(super) fn send(&mut self, guest: &mut Guest, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() && self.credit() > 0 {
            let n = (bytes.len() - done).min(self.credit() as usize).min(60_000);
            let header = Header { len: n as u32, ..self.header(RW) };
            guest.send_raw(header, &bytes[done..done + n]);
            self.sent = self.sent.wrapping_add(n as u32);
            done += n;
        }
        done
    }

    pub(super) fn shutdown(&self, guest: &mut Guest, flags: u32) {
        guest.send_raw(Header { flags, ..self.header(SHUTDOWN) }, &[]);
    }
}

/// The host's end, on which nothing blocks, and the stream for the device.
pub(super) fn pair() -> (UnixStream, UnixStream) {
    let (host, stream) = UnixStream::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    (host, stream)
}

/// Reads what there is; `true` at the end of file.
pub(super) fn read_available(host: &mut UnixStream, into: &mut Vec<u8>, limit: usize) -> bool {
    let mut buffer = vec![0; limit];
    loop {
        match host.read(&mut buffer[..limit.min(1 << 16)]) {
            Ok(0) => return true,
            Ok(n) => {
                into.extend_from_slice(&buffer[..n]);
                if into.len() >= limit {
                    return false;
                }
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
            Err(e) => panic!("the host cannot read: {e}"),
        }
    }
}

/// Everything up to the end of file, while the device's loop turns.
pub(super) fn read_to_end(guest: &mut Guest, host: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let before = all.len();
        if read_available(host, &mut all, usize::MAX >> 40) {
            return all;
        }
        let moved = guest.look() || all.len() > before;
        assert!(moved, "stuck after {} bytes", all.len());
    }
}

/// Bytes of which each place shows.
pub(super) fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(next).collect()
}
