//! What no honest guest does.

use std::{io::Write, os::unix::net::UnixStream};

use proptest::prelude::*;

use super::{super::*, BUFFER, driver::*};
use crate::{Device, testing::BUFFERS, vsock::packet::*};

#[test]
fn every_lie_about_a_connection_is_reset_and_counted() {
    let known = |op| End::new(HOST_PORT, GUEST_PORT).header(op);
    let lies: [(&str, Header); 7] = [
        ("unexpected", known(REQUEST)),
        ("unexpected", known(RESPONSE)),
        ("unknown_operation", known(0)),
        ("unknown_operation", known(8)),
        ("unknown_operation", known(u16::MAX)),
        ("credit_violations", Header { len: WIDE_WINDOW + 1, ..known(RW) }),
        ("credit_violations", Header { len: u32::MAX, ..known(RW) }),
    ];
    for (counter, lie) in lies {
        let mut guest = Guest::new(BUFFER);
        let (_, mut host) = guest.connect(GUEST_PORT);
        if lie.len == 0 {
            guest.send_raw(lie, &[]);
        } else {
            // A buffer that holds what it says: the same page over and over. The header is in front.
            let at = BUFFERS + (7 << 20);
            guest.bench.fill(at, &lie.bytes());
            let mut chain = vec![(at, HEADER as u32, false)];
            let pieces = if lie.len == u32::MAX { 2 } else { 1 };
            for _ in 0..pieces {
                chain.push((BUFFERS, 8 << 20, false));
            }
            guest.bench.rings[1].offer(&chain);
            guest.bench.kick(1);
            assert!(guest.bench.rings[1].take_used().is_some());
            if lie.len == u32::MAX {
                // Not even all of memory holds that much.
                assert_eq!(guest.counted("malformed"), 1);
                continue;
            }
        }
        assert_eq!(guest.next_op(), RST, "{lie:?}");
        guest.silent();
        assert_eq!((guest.counted(counter), guest.held()), (1, (0, 0, 0)), "{lie:?}");
        assert_eq!(read_to_end(&mut guest, &mut host), b"");
    }
}

#[test]
fn bytes_after_the_end_are_reset() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, _host) = guest.connect(GUEST_PORT);
    end.shutdown(&mut guest, SHUTDOWN_SEND);
    end.send(&mut guest, b"x");
    assert_eq!((guest.next_op(), guest.counted("unexpected")), (RST, 1));
}

#[test]
fn bytes_before_the_answer_are_reset() {
    for op in [RW, CREDIT_UPDATE, CREDIT_REQUEST, RESPONSE, REQUEST] {
        let mut guest = Guest::new(BUFFER);
        let end = End::new(HOST_PORT, GUEST_PORT);
        guest.send_raw(end.header(REQUEST), &[]);
        guest.send_raw(end.header(op), &[]);
        assert_eq!((guest.next_op(), guest.counted("unexpected")), (RST, 1), "{op}");
        let (id, _) = guest.dials.lock().unwrap()[0];
        let (_host, stream) = pair();
        guest.bench.device.lock().unwrap().dialed(id, Some(stream));
        guest.silent();
    }
}

#[test]
fn packets_of_no_connection_are_refused() {
    let base = End::new(HOST_PORT, GUEST_PORT).header(RW);
    let mut guest = Guest::new(BUFFER);
    let mut refused = |lie: Header, counter: &str, answer: bool| {
        let before = guest.counted(counter);
        guest.send_raw(lie, &[]);
        assert_eq!(guest.counted(counter), before + 1, "{lie:?}");
        // The answer's type is the lie's own, which the driver's side of these tests does not like.
        guest.bench.settle();
        match guest.bench.rings[0].take_used() {
            Some((head, written)) => {
                let at = BUFFERS + u64::from(head) * u64::from(BUFFER);
                let bytes = guest.bench.bytes(at, written as usize);
                assert!(answer, "{lie:?}");
                assert_eq!(Header::parse(bytes[..].try_into().unwrap()), lie.refusal());
                assert_eq!(lie.refusal().op, RST);
            }
            None => assert!(!answer, "{lie:?}"),
        }
    };
    for op in [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST] {
        refused(Header { op, ..base }, "unknown_connection", true);
    }
    refused(Header { op: RST, ..base }, "resets_received", false);
    refused(Header { op: 99, ..base }, "unknown_operation", true);
    refused(Header { kind: 2, ..base }, "wrong_type", true);
    refused(Header { kind: 0, op: REQUEST, ..base }, "wrong_type", true);
    refused(Header { kind: 2, op: RST, ..base }, "wrong_type", false);
    refused(Header { dst_cid: 4, op: REQUEST, ..base }, "wrong_destination", true);
    refused(Header { dst_cid: CID, ..base }, "wrong_destination", true);
    refused(Header { dst_cid: 4, op: RST, ..base }, "wrong_destination", false);
    refused(Header { src_cid: 2, ..base }, "wrong_source", false);
    refused(Header { src_cid: u64::MAX, op: REQUEST, ..base }, "wrong_source", false);
    refused(Header { len: 1, ..base }, "malformed", false);
    refused(Header { len: u32::MAX, ..base }, "malformed", false);
    assert!(guest.dials.lock().unwrap().is_empty());
}

#[test]
fn chains_without_a_header_are_dropped() {
    let mut guest = Guest::new(BUFFER);
    guest.bench.rings[1].offer(&[(BUFFERS, HEADER as u32 - 1, false)]);
    guest.bench.rings[1].offer(&[(BUFFERS, 100, true)]);
    guest.bench.rings[1].offer(&[(BUFFERS, 0, false)]);
    guest.bench.kick(1);
    assert_eq!(guest.counted("malformed"), 3);
    guest.silent();
}

#[test]
fn buffers_too_small_for_a_byte_are_given_back() {
    let mut guest = Guest::inactive(BUFFER);
    guest.bench.activate(0).unwrap();
    guest.bench.rings[0].offer(&[(BUFFERS, HEADER as u32, true)]);
    guest.bench.rings[0].offer(&[(BUFFERS, 100, false)]);
    let end = End::new(HOST_PORT, GUEST_PORT);
    guest.send_raw(end.header(RW), &[]);
    assert_eq!(guest.bench.rings[0].take_used(), Some((0, 0)));
    assert_eq!(guest.bench.rings[0].take_used(), Some((1, 0)));
    assert_eq!(guest.counted("small_buffers"), 2);
}

#[test]
fn a_storm_of_refusals_waits_in_the_ring() {
    let mut guest = Guest::inactive(BUFFER);
    guest.bench.activate(0).unwrap();
    guest.refill = false;
    let storm = 3 * RESET_LIMIT as u32;
    let mut left = 0;
    for port in 0..storm {
        guest.offer_packet(End::new(HOST_PORT, port).header(RW), &[]);
        guest.bench.kick(1);
        if guest.bench.rings[1].take_used().is_none() {
            left += 1;
        }
        if left == 31 {
            break; // All buffers for packets are in the ring.
        }
    }
    assert_eq!((left, guest.held()), (31, (0, RESET_LIMIT, 0)));
    assert_eq!(guest.bench.turn(0), 0, "the loop does not spin");
    // With buffers it goes on, and nothing is missing.
    let mut answered = 0;
    while answered < RESET_LIMIT + left {
        guest.offer_buffers(QUEUE_SIZE);
        guest.look();
        assert!(!guest.inbox.is_empty());
        answered += guest.inbox.drain(..).inspect(|(header, _)| assert_eq!(header.op, RST)).count();
    }
    assert_eq!(guest.held(), (0, 0, 0));
}

#[test]
fn beyond_the_limits_the_guest_is_refused() {
    let mut guest = Guest::new(BUFFER);
    let mut hosts = Vec::new();
    for port in 0..DIAL_LIMIT as u32 {
        guest.send_raw(End::new(HOST_PORT, port).header(REQUEST), &[]);
    }
    guest.silent();
    guest.send_raw(End::new(HOST_PORT, 9999).header(REQUEST), &[]);
    assert_eq!((guest.next_op(), guest.counted("crowded")), (RST, 1));
    let dials = std::mem::take(&mut *guest.dials.lock().unwrap());
    for (id, _) in dials {
        let (host, stream) = pair();
        guest.bench.device.lock().unwrap().dialed(id, Some(stream));
        assert_eq!(guest.next_op(), RESPONSE);
        hosts.push(host);
    }
    // The rest from the host's side: where there is no room, it waits in the backlog.
    let greeting = STREAM_LIMIT - DIAL_LIMIT;
    let mut callers: Vec<UnixStream> = (0..greeting).map(|_| guest.called(b"")).collect();
    assert_eq!(guest.held().0, STREAM_LIMIT);
    guest.send_raw(End::new(HOST_PORT, 9999).header(REQUEST), &[]);
    assert_eq!((guest.next_op(), guest.counted("crowded")), (RST, 2));
    let mut waiting = guest.called(b"CONNECT 7\n");
    guest.silent();
    assert_eq!(guest.held().0, STREAM_LIMIT);
    drop(callers.pop());
    assert_eq!(guest.next().0.dst_port, 7);
    waiting.write_all(b"still there").unwrap();
    // The hundreds that came late have the narrow window.
    callers[greeting - 2].write_all(b"CONNECT 8\n").unwrap();
    assert_eq!(guest.next().0.buf_alloc, NARROW_WINDOW);
}

#[test]
fn a_storm_of_requests_given_up_does_not_reach_the_dialer() {
    let mut guest = Guest::new(BUFFER);
    let end = End::new(HOST_PORT, GUEST_PORT);
    for _ in 0..2 * DIAL_LIMIT {
        guest.send_raw(end.header(REQUEST), &[]);
        guest.send_raw(end.header(RST), &[]);
    }
    assert_eq!(guest.dials.lock().unwrap().len(), DIAL_LIMIT);
    assert_eq!(guest.counted("crowded"), DIAL_LIMIT as u64);
    // Nor does the driver's reset make room.
    guest.bench.device.lock().unwrap().reset();
    let ids: Vec<u64> = guest.dials.lock().unwrap().drain(..).map(|(id, _)| id).collect();
    guest.start_again();
    guest.send_raw(end.header(REQUEST), &[]);
    assert_eq!((guest.next_op(), guest.counted("crowded")), (RST, DIAL_LIMIT as u64 + 1));
    guest.bench.device.lock().unwrap().dialed(ids[0], None);
    guest.connect(GUEST_PORT);
}

#[test]
fn crumbs_arrive_whole() {
    let mut guest = Guest::new(BUFFER);
    let (end, mut host) = guest.connect(GUEST_PORT);
    let (at, bytes) = (BUFFERS + (7 << 20), pattern(120));
    guest.bench.fill(at, &Header { len: 120, ..end.header(RW) }.bytes());
    guest.bench.fill(at + 64, &bytes);
    let mut chain = vec![(at, HEADER as u32, false)];
    chain.extend((0..120).map(|n| (at + 64 + n, 1, false)));
    guest.bench.rings[1].offer(&chain);
    guest.bench.kick(1);
    let mut got = Vec::new();
    read_available(&mut host, &mut got, 120);
    assert_eq!(got, bytes);
    assert_eq!(guest.held().2, 0);
}

#[test]
fn connections_given_up_leave_nothing_in_line() {
    let mut guest = Guest::inactive(BUFFER);
    guest.bench.activate(0).unwrap();
    let end = End::new(HOST_PORT, GUEST_PORT);
    for _ in 0..3 {
        guest.send_raw(end.header(REQUEST), &[]);
        let (id, _) = guest.dials.lock().unwrap().pop().unwrap();
        guest.bench.device.lock().unwrap().dialed(id, None);
        assert_eq!(guest.held().0, 1, "its RST finds no buffer");
        guest.send_raw(end.header(RST), &[]);
        assert_eq!(guest.held().0, 0);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Packet(Header, usize),
    Garbage(Vec<u8>),
    Answer(bool),
    HostWrites(usize, usize),
    HostReads(usize),
    HostCloses(usize),
    HostCalls(u32),
    Look,
    PauseAndResume,
}

fn header() -> impl Strategy<Value = Header> {
    // Few ports, so that packets meet connections; now and then anything at all.
    let ends = (0..4_u32, prop_oneof![3 => 1024..1026_u32, 2 => (1 << 30)..(1 << 30) + 6_u32]);
    let sane = prop_oneof![20 => Just(true), 1 => Just(false)];
    let op = prop_oneof![12 => 1..8_u16, 6 => Just(RW), 1 => any::<u16>()];
    let flags = prop_oneof![4 => 0..4_u32, 1 => any::<u32>()];
    let credit = prop_oneof![3 => Just(256_u32 << 10), 1 => any::<u32>()];
    (ends, sane, op, flags, credit, any::<u32>(), any::<u64>()).prop_map(
        |((src_port, dst_port), sane, op, flags, buf_alloc, noise, cid)| Header {
            src_cid: if sane { CID } else { cid },
            dst_cid: if sane || noise % 2 == 0 { 2 } else { cid },
            src_port,
            dst_port,
            len: noise,
            kind: if sane { STREAM } else { noise as u16 },
            op,
            flags,
            buf_alloc,
            fwd_cnt: if noise % 3 == 0 { noise } else { 0 },
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (header(), prop_oneof![Just(0), 1..60_000_usize]).prop_map(|(h, n)| Step::Packet(h, n)),
        1 => prop::collection::vec(any::<u8>(), 0..60).prop_map(Step::Garbage),
        5 => any::<bool>().prop_map(Step::Answer),
        3 => (0..8_usize, 1..50_000_usize).prop_map(|(host, n)| Step::HostWrites(host, n)),
        2 => (0..8_usize).prop_map(Step::HostReads),
        1 => (0..8_usize).prop_map(Step::HostCloses),
        2 => (0..4_u32).prop_map(Step::HostCalls),
        4 => Just(Step::Look),
        1 => Just(Step::PauseAndResume),
    ]
}

/// Takes whatever the device wrote, of any type, and offers the buffers again.
fn take_buffers(guest: &mut Guest) {
    let mut taken = 0;
    guest.bench.settle();
    while guest.bench.rings[0].take_used().is_some() {
        taken += 1;
    }
    guest.offer_buffers(taken);
}

fn perform(guest: &mut Guest, hosts: &mut Vec<UnixStream>, step: Step) {
    let pick = |n: usize, hosts: &[UnixStream]| if hosts.is_empty() { None } else { Some(n % hosts.len()) };
    match step {
        Step::Packet(header, 0) => guest.offer_packet(header, &[]),
        Step::Packet(header, n) => {
            // Now and then the length that it says is the one that it has.
            let len = if header.len % 4 == 0 { header.len } else { n as u32 };
            guest.offer_packet(Header { len, ..header }, &vec![1; n]);
        }
        Step::Garbage(bytes) => {
            guest.bench.fill(BUFFERS + (7 << 20), &bytes);
            guest.bench.rings[1].offer(&[(BUFFERS + (7 << 20), bytes.len() as u32, false)]);
        }
        Step::Answer(well) => {
            let Some((id, _)) = guest.dials.lock().unwrap().pop() else { return };
            let (host, stream) = pair();
            hosts.push(host);
            guest.bench.device.lock().unwrap().dialed(id, well.then_some(stream));
        }
        Step::HostWrites(host, n) => {
            let Some(host) = pick(host, hosts) else { return };
            let _ = hosts[host].write(&vec![2; n]);
        }
        Step::HostReads(host) => {
            let Some(host) = pick(host, hosts) else { return };
            let _ = std::io::Read::read(&mut hosts[host], &mut [0; 1 << 16]);
        }
        Step::HostCloses(host) => {
            let Some(host) = pick(host, hosts) else { return };
            drop(hosts.swap_remove(host));
        }
        Step::HostCalls(port) => hosts.push(guest.called_only(format!("CONNECT {port}\n").as_bytes())),
        Step::Look => take_buffers(guest),
        Step::PauseAndResume => {
            let mut device = guest.bench.device.lock().unwrap();
            device.pause();
            device.resume();
        }
    }
    guest.bench.kick(1);
    while guest.bench.rings[1].take_used().is_some() {}
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn nothing_breaks_it_and_nothing_grows(steps in prop::collection::vec(step(), 1..120)) {
        let mut guest = Guest::new(BUFFER);
        let mut hosts = Vec::new();
        for step in steps {
            perform(&mut guest, &mut hosts, step);
            let (streams, resets, bytes) = guest.held();
            prop_assert!(streams <= STREAM_LIMIT && resets <= RESET_LIMIT);
            prop_assert!(bytes <= streams * WIDE_WINDOW as usize, "{streams} hold {bytes}");
            prop_assert!(!guest.bench.needs_reset());
            take_buffers(&mut guest);
        }
        // Whatever state it is in, it ends with the driver's reset.
        guest.bench.device.lock().unwrap().reset();
        prop_assert_eq!(guest.held(), (0, 0, 0));
    }

    #[test]
    fn any_bytes_are_a_header_and_back(bytes in prop::array::uniform32(any::<u8>()), rest in any::<[u8; 12]>()) {
        let mut all = [0; HEADER];
        all[..32].copy_from_slice(&bytes);
        all[32..].copy_from_slice(&rest);
        prop_assert_eq!(Header::parse(&all).bytes(), all);
    }
}
