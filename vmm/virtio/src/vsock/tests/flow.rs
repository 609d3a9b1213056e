//! Credit, bulk data and turns.

use std::{
    io::{ErrorKind, Write},
    os::unix::net::UnixStream,
};

use super::{super::*, BUFFER, driver::*};
use crate::vsock::packet::*;

const MEGABYTES: usize = 10 << 20;

/// Moves bytes both ways at once until all have arrived. The host takes at most `host_pace` bytes in a
/// turn, the guest at most `guest_pace` packets.
fn exchange(buffer: u32, host_pace: usize, guest_pace: usize, len: usize) {
    let mut guest = Guest::new(buffer);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    let (up, down) = (pattern(len), pattern(len + 1)[1..].to_vec());
    let (mut sent, mut written) = (0, 0);
    let (mut at_host, mut at_guest) = (Vec::with_capacity(len), Vec::with_capacity(len));
    while at_host.len() < len || at_guest.len() < len {
        let before = (sent, written, at_host.len(), at_guest.len());
        sent += end.send(&mut guest, &up[sent..]);
        match host.write(&down[written..]) {
            Ok(n) => written += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => panic!("{e}"),
        }
        let mut piece = Vec::new();
        assert!(!read_available(&mut host, &mut piece, host_pace));
        at_host.extend(piece);
        let mut moved = guest.look();
        for _ in 0..guest_pace {
            let Some((header, data)) = guest.inbox.pop_front() else { break };
            end.learn(&header);
            moved = true;
            match header.op {
                RW => {
                    at_guest.extend_from_slice(&data);
                    let under_way = (at_guest.len() as u32).wrapping_sub(end.taken);
                    assert!(under_way <= end.own_window, "the guest's credit is kept");
                    // As Linux: told where a quarter of the room is used.
                    if under_way > end.own_window / 4 {
                        end.taken = at_guest.len() as u32;
                        guest.send_raw(end.header(CREDIT_UPDATE), &[]);
                    }
                }
                CREDIT_REQUEST => {
                    end.taken = at_guest.len() as u32;
                    guest.send_raw(end.header(CREDIT_UPDATE), &[]);
                }
                CREDIT_UPDATE => {}
                op => panic!("operation {op}"),
            }
        }
        let after = (sent, written, at_host.len(), at_guest.len());
        assert!(moved || after != before, "stuck at {after:?}");
        assert!(guest.held().2 <= WIDE_WINDOW as usize);
    }
    // Whole, and in order: stronger than any checksum.
    assert!(at_host == up && at_guest == down);
    assert_eq!(guest.counted("credit_violations"), 0);
}

#[test]
fn ten_megabytes_both_ways_with_buffers_as_linux_has_them() {
    exchange(BUFFER, 1 << 20, usize::MAX, MEGABYTES);
}

#[test]
fn ten_megabytes_both_ways_with_large_buffers() {
    exchange(32 << 10, 1 << 20, usize::MAX, MEGABYTES);
}

#[test]
fn ten_megabytes_to_a_slow_host_and_a_slow_guest() {
    exchange(BUFFER, 10_000, 3, MEGABYTES);
}

#[test]
fn bytes_through_tiny_buffers() {
    exchange(HEADER as u32 + 1, 100, 5, 5_000);
}

#[test]
fn a_guest_beyond_its_credit_is_reset() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    // The host does not read: its socket fills, then the device's window.
    let bytes = pattern(60_000);
    while end.send(&mut guest, &bytes) > 0 {
        while let Some((header, _)) = guest.try_next() {
            end.learn(&header);
        }
    }
    assert_eq!(end.credit(), 0);
    assert!(guest.held().2 <= WIDE_WINDOW as usize);
    guest.send_raw(Header { len: 1, ..end.header(RW) }, b"!");
    assert_eq!(guest.next_op(), RST);
    assert_eq!((guest.counted("credit_violations"), guest.held()), (1, (0, 0, 0)));
    assert!(!read_to_end(&mut guest, &mut host).is_empty());
}

#[test]
fn credit_comes_back_as_the_host_reads() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    let bytes = pattern(60_000);
    let mut sent = 0;
    loop {
        let n = end.send(&mut guest, &bytes);
        sent += n;
        while let Some((header, _)) = guest.try_next() {
            end.learn(&header);
        }
        if n == 0 {
            break;
        }
    }
    let mut read = Vec::new();
    while read.len() < sent {
        let mut piece = Vec::new();
        read_available(&mut host, &mut piece, 30_000);
        assert!(!piece.is_empty());
        read.extend(piece);
        while let Some((header, _)) = guest.try_next() {
            assert_eq!(header.op, CREDIT_UPDATE);
            end.learn(&header);
        }
    }
    assert!(end.credit() >= WIDE_WINDOW / 4 * 3, "{}", end.credit());
    assert_eq!(guest.held().2, 0, "the memory is given back");
    // Asked, it says it to the byte.
    guest.send_raw(end.header(CREDIT_REQUEST), &[]);
    let (header, _) = guest.next();
    assert_eq!((header.op, header.fwd_cnt as usize, header.buf_alloc), (CREDIT_UPDATE, sent, WIDE_WINDOW));
}

#[test]
fn a_guest_with_a_small_buffer_of_its_own_is_told_in_time() {
    // Linux sends no more than its own window, whatever ours is, and does not ask.
    let mut guest = Guest::new(BUFFER);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    end.own_window = 4096;
    let mut sent = 0;
    while sent < 300_000 {
        let before = sent;
        read_available(&mut host, &mut Vec::new(), 1 << 16);
        while end.sent.wrapping_sub(end.forwarded) < 4096 {
            sent += end.send(&mut guest, &[1; 512]);
        }
        while let Some((header, _)) = guest.try_next() {
            end.learn(&header);
        }
        assert!(sent > before, "stuck at {sent}");
    }
}

#[test]
fn a_guest_without_room_is_asked_once_and_gets_no_more_than_it_has_room_for() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    end.own_window = 10;
    guest.send_raw(end.header(CREDIT_UPDATE), &[]);
    host.write_all(b"0123456789abcdef").unwrap();
    assert_eq!(guest.next().1, b"0123456789");
    assert_eq!(guest.next_op(), CREDIT_REQUEST);
    host.write_all(b"g").unwrap();
    guest.silent();
    // A guest that shrinks its room below what is in it has none.
    end.own_window = 4;
    guest.send_raw(end.header(CREDIT_UPDATE), &[]);
    guest.silent();
    end.taken = 10;
    guest.send_raw(end.header(CREDIT_UPDATE), &[]);
    assert_eq!(guest.next().1, b"abcd");
    assert_eq!(guest.next_op(), CREDIT_REQUEST);
    // One that took more than it got has none, either.
    end.taken = 1000;
    guest.send_raw(end.header(CREDIT_UPDATE), &[]);
    guest.silent();
    end.taken = 14;
    guest.send_raw(end.header(CREDIT_UPDATE), &[]);
    assert_eq!(guest.next().1, b"efg");
}

/// Fills the host's socket and then part of the device's window. Answers all that was sent.
fn stuff(guest: &mut Guest, end: &mut End) -> Vec<u8> {
    let bytes = pattern(1 << 20);
    let mut sent = 0;
    while guest.held().2 == 0 {
        sent += end.send(guest, &bytes[sent..sent + 50_000]);
        while let Some((header, _)) = guest.try_next() {
            end.learn(&header);
        }
    }
    bytes[..sent].to_vec()
}

#[test]
fn a_close_with_bytes_in_flight_is_answered_when_they_arrived() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    let sent = stuff(&mut guest, &mut end);
    end.shutdown(&mut guest, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    guest.silent();
    assert_eq!(guest.held().0, 1);
    assert!(read_to_end(&mut guest, &mut host) == sent);
    let ops: Vec<u16> = std::iter::from_fn(|| guest.try_next()).map(|(h, _)| h.op).collect();
    assert_eq!(ops.last(), Some(&RST), "{ops:?}");
    assert_eq!(guest.held(), (0, 0, 0));
}

#[test]
fn a_guest_that_waits_no_longer_loses_no_bytes_and_has_its_port_back() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    let sent = stuff(&mut guest, &mut end);
    end.shutdown(&mut guest, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    guest.send_raw(end.header(RST), &[]);
    guest.silent();
    let (mut again, mut other) = guest.connect(GUEST_PORT);
    again.send(&mut guest, b"anew");
    assert!(read_to_end(&mut guest, &mut host) == sent);
    let mut bytes = Vec::new();
    assert!(!read_available(&mut other, &mut bytes, 4));
    assert_eq!(bytes, b"anew");
    assert_eq!(guest.held().0, 1);
}

#[test]
fn a_host_that_dies_with_bytes_in_flight_frees_them() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, host) = guest.connect(GUEST_PORT);
    stuff(&mut guest, &mut end);
    drop(host);
    let ops: Vec<(u16, u32)> =
        std::iter::from_fn(|| guest.try_next()).map(|(h, _)| (h.op, h.flags)).collect();
    assert_eq!(ops[0], (SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE), "{ops:?}");
    assert_eq!(guest.held(), (1, 0, 0));
}

#[test]
fn what_the_host_wrote_before_it_closed_reaches_a_slow_guest() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    end.own_window = 5_000;
    guest.send_raw(end.header(CREDIT_UPDATE), &[]);
    let bytes = pattern(100_000);
    host.write_all(&bytes).unwrap();
    drop(host);
    let mut got = Vec::new();
    loop {
        let (header, data) = guest.next();
        got.extend(data);
        match header.op {
            RW => {}
            CREDIT_REQUEST => {
                end.taken = got.len() as u32;
                guest.send_raw(end.header(CREDIT_UPDATE), &[]);
            }
            op => {
                assert_eq!((op, header.flags), (SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
                break;
            }
        }
    }
    assert!(got == bytes);
}

#[test]
fn two_hundred_connections_and_a_busy_one_take_turns() {
    let mut guest = Guest::new(BUFFER);
    let (mut hungry, mut busy) = guest.connect(1);
    hungry.own_window = u32::MAX;
    guest.send_raw(hungry.header(CREDIT_UPDATE), &[]);
    let mut others: Vec<(End, UnixStream)> = (2..202).map(|port| guest.connect(port)).collect();
    for (end, host) in &mut others {
        host.write_all(&end.guest_port.to_le_bytes()).unwrap();
    }
    guest.refill = false;
    let mut of_busy = 0;
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < others.len() {
        // It never runs dry, and buffers come one by one.
        while busy.write(&[7; 1 << 16]).is_ok() {}
        if guest.inbox.is_empty() && !guest.look() {
            guest.offer_buffers(1);
        }
        let (header, data) = guest.next();
        if header.dst_port == 1 {
            of_busy += 1;
            assert!(of_busy <= 2 * others.len(), "{} were served meanwhile", seen.len());
        } else {
            assert_eq!(data, header.dst_port.to_le_bytes());
            assert!(seen.insert(header.dst_port));
        }
    }
    guest.refill = true;
    for (end, host) in &mut others {
        end.send(&mut guest, &end.guest_port.to_le_bytes());
        let mut bytes = Vec::new();
        read_available(host, &mut bytes, 4);
        assert_eq!(bytes, end.guest_port.to_le_bytes());
    }
}

#[test]
fn without_buffers_everything_waits_and_nothing_is_lost() {
    let mut guest = Guest::inactive(BUFFER);
    guest.bench.activate(0).unwrap();
    guest.refill = false;
    let end = End::new(HOST_PORT, GUEST_PORT);
    guest.send_raw(end.header(REQUEST), &[]);
    let (id, _) = guest.dials.lock().unwrap().pop().unwrap();
    let (mut host, stream) = pair();
    guest.bench.device.lock().unwrap().dialed(id, Some(stream));
    host.write_all(b"hello").unwrap();
    drop(host);
    guest.silent();
    for (op, data) in [(RESPONSE, &b""[..]), (RW, b"hello"), (SHUTDOWN, b"")] {
        guest.offer_buffers(1);
        let packet = guest.next();
        assert_eq!((packet.0.op, packet.1.as_slice()), (op, data));
        guest.silent();
    }
}

#[test]
fn a_guest_is_interrupted_only_where_it_wants_to_be() {
    let mut guest = Guest::new(BUFFER);
    let (_, mut host) = guest.connect(GUEST_PORT);
    guest.bench.interrupted();
    guest.bench.kick(0);
    guest.bench.kick(2);
    host.write_all(b"x").unwrap();
    guest.bench.settle();
    assert!(!guest.bench.interrupted(), "it still looks at the ring");
    // used_event, behind the entries of the available ring: the next one after RESPONSE and this byte.
    let at = guest.bench.rings[0].available + 4 + 2 * u64::from(QUEUE_SIZE);
    guest.bench.fill(at, &2_u16.to_le_bytes());
    host.write_all(b"y").unwrap();
    guest.bench.settle();
    assert!(guest.bench.interrupted());
}
