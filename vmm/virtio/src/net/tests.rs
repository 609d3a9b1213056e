use std::{
    io::ErrorKind,
    os::{fd::AsRawFd, unix::net::UnixDatagram},
};

use virtio_bindings::{virtio_net::*, virtio_ring::VIRTIO_RING_F_EVENT_IDX};

use super::*;
use crate::{
    Device, DeviceState,
    testing::{BUFFERS, Bench, DriverRing},
};

mod hostile;
mod kernel;
mod vhost;

const MAC: [u8; 6] = [0x52, 0, 0, 0, 0, 7];
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
/// Where the tests put what the guest sends.
const SENT: u64 = BUFFERS + (4 << 20);

/// A card with the other end of its wire.
struct Card {
    bench: Bench<Net>,
    wire: UnixDatagram,
}

fn sockets() -> (UnixDatagram, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    (near, far)
}

impl Card {
    fn new(features: u64) -> Self {
        let (near, wire) = sockets();
        let mut bench = Bench::new(Net::on_socket(near, MAC, Some(1500)).unwrap());
        bench.activate(features).unwrap();
        bench.settle();
        Self { bench, wire }
    }

    /// Offers a buffer for a frame, `len` bytes at the `n`th of them.
    fn offer(&mut self, n: u64, len: u32) -> u16 {
        self.bench.rings[RX].offer(&[(BUFFERS + 0x2_0000 * n, len, true)])
    }

    /// A frame arrives.
    fn arrive(&mut self, frame: &[u8]) {
        self.wire.send(frame).unwrap();
        self.bench.settle();
    }

    /// The guest sends these buffers as they are.
    fn send(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.bench.rings[TX].offer(buffers);
        self.bench.kick(TX);
        head
    }

    /// What came out of the wire.
    fn sent(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 17];
        match self.wire.recv(&mut frame) {
            Ok(n) => {
                frame.truncate(n);
                Some(frame)
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                None
            }
        }
    }

    fn counted(&self, name: &str) -> u64 {
        let metrics = self.bench.device.lock().unwrap().metrics();
        metrics.into_iter().find(|(n, _)| *n == name).unwrap().1
    }
}

/// A header that says nothing, and a frame of `len` bytes that differ.
fn frame(len: usize) -> Vec<u8> {
    (0..HEADER + len).map(|n| if n < HEADER { 0 } else { (n * 7 + n / 256) as u8 }).collect()
}

/// What the guest finds for `frame` in `buffers` buffers.
fn delivered(frame: &[u8], buffers: u16) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[NUM_BUFFERS as usize..HEADER].copy_from_slice(&buffers.to_le_bytes());
    frame
}

#[test]
fn a_frame_arrives_in_one_buffer() {
    for features in [0, MERGE, MERGE | 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut card = Card::new(features);
        let head = card.offer(0, 2048);
        card.bench.kick(RX);
        assert!(!card.bench.interrupted());
        let frame = frame(1514);
        card.arrive(&frame);
        assert_eq!(card.bench.rings[RX].take_used(), Some((head, frame.len() as u32)));
        assert_eq!(card.bench.bytes(BUFFERS, frame.len()), delivered(&frame, 1));
        assert!(card.bench.interrupted());
        assert_eq!((card.counted("rx_frames"), card.counted("rx_bytes")), (1, 1526));
    }
}

#[test]
fn frames_wait_for_buffers_without_a_busy_loop() {
    for features in [0, MERGE, MERGE | 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut card = Card::new(features);
        card.arrive(&frame(100));
        card.arrive(&frame(200));
        assert_eq!(card.bench.turn(0), 0, "nothing to do without buffers");
        let first = card.offer(0, 2048);
        card.bench.kick(RX);
        assert_eq!(card.bench.rings[RX].take_used(), Some((first, 112)));
        assert_eq!(card.bench.rings[RX].take_used(), None);
        let second = card.offer(1, 2048);
        card.bench.kick(RX);
        assert_eq!(card.bench.rings[RX].take_used(), Some((second, 212)));
    }
}

#[test]
fn a_large_frame_goes_over_several_buffers() {
    let features = MERGE | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let mut card = Card::new(0);
    card.bench.device.lock().unwrap().reset();
    // The socket's stand-in has no offloads to refuse.
    card.bench.activate(features).unwrap();
    card.bench.settle();
    let heads: Vec<u16> = (0..5).map(|n| card.offer(n, 1500)).collect();
    card.bench.kick(RX);
    let large = frame(4000);
    card.arrive(&large);
    let used: Vec<_> = std::iter::from_fn(|| card.bench.rings[RX].take_used()).collect();
    assert_eq!(used, [(heads[0], 1500), (heads[1], 1500), (heads[2], 1012)]);
    let found: Vec<u8> = [(0, 1500), (1, 1500), (2, 1012)]
        .iter()
        .flat_map(|&(n, len)| card.bench.bytes(BUFFERS + 0x2_0000 * n, len))
        .collect();
    assert_eq!(found, delivered(&large, 3));
    // The next one begins in the next buffer.
    card.arrive(&frame(60));
    assert_eq!(card.bench.rings[RX].take_used(), Some((heads[3], 72)));
}

#[test]
fn a_frame_larger_than_what_is_offered_goes_on_when_there_is_more() {
    let mut card = Card::new(MERGE);
    let first = card.offer(0, 100);
    card.bench.kick(RX);
    let large = frame(60000);
    card.arrive(&large);
    assert_eq!(card.bench.rings[RX].take_used(), None, "all or nothing");
    let second = card.offer(1, 100);
    card.bench.kick(RX);
    assert_eq!(card.bench.rings[RX].take_used(), None);
    let third = card.offer(2, 1 << 16);
    card.bench.kick(RX);
    let used: Vec<_> = std::iter::from_fn(|| card.bench.rings[RX].take_used()).collect();
    assert_eq!(used, [(first, 100), (second, 100), (third, 59812)]);
    let found = [
        card.bench.bytes(BUFFERS, 100),
        card.bench.bytes(BUFFERS + 0x2_0000, 100),
        card.bench.bytes(BUFFERS + 0x4_0000, 59812),
    ];
    assert_eq!(found.concat(), delivered(&large, 3));
    assert_eq!(card.counted("rx_frames"), 1);
}

#[test]
fn without_merging_a_frame_too_large_is_dropped_and_the_buffer_serves_the_next() {
    let mut card = Card::new(0);
    let head = card.offer(0, 100);
    card.offer(1, 4096);
    card.bench.kick(RX);
    card.arrive(&frame(500));
    assert_eq!(card.counted("rx_too_small"), 1);
    assert_eq!(card.bench.rings[RX].take_used(), None);
    card.arrive(&frame(60));
    assert_eq!(card.bench.rings[RX].take_used(), Some((head, 72)));
}

#[test]
fn the_guest_sends() {
    for features in [0, MERGE | 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut card = Card::new(features);
        let frame = frame(1000);
        card.bench.fill(SENT, &frame);
        // The header over three buffers, one of them empty, and the third with a part of the frame.
        let head = card.send(&[
            (SENT, 5, false),
            (SENT + 5, 0, false),
            (SENT + 5, 6, false),
            (SENT + 11, 101, false),
            (SENT + 112, 900, false),
        ]);
        assert_eq!(card.bench.rings[TX].take_used(), Some((head, 0)));
        assert_eq!(card.sent(), Some(frame));
        assert_eq!((card.counted("tx_frames"), card.counted("tx_bytes")), (1, 1012));
    }
}

#[test]
fn a_full_wire_holds_the_guest_until_there_is_room() {
    let mut card = Card::new(0);
    let frame = frame(60000);
    card.bench.fill(SENT, &frame);
    for _ in 0..20 {
        card.bench.rings[TX].offer(&[(SENT, frame.len() as u32, false)]);
    }
    card.bench.kick(TX);
    assert!(card.counted("tx_blocked") > 0, "a socket holds less than 20 of them");
    assert_eq!(card.bench.turn(0), 0, "no busy loop while there is no room");
    let mut arrived = 0;
    while let Some(bytes) = card.sent() {
        assert_eq!(bytes.len(), frame.len());
        arrived += 1;
        card.bench.settle();
    }
    assert_eq!(arrived, 20);
    assert_eq!(std::iter::from_fn(|| card.bench.rings[TX].take_used()).count(), 20);
}

#[test]
fn the_configuration_says_what_there_is() {
    let card = Card::new(0);
    let device = card.bench.device.lock().unwrap();
    let mut config = [0xff; 12];
    device.read_config(0, &mut config);
    assert_eq!(config, [0x52, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0xdc, 5]);
    let mut beyond = [0; 4];
    device.read_config(10, &mut beyond);
    assert_eq!(beyond, [0xdc, 5, 0, 0]);
    device.read_config(u64::MAX, &mut beyond);
    assert_ne!(device.features() & 1 << VIRTIO_NET_F_MTU, 0);
    assert!(!device.uses_vhost());
}

#[test]
fn what_cannot_be_a_card_is_refused_with_a_reason() {
    let on = |mac, mtu| Net::on_socket(sockets().0, mac, mtu).err().unwrap().to_string();
    assert!(on([1, 0, 0, 0, 0, 1], None).contains("multicast"));
    assert!(on(MAC, Some(67)).contains("below 68"));
    let file = || std::fs::File::open("/dev/null").unwrap();
    let config = NetConfig { tap: file(), mac: MAC, mtu: None, vhost: None };
    assert!(Net::new(config).err().unwrap().to_string().contains("no tap"));
}

#[test]
fn paused_it_rests_and_what_it_held_is_given_back() {
    let mut card = Card::new(MERGE);
    let heads: Vec<u16> = (0..3).map(|n| card.offer(n, 2048)).collect();
    card.bench.kick(RX);
    card.arrive(&frame(100));
    assert_eq!(card.bench.rings[RX].take_used(), Some((heads[0], 112)));
    card.bench.device.lock().unwrap().pause();
    let state = card.bench.device.lock().unwrap().save();
    assert_eq!(state.rings()[RX].next_avail, 1, "as its driver sees it");
    assert_eq!(state.rings()[RX].next_used, 1);

    card.arrive(&frame(200));
    card.bench.fill(SENT, &frame(50));
    card.send(&[(SENT, 62, false)]);
    assert_eq!((card.bench.rings[RX].take_used(), card.sent()), (None, None));
    card.bench.device.lock().unwrap().resume();
    card.bench.settle();
    assert_eq!(card.bench.rings[RX].take_used(), Some((heads[1], 212)));
    assert_eq!(card.sent(), Some(frame(50)));
}

#[test]
fn saved_it_goes_on_elsewhere() {
    let mut card = Card::new(MERGE);
    let heads: Vec<u16> = (0..2).map(|n| card.offer(n, 2048)).collect();
    card.bench.kick(RX);
    card.arrive(&frame(100));
    card.bench.rings[RX].take_used().unwrap();
    card.bench.device.lock().unwrap().pause();
    let state = card.bench.device.lock().unwrap().save();

    let (near, far) = sockets();
    let mut other = Net::on_socket(near, [2, 0, 0, 0, 0, 9], None).unwrap();
    assert!(other.restore(&state));
    let mut mac = [0; 6];
    other.read_config(0, &mut mac);
    assert_eq!(mac, MAC, "what the driver was told");
    let queues = state.rings().iter().map(|ring| ring.queue().unwrap()).collect();
    let mut bench = Bench::new(other);
    let activation = crate::Activation {
        memory: card.bench.memory.clone(),
        features: MERGE,
        queues,
        interrupt: bench.interrupt.clone(),
    };
    bench.device.lock().unwrap().activate(activation).unwrap();
    bench.settle();
    far.send(&frame(300)).unwrap();
    bench.settle();
    assert_eq!(card.bench.rings[RX].take_used(), Some((heads[1], 312)));

    let DeviceState::Net(state) = state else { panic!("another kind of state") };
    let needy = DeviceState::Net(State { offload: 1 << 31, ..state });
    assert!(!Net::on_socket(sockets().0, MAC, None).unwrap().restore(&needy), "this tap cannot");
}

#[test]
fn a_new_driver_does_not_get_the_last_ones_frames() {
    let mut card = Card::new(0);
    card.bench.device.lock().unwrap().reset();
    card.arrive(&frame(100));
    card.bench.rings = rings(&card);
    card.bench.activate(0).unwrap();
    let head = card.offer(0, 2048);
    card.bench.kick(RX);
    assert_eq!(card.bench.rings[RX].take_used(), None);
    assert_eq!(card.counted("rx_dropped"), 1);
    card.arrive(&frame(60));
    assert_eq!(card.bench.rings[RX].take_used(), Some((head, 72)));
}

/// Fresh rings elsewhere in memory, as of a driver that begins anew.
fn rings(card: &Card) -> Vec<DriverRing> {
    [0x10_0000, 0x20_0000].map(|at| DriverRing::new(&card.bench.memory, at, QUEUE_SIZE)).into()
}
