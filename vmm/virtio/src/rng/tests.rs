use std::io;

use super::*;
use crate::{
    Device, DeviceState,
    testing::{BUFFERS, Bench},
};

fn sevens(out: &mut [u8]) -> io::Result<()> {
    out.fill(7);
    Ok(())
}

fn active() -> Bench<Rng> {
    let mut bench = Bench::new(Rng::new(sevens).unwrap());
    bench.activate(0).unwrap();
    bench
}

fn counted(bench: &Bench<Rng>, name: &str) -> u64 {
    let metrics = bench.device.lock().unwrap().metrics();
    metrics.into_iter().find(|(n, _)| *n == name).unwrap().1
}

#[test]
fn fills_what_is_writable_and_says_how_much() {
    let mut bench = active();
    let head = bench.rings[0].offer(&[(BUFFERS, 3, true), (BUFFERS + 16, 5, true)]);
    bench.kick(0);
    assert_eq!(bench.rings[0].take_used(), Some((head, 8)));
    assert_eq!(bench.bytes(BUFFERS, 4), [7, 7, 7, 0]);
    assert_eq!(bench.bytes(BUFFERS + 16, 6), [7, 7, 7, 7, 7, 0]);
    assert!(bench.interrupted());
    assert_eq!((counted(&bench, "requests"), counted(&bench, "bytes")), (1, 8));
}

#[test]
fn a_large_request_gets_a_bounded_answer() {
    let mut bench = active();
    bench.rings[0].offer(&[(BUFFERS, 1 << 20, true)]);
    bench.kick(0);
    assert_eq!(bench.rings[0].take_used().unwrap().1, REQUEST_LIMIT as u32);
}

#[test]
fn a_request_without_room_is_answered_as_empty() {
    let mut bench = active();
    bench.rings[0].offer(&[(BUFFERS, 16, false)]);
    bench.kick(0);
    assert_eq!(bench.rings[0].take_used().unwrap().1, 0);
    assert_eq!(counted(&bench, "empty"), 1);
}

#[test]
fn without_entropy_nobody_waits() {
    let mut bench = Bench::new(Rng::new(|_| Err(io::ErrorKind::WouldBlock.into())).unwrap());
    bench.activate(0).unwrap();
    bench.rings[0].offer(&[(BUFFERS, 16, true)]);
    bench.kick(0);
    assert_eq!(bench.rings[0].take_used().unwrap().1, 0);
}

#[test]
fn a_liar_stops_the_device_until_its_reset() {
    let mut bench = active();
    bench.rings[0].offer(&[(u64::MAX - 8, 64, true)]);
    bench.kick(0);
    assert!(bench.needs_reset() && bench.interrupted());
    assert_eq!(counted(&bench, "faults"), 1);
    // What follows is not looked at.
    bench.rings[0].offer(&[(BUFFERS, 16, true)]);
    bench.kick(0);
    assert_eq!(bench.rings[0].take_used(), None);
    bench.device.lock().unwrap().reset();
    bench.rings[0] = crate::testing::DriverRing::new(&bench.memory, 0x10_0000, QUEUE_SIZE);
    bench.activate(0).unwrap();
    bench.rings[0].offer(&[(BUFFERS, 16, true)]);
    bench.kick(0);
    assert_eq!(bench.rings[0].take_used().unwrap().1, 16);
}

#[test]
fn a_kick_without_a_driver_is_nothing() {
    let mut bench = Bench::new(Rng::new(sevens).unwrap());
    bench.kick(0);
    assert!(!bench.interrupted());
}

#[test]
fn paused_it_rests_and_saved_it_goes_on_elsewhere() {
    let mut bench = active();
    bench.device.lock().unwrap().pause();
    bench.rings[0].offer(&[(BUFFERS, 16, true)]);
    bench.kick(0);
    assert_eq!(bench.rings[0].take_used(), None);

    let state = bench.device.lock().unwrap().save();
    assert_eq!(state.rings().len(), 1);
    assert!(Rng::new(sevens).unwrap().restore(&state));
    assert!(matches!(state, DeviceState::Rng(_)));

    bench.device.lock().unwrap().resume();
    assert_eq!(bench.rings[0].take_used().unwrap().1, 16);
}
