//! Connections as honest guests and hosts use them.

mod driver;
mod flow;
mod hostile;
mod life;

use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
};

use self::driver::*;
use super::packet::*;
use crate::{Device, Kind};

const BUFFER: u32 = 3776; // As Linux's.

#[test]
fn it_says_what_it_is() {
    let device = device(None).0;
    assert_eq!((device.kind(), device.queue_sizes().len()), (Kind::Vsock, 3));
    let mut config = [0xff; 8];
    device.read_config(0, &mut config);
    assert_eq!(u64::from_le_bytes(config), CID);
    let mut beyond = [0; 8];
    device.read_config(4, &mut beyond);
    device.read_config(u64::MAX, &mut beyond);
    assert_eq!(beyond, [0; 8]);
    let reserved = |cid| super::Vsock::new(cid, None, Box::new(NoDialer)).is_err();
    assert!(reserved(2) && reserved(0xffff_ffff) && !reserved(3));
}

struct NoDialer;

impl super::Dialer for NoDialer {
    fn dial(&mut self, _id: u64, _port: u32) {}
}

#[test]
fn the_guest_connects_and_both_speak() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    assert_eq!(end.send(&mut guest, b"ping"), 4);
    let mut bytes = [0; 8];
    assert_eq!(host.read(&mut bytes).unwrap(), 4);
    assert_eq!(&bytes[..4], b"ping");
    host.write_all(b"pong").unwrap();
    let (header, data) = guest.next();
    assert_eq!((header.op, data.as_slice(), header.fwd_cnt), (RW, &b"pong"[..], 4));
    guest.silent();
    assert_eq!(guest.counted("guest_connections"), 1);
    assert_eq!((guest.counted("bytes_from_guest"), guest.counted("bytes_to_guest")), (4, 4));
}

#[test]
fn where_nobody_listens_the_guest_is_refused() {
    let mut guest = Guest::new(BUFFER);
    let end = End::new(9, GUEST_PORT);
    guest.send_raw(end.header(REQUEST), &[]);
    let (id, port) = guest.dials.lock().unwrap().pop().unwrap();
    assert_eq!(port, 9);
    guest.silent();
    guest.bench.device.lock().unwrap().dialed(id, None);
    assert_eq!(guest.next_op(), RST);
    assert_eq!((guest.held().0, guest.counted("dials_refused")), (0, 1));
    // The answer to nothing is nothing.
    guest.bench.device.lock().unwrap().dialed(id, None);
    guest.silent();
}

#[test]
fn an_answer_that_comes_too_late_is_closed() {
    for give_up in [RST, SHUTDOWN] {
        let mut guest = Guest::new(BUFFER);
        let end = End::new(HOST_PORT, GUEST_PORT);
        guest.send_raw(end.header(REQUEST), &[]);
        let (id, _) = guest.dials.lock().unwrap().pop().unwrap();
        guest.send_raw(end.header(give_up), &[]);
        let (mut host, stream) = pair();
        guest.bench.device.lock().unwrap().dialed(id, Some(stream));
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
        guest.silent();
        assert_eq!(guest.held().0, 0);
    }
}

#[test]
fn the_host_connects_and_is_told_when_the_guest_accepts() {
    let mut guest = Guest::new(BUFFER);
    // What follows the line at once is for the guest.
    let mut host = guest.called(b"CONNECT 5000\nearly");
    let (header, _) = guest.next();
    assert_eq!((header.op, header.dst_port), (REQUEST, 5000));
    guest.silent();
    let mut bytes = [0; 64];
    assert_eq!(host.read(&mut bytes).unwrap_err().kind(), ErrorKind::WouldBlock);
    let mut end = End::new(header.src_port, 5000);
    end.learn(&header);
    guest.send_raw(end.header(RESPONSE), &[]);
    let n = host.read(&mut bytes).unwrap();
    assert_eq!(bytes[..n], *format!("OK {}\n", header.src_port).as_bytes());
    assert_eq!(guest.next().1, b"early");
    end.send(&mut guest, b"answer");
    let n = host.read(&mut bytes).unwrap();
    assert_eq!(&bytes[..n], b"answer");
    assert_eq!(guest.counted("host_connections"), 1);
}

#[test]
fn a_line_may_come_in_pieces() {
    let mut guest = Guest::new(BUFFER);
    let mut host = guest.called(b"CONN");
    guest.silent();
    host.write_all(b"ECT 4294967295").unwrap();
    guest.silent();
    host.write_all(b"\n").unwrap();
    assert_eq!(guest.next().0.dst_port, u32::MAX);
}

#[test]
fn a_host_without_a_good_line_is_closed() {
    let bad: [&[u8]; 8] = [
        b"\n",
        b"CONNECT\n",
        b"CONNECT \n",
        b"CONNECT +1\n",
        b"CONNECT 4294967296\n",
        b"connect 1\n",
        b"CONNECT 1 \n",
        b"CONNECT 000000000000000000000000000000001",
    ];
    let mut guest = Guest::new(BUFFER);
    for (n, line) in bad.into_iter().enumerate() {
        let mut host = guest.called(line);
        // A reset where not all of it was read.
        assert!(!matches!(host.read(&mut [0; 8]), Ok(1..)), "{line:?}");
        assert_eq!(guest.counted("bad_greetings"), n as u64 + 1, "{line:?}");
    }
    drop(guest.called(b"CONNECT 1"));
    guest.silent();
    assert_eq!(guest.counted("bad_greetings"), 9);
    assert_eq!(guest.held().0, 0);
}

#[test]
fn a_guest_that_refuses_closes_the_host() {
    let mut guest = Guest::new(BUFFER);
    let mut host = guest.called(b"CONNECT 7\n");
    let end = End::new(guest.next().0.src_port, 7);
    guest.send_raw(end.header(RST), &[]);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    guest.silent();
    assert_eq!(guest.held().0, 0);
}

#[test]
fn a_host_that_gives_up_early_is_taken_back() {
    let mut guest = Guest::new(BUFFER);
    let host = guest.called(b"CONNECT 7\n");
    assert_eq!(guest.next_op(), REQUEST);
    drop(host);
    assert_eq!(guest.next_op(), RST);
    // And before the guest was asked.
    let mut guest = Guest::inactive(BUFFER);
    guest.bench.activate(0).unwrap();
    drop(guest.called(b"CONNECT 7\n"));
    guest.bench.settle();
    assert_eq!(guest.held().0, 0);
}

#[test]
fn the_guest_ends_first_and_still_hears_the_host() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    end.send(&mut guest, b"question");
    end.shutdown(&mut guest, SHUTDOWN_SEND);
    assert_eq!(read_to_end(&mut guest, &mut host), b"question");
    host.write_all(b"answer").unwrap();
    assert_eq!(guest.next().1, b"answer");
    drop(host);
    let (header, _) = guest.next();
    assert_eq!((header.op, header.flags), (SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
    guest.send_raw(end.header(RST), &[]);
    guest.silent();
    assert_eq!(guest.held().0, 0);
}

#[test]
fn the_host_ends_first_and_still_hears_the_guest() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.next().1, b"question");
    let (header, _) = guest.next();
    assert_eq!((header.op, header.flags), (SHUTDOWN, SHUTDOWN_SEND));
    end.send(&mut guest, b"answer");
    guest.silent();
    // Linux's close, which waits for the RST.
    end.shutdown(&mut guest, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert_eq!(guest.next_op(), RST);
    assert_eq!(read_to_end(&mut guest, &mut host), b"answer");
    assert_eq!(guest.held().0, 0);
}

#[test]
fn a_host_that_closed_makes_the_guest_stop_sending() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, host) = guest.connect(GUEST_PORT);
    drop(host);
    let (header, _) = guest.next();
    assert_eq!((header.op, header.flags), (SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
    // What crossed it is dropped, and costs no credit for ever.
    end.send(&mut guest, &pattern(60_000));
    end.send(&mut guest, &pattern(60_000));
    assert_eq!(guest.next_op(), CREDIT_UPDATE);
    guest.send_raw(end.header(RST), &[]);
    guest.silent();
    assert_eq!(guest.held().0, 0);
}

#[test]
fn a_host_that_receives_no_more_says_so() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    host.shutdown(Shutdown::Read).unwrap();
    end.send(&mut guest, b"x");
    let (header, _) = guest.next();
    assert_eq!((header.op, header.flags), (SHUTDOWN, SHUTDOWN_RECEIVE));
    host.write_all(b"but sends").unwrap();
    assert_eq!(guest.next().1, b"but sends");
}

#[test]
fn a_guest_that_receives_no_more_makes_the_host_stop() {
    let mut guest = Guest::new(BUFFER);
    let (mut end, mut host) = guest.connect(GUEST_PORT);
    end.shutdown(&mut guest, SHUTDOWN_RECEIVE);
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    end.send(&mut guest, b"but sends");
    let mut bytes = [0; 16];
    assert_eq!(host.read(&mut bytes).unwrap(), 9);
}

#[test]
fn the_host_sees_the_end_though_another_holds_the_socket() {
    let mut guest = Guest::new(BUFFER);
    let end = End::new(HOST_PORT, GUEST_PORT);
    guest.send_raw(end.header(REQUEST), &[]);
    let (id, _) = guest.dials.lock().unwrap().pop().unwrap();
    let (mut host, stream) = pair();
    let copy = stream.try_clone().unwrap();
    guest.bench.device.lock().unwrap().dialed(id, Some(stream));
    assert_eq!(guest.next_op(), RESPONSE);
    guest.send_raw(end.header(RST), &[]);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    // Nor does the copy wake a connection that is not there any more.
    drop(host);
    guest.silent();
    drop(copy);
}
