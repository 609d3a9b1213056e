use std::{
    fs::File,
    io::{self, PipeWriter, Write},
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use proptest::prelude::*;

use super::*;
use crate::{
    Device, DeviceState,
    testing::{BUFFERS as AT, Bench, DriverRing},
};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// A sink with so much room, which takes a few bytes at a time.
#[derive(Default)]
struct Sink {
    taken: Vec<u8>,
    room: usize,
    at_once: usize,
    broken: bool,
}

struct Output(Arc<Mutex<Sink>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut sink = self.0.lock().unwrap();
        if sink.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let n = bytes.len().min(sink.room).min(sink.at_once);
        if n == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        sink.room -= n;
        sink.taken.extend(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Fixture {
    bench: Bench<Console>,
    sink: Arc<Mutex<Sink>>,
    input: Option<PipeWriter>,
}

fn inactive(room: usize) -> Fixture {
    let sink = Arc::new(Mutex::new(Sink { room, at_once: 1000, ..Sink::default() }));
    let (reader, writer) = io::pipe().unwrap();
    let reader = File::from(OwnedFd::from(reader));
    let console = Console::new(Box::new(Output(sink.clone())), Some(reader)).unwrap();
    Fixture { bench: Bench::new(console), sink, input: Some(writer) }
}

fn active(room: usize) -> Fixture {
    let mut fixture = inactive(room);
    fixture.bench.activate(1 << 32).unwrap();
    fixture
}

impl Fixture {
    fn send(&mut self, bytes: &[u8]) {
        self.bench.fill(AT, bytes);
        self.bench.rings[TRANSMIT].offer(&[(AT, bytes.len() as u32, false)]);
        self.bench.kick(TRANSMIT);
        assert!(self.bench.rings[TRANSMIT].take_used().is_some(), "the guest never waits");
    }

    fn type_in(&mut self, bytes: &[u8]) {
        self.input.as_mut().unwrap().write_all(bytes).unwrap();
        self.bench.settle();
    }

    fn make_room(&mut self, len: u32) {
        self.bench.rings[RECEIVE].offer(&[(AT, len, true)]);
        self.bench.kick(RECEIVE);
    }

    fn received(&mut self) -> Option<Vec<u8>> {
        let (_, n) = self.bench.rings[RECEIVE].take_used()?;
        Some(self.bench.bytes(AT, n as usize))
    }

    fn taken(&self) -> Vec<u8> {
        std::mem::take(&mut self.sink.lock().unwrap().taken)
    }

    fn counted(&self, name: &str) -> u64 {
        let metrics = self.bench.device.lock().unwrap().metrics();
        metrics.into_iter().find(|(n, _)| *n == name).unwrap().1
    }
}

#[test]
fn what_the_guest_writes_comes_out() {
    let mut fixture = active(usize::MAX);
    fixture.send(b"Linux version");
    assert_eq!(fixture.taken(), b"Linux version");
    assert!(fixture.bench.interrupted());
    let long: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
    fixture.send(&long);
    assert_eq!(fixture.taken(), long);
    assert_eq!(fixture.counted("written_bytes"), 13 + 10_000);
    fixture.bench.rings[TRANSMIT].offer(&[(AT, 10, true)]);
    fixture.bench.kick(TRANSMIT);
    assert_eq!(fixture.bench.rings[TRANSMIT].take_used().unwrap().1, 0, "there is nothing to send in it");
}

#[test]
fn what_the_sink_has_no_room_for_is_dropped() {
    let mut fixture = active(5);
    fixture.send(b"0123456789");
    fixture.send(b"more");
    assert_eq!(fixture.taken(), b"01234");
    assert_eq!((fixture.counted("written_bytes"), fixture.counted("dropped_bytes")), (5, 9));
    fixture.sink.lock().unwrap().room = 100;
    fixture.send(b"again");
    assert_eq!(fixture.taken(), b"again");
    fixture.sink.lock().unwrap().broken = true;
    fixture.send(b"lost");
    assert_eq!((fixture.counted("dropped_bytes"), fixture.counted("failures")), (13, 1));
}

#[test]
fn a_request_and_a_turn_are_bounded() {
    let mut fixture = active(usize::MAX);
    fixture.bench.rings[TRANSMIT].offer(&[(0, 4 << 20, false)]);
    fixture.bench.kick(TRANSMIT);
    assert_eq!(fixture.taken().len() as u64, REQUEST_LIMIT);
    assert_eq!(fixture.counted("dropped_bytes"), (4 << 20) - REQUEST_LIMIT);
    for _ in 0..20 {
        fixture.bench.rings[TRANSMIT].offer(&[(0, REQUEST_LIMIT as u32, false)]);
    }
    fixture.bench.device.lock().unwrap().kicks()[TRANSMIT].write(1).unwrap();
    fixture.bench.turn(0);
    assert_eq!(fixture.taken().len() as u64, TURN);
    fixture.bench.settle();
    assert_eq!(fixture.taken().len() as u64, 20 * REQUEST_LIMIT - TURN);
}

#[test]
fn what_is_typed_reaches_the_guest_when_it_has_room() {
    let mut fixture = active(0);
    fixture.type_in(b"hello");
    assert_eq!(fixture.received(), None);
    fixture.make_room(3);
    assert_eq!(fixture.received().unwrap(), b"hel");
    fixture.make_room(100);
    assert_eq!(fixture.received().unwrap(), b"lo");
    assert!(fixture.bench.interrupted());
    // Room that waits for input.
    fixture.make_room(100);
    assert_eq!(fixture.received(), None);
    fixture.type_in(b"later");
    assert_eq!(fixture.received().unwrap(), b"later");
    fixture.make_room(100);
    fixture.type_in(b"and later");
    assert_eq!(fixture.received().unwrap(), b"and later");
    assert_eq!(fixture.counted("read_bytes"), 19);
}

#[test]
fn much_input_comes_in_pieces_and_in_turns() {
    let mut fixture = active(0);
    let all = vec![b'x'; 50_000];
    fixture.type_in(&all);
    for _ in 0..QUEUE_SIZE {
        fixture.bench.rings[RECEIVE].offer(&[(AT, 1 << 20, true)]);
    }
    fixture.bench.kick(RECEIVE);
    let mut got = 0;
    while let Some((_, n)) = fixture.bench.rings[RECEIVE].take_used() {
        assert!(n as usize <= PIECE);
        got += n;
    }
    assert_eq!(got, 50_000);
}

#[test]
fn room_for_nothing_is_given_back_and_is_not_the_end() {
    let mut fixture = active(0);
    fixture.type_in(b"x");
    fixture.bench.rings[RECEIVE].offer(&[(AT, 10, false)]);
    fixture.bench.kick(RECEIVE);
    assert_eq!(fixture.bench.rings[RECEIVE].take_used().unwrap().1, 0);
    fixture.make_room(1);
    assert_eq!(fixture.received().unwrap(), b"x");
}

#[test]
fn at_the_end_of_the_input_there_is_peace() {
    let mut fixture = active(usize::MAX);
    fixture.make_room(10);
    fixture.type_in(b"bye");
    assert_eq!(fixture.received().unwrap(), b"bye");
    fixture.make_room(10);
    fixture.input = None;
    fixture.bench.settle();
    assert_eq!(fixture.bench.turn(0), 0, "an end that is no news");
    fixture.make_room(10);
    assert_eq!(fixture.received(), None);
    fixture.send(b"the guest goes on");
    assert_eq!(fixture.taken(), b"the guest goes on");
}

#[test]
fn input_before_there_is_a_driver_waits_for_it() {
    let mut fixture = inactive(0);
    fixture.type_in(b"early");
    fixture.bench.activate(1 << 32).unwrap();
    fixture.make_room(10);
    assert_eq!(fixture.received().unwrap(), b"early");
}

#[test]
fn without_an_input_room_is_left_alone() {
    let console = Console::new(Box::new(io::sink()), None).unwrap();
    let mut bench = Bench::new(console);
    bench.activate(1 << 32).unwrap();
    bench.rings[RECEIVE].offer(&[(AT, 10, true)]);
    bench.kick(RECEIVE);
    assert_eq!(bench.rings[RECEIVE].take_used(), None);
}

#[test]
fn a_liar_stops_the_device_until_its_reset() {
    let mut fixture = active(usize::MAX);
    fixture.bench.rings[TRANSMIT].offer(&[(u64::MAX - 4, 16, false)]);
    fixture.bench.kick(TRANSMIT);
    assert!(fixture.bench.needs_reset());
    assert_eq!(fixture.counted("faults"), 1);
    fixture.bench.device.lock().unwrap().reset();
    for ring in 0..2 {
        let at = 0x10_0000 * (ring as u64 + 1);
        fixture.bench.rings[ring] = DriverRing::new(&fixture.bench.memory, at, QUEUE_SIZE);
    }
    fixture.bench.activate(1 << 32).unwrap();
    fixture.send(b"again");
    assert_eq!(fixture.taken(), b"again");
}

#[test]
fn paused_it_rests_and_saved_it_goes_on_elsewhere() {
    let mut fixture = active(usize::MAX);
    fixture.send(b"one");
    fixture.taken();
    fixture.bench.device.lock().unwrap().pause();
    fixture.bench.fill(AT, b"two");
    fixture.bench.rings[TRANSMIT].offer(&[(AT, 3, false)]);
    fixture.bench.kick(TRANSMIT);
    fixture.bench.rings[RECEIVE].offer(&[(AT + 64, 10, true)]);
    fixture.bench.kick(RECEIVE);
    fixture.type_in(b"in");
    assert_eq!(fixture.taken(), b"");
    let state = fixture.bench.device.lock().unwrap().save();
    assert_eq!(state.rings().iter().map(|r| r.next_avail).collect::<Vec<_>>(), [0, 1]);
    let other = inactive(0);
    assert!(other.bench.device.lock().unwrap().restore(&state));
    let wrong = DeviceState::Rng(crate::rng::State::default());
    assert!(!other.bench.device.lock().unwrap().restore(&wrong));
    fixture.bench.device.lock().unwrap().resume();
    assert_eq!(fixture.taken(), b"two");
    assert_eq!(fixture.bench.rings[RECEIVE].take_used().unwrap().1, 2);
    assert_eq!(fixture.bench.bytes(AT + 64, 2), b"in");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a sink takes and when, each byte is written once, in order, or counted as dropped.
    #[test]
    fn bytes_are_written_or_counted(
        sends in prop::collection::vec((1usize..3000, 0usize..4000, 1usize..2000), 1..20),
    ) {
        let mut fixture = active(0);
        let mut all = 0;
        for (len, room, at_once) in sends {
            {
                let mut sink = fixture.sink.lock().unwrap();
                (sink.room, sink.at_once) = (room, at_once);
            }
            let bytes: Vec<u8> = (0..len).map(|n| n as u8).collect();
            fixture.send(&bytes);
            prop_assert_eq!(fixture.taken(), &bytes[..len.min(room)]);
            all += len as u64;
        }
        prop_assert_eq!(fixture.counted("written_bytes") + fixture.counted("dropped_bytes"), all);
    }
}
