//! Pause, resume, reset, save and restore.

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
};

use super::{BUFFER, driver::*};
use crate::{
    Device, DeviceState,
    testing::BUFFERS,
    vsock::{State, packet::*},
};

#[test]
fn paused_it_touches_nothing_and_resumed_it_goes_on() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    guest.bench.device.lock().unwrap().pause();
    host.write_all(b"for the guest").unwrap();
    guest.offer_packet(Header { len: 13, ..end.header(RW) }, b"for the host.");
    end.sent = 13;
    guest.bench.kick(1);
    assert_eq!(guest.bench.rings[1].take_used(), None);
    let mut called = guest.called(b"CONNECT 7\n");
    guest.silent();
    assert_eq!(host.read(&mut [0; 16]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(guest.bench.turn(0), 0, "the loop does not spin");

    guest.bench.device.lock().unwrap().resume();
    guest.look();
    assert!(guest.bench.rings[1].take_used().is_some());
    let mut bytes = [0; 16];
    assert_eq!(host.read(&mut bytes).unwrap(), 13);
    let mut ops = [guest.next(), guest.next()];
    ops.sort_by_key(|(header, _)| header.op);
    assert_eq!((ops[0].0.op, ops[1].0.op, ops[1].1.as_slice()), (REQUEST, RW, &b"for the guest"[..]));
    end.learn(&ops[1].0);
    end.send(&mut guest, b"more");
    assert_eq!(host.read(&mut bytes).unwrap(), 4);
    assert_eq!(called.read(&mut bytes).unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn what_happened_at_a_paused_host_is_seen_at_the_resume() {
    let mut guest = Guest::new(BUFFER);
    let (_, host) = guest.connect(GUEST_PORT);
    let dialing = End::new(HOST_PORT, 8);
    guest.send_raw(dialing.header(REQUEST), &[]);
    let (id, _) = guest.dials.lock().unwrap().pop().unwrap();
    {
        let mut device = guest.bench.device.lock().unwrap();
        device.pause();
        device.dialed(id, None);
    }
    drop(host);
    guest.silent();
    guest.bench.device.lock().unwrap().resume();
    let mut ops = [guest.next_op(), guest.next_op()];
    ops.sort();
    assert_eq!(ops, [RST, SHUTDOWN]);
}

#[test]
fn a_reset_closes_everything_and_it_starts_again() {
    let mut guest = Guest::new(BUFFER);
    for round in 0..3 {
        let (_, mut host) = guest.connect(GUEST_PORT);
        let mut called = guest.called(b"CONNECT 7\n");
        let mut greeting = guest.called(b"CONN");
        assert_eq!(guest.held().0, 3, "round {round}");
        guest.bench.device.lock().unwrap().reset();
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
        assert_eq!(called.read(&mut [0]).unwrap(), 0);
        assert_eq!(greeting.read(&mut [0]).unwrap(), 0);
        // Whoever connects before the driver is back waits for it.
        let late = guest.called(b"CONNECT 9\n");
        guest.bench.settle();
        guest.start_again();
        assert_eq!(guest.next().0.dst_port, 9);
        drop(late);
        assert_eq!(guest.next_op(), RST);
    }
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let mut guest = Guest::new(BUFFER);
    let (_, mut host) = guest.connect(GUEST_PORT);
    guest.bench.device.lock().unwrap().pause();
    let state = guest.bench.device.lock().unwrap().save();
    assert_eq!(state.rings().len(), 3);
    assert!(matches!(&state, DeviceState::Vsock(State { cid: CID, .. })));

    // The same memory under a new device, as after the restore of a machine.
    let (mut fresh, dials) = device(None);
    assert!(fresh.restore(&state));
    let queues = state.rings().iter().map(|ring| ring.queue().unwrap()).collect();
    let (memory, interrupt) = (guest.bench.memory.clone(), guest.bench.interrupt.clone());
    fresh.activate(crate::Activation { memory, features: 0, queues, interrupt }).unwrap();
    fresh.pause();
    guest.dials = dials;
    *guest.bench.device.lock().unwrap() = fresh;
    assert_eq!(host.read(&mut [0]).unwrap(), 0);

    // The event waits for a buffer, if it must. A new loop is not needed: the resume looks at all.
    let event = guest.bench.rings[2].offer(&[(BUFFERS + (7 << 20), 4, true)]);
    guest.bench.fill(BUFFERS + (7 << 20), &[0xff; 4]);
    guest.bench.device.lock().unwrap().resume();
    assert_eq!(guest.bench.rings[2].take_used(), Some((event, 4)));
    assert_eq!(guest.bench.bytes(BUFFERS + (7 << 20), 4), [0; 4]);
    // Told once; and the old connection is unknown.
    guest.bench.rings[2].offer(&[(BUFFERS + (7 << 20), 4, true)]);
    guest.offer_packet(End::new(HOST_PORT, GUEST_PORT).header(RW), &[]);
    guest.bench.device.lock().unwrap().resume();
    assert_eq!(guest.bench.rings[2].take_used(), None);
    assert_eq!(guest.next_op(), RST);
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let (mut fresh, _) = device(None);
    assert!(!fresh.restore(&DeviceState::Rng(Default::default())));
    assert!(!fresh.restore(&DeviceState::Vsock(State { cid: 2, rings: vec![] })));
}

#[test]
fn a_dead_device_leaves_no_host_waiting() {
    let mut guest = Guest::new(BUFFER);
    let (_, mut host) = guest.connect(GUEST_PORT);
    guest.bench.rings[1].offer(&[(u64::MAX - 8, 64, false)]);
    guest.bench.kick(1);
    assert!(guest.bench.needs_reset());
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    // And it answers nobody until its reset.
    let _waiting: UnixStream = guest.called(b"CONNECT 7\n");
    guest.bench.settle();
    assert_eq!(guest.held().0, 0);
}
