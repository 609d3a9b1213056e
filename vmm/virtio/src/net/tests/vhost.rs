//! With vhost-net, which not every machine has: `cargo test -p bulkhead-virtio -- --ignored vhost` where
//! /dev/vhost-net is.
#![allow(unsafe_code)]

use std::{fs::File, net::UdpSocket, time::Duration};

use super::{
    kernel::{CSUM, FLAGS, GUEST, HOST, bring_up, config, datagram, host_mac, isolated, tap},
    *,
};

/// A card whose frames the kernel moves.
fn card(features: u64) -> Bench<Net> {
    let vhost = File::options().read(true).write(true).open("/dev/vhost-net");
    let vhost = Some(vhost.expect("open /dev/vhost-net (modprobe vhost_net)"));
    let net = Net::new(NetConfig { vhost, ..config(tap(FLAGS, true)) }).unwrap();
    assert!(net.uses_vhost());
    assert_eq!(features & !net.features(), 0);
    bring_up();
    let mut bench = Bench::new(net);
    bench.activate(features).unwrap();
    bench.settle();
    assert!(!bench.needs_reset(), "the kernel took the rings");
    bench
}

/// Waits for the kernel to raise the line, and for what it used in this ring.
fn used(bench: &mut Bench<Net>, ring: usize) -> (u16, u32) {
    loop {
        if let Some(used) = bench.rings[ring].take_used() {
            return used;
        }
        let mut line =
            libc::pollfd { fd: bench.interrupt.line().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, which `line` is.
        let ready = unsafe { libc::poll(&mut line, 1, 20_000) };
        assert_eq!(ready, 1, "the kernel raises the line in time");
        assert_ne!(bench.interrupt.pending() & crate::interrupt::USED_BUFFER, 0);
        bench.interrupt.line().read().unwrap();
    }
}

/// Notifies the kernel of what a ring offers: as an ioeventfd does, without the event loop.
fn kick(bench: &Bench<Net>, ring: usize) {
    bench.device.lock().unwrap().kicks()[ring].write(1).unwrap();
}

fn receive(bench: &mut Bench<Net>, socket: &UdpSocket, words: &[u8]) -> u16 {
    socket.send_to(words, (GUEST, 4000)).unwrap();
    let (head, len) = used(bench, RX);
    let bytes = bench.bytes(BUFFERS + 0x1000 * u64::from(head), len as usize);
    assert!(bytes.ends_with(words));
    assert_eq!(bytes[0], VIRTIO_NET_HDR_F_NEEDS_CSUM as u8);
    assert_eq!(bytes[10..12], [1, 0], "one buffer");
    head
}

fn send(bench: &mut Bench<Net>, socket: &UdpSocket, words: &[u8]) {
    let frame = datagram(&host_mac(), 5000, words);
    bench.fill(SENT, &frame);
    let head = bench.rings[TX].offer(&[(SENT, frame.len() as u32, false)]);
    kick(bench, TX);
    assert_eq!(used(bench, TX), (head, 0));
    let mut bytes = [0; 64];
    let (n, _) = socket.recv_from(&mut bytes).unwrap();
    assert_eq!(&bytes[..n], words);
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind((HOST, 5000)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket
}

#[test]
#[ignore = "needs /dev/vhost-net"]
fn vhost_moves_frames_pauses_and_goes_on_where_it_was() {
    isolated(|| {
        let mut bench = card(CSUM | MERGE);
        let socket = socket();
        for n in 0..4 {
            bench.rings[RX].offer(&[(BUFFERS + 0x1000 * n, 2048, true)]);
        }
        kick(&bench, RX);
        assert_eq!(receive(&mut bench, &socket, b"first"), 0);
        send(&mut bench, &socket, b"to the host");

        bench.device.lock().unwrap().pause();
        let state = bench.device.lock().unwrap().save();
        let positions = state.rings().iter().map(|r| (r.next_avail, r.next_used)).collect::<Vec<_>>();
        assert_eq!(positions, [(1, 1), (1, 1)]);
        socket.send_to(b"while paused", (GUEST, 4000)).unwrap();
        assert_eq!(bench.rings[RX].take_used(), None);

        bench.device.lock().unwrap().resume();
        bench.settle();
        let (head, len) = used(&mut bench, RX);
        assert_eq!(head, 1);
        assert!(bench.bytes(BUFFERS + 0x1000, len as usize).ends_with(b"while paused"));
        assert_eq!(receive(&mut bench, &socket, b"after it"), 2);
        send(&mut bench, &socket, b"to the host again");

        bench.device.lock().unwrap().reset();
        socket.send_to(b"for nobody", (GUEST, 4000)).unwrap();
        assert_eq!(bench.rings[RX].take_used(), None, "after the reset nothing touches memory");
    });
}

#[test]
#[ignore = "needs /dev/vhost-net"]
fn vhost_begins_anew_after_a_reset() {
    isolated(|| {
        let mut bench = card(CSUM | MERGE);
        let socket = socket();
        bench.device.lock().unwrap().reset();
        socket.send_to(b"for nobody", (GUEST, 4000)).unwrap();
        bench.rings = [0x10_0000, 0x20_0000].map(|at| DriverRing::new(&bench.memory, at, 64)).into();
        bench.activate(CSUM | MERGE).unwrap();
        bench.settle();
        bench.rings[RX].offer(&[(BUFFERS, 2048, true)]);
        kick(&bench, RX);
        receive(&mut bench, &socket, b"for the new one");
    });
}

#[test]
#[ignore = "needs /dev/vhost-net"]
fn vhost_reports_a_lying_ring_and_the_device_asks_for_its_reset() {
    isolated(|| {
        let mut bench = card(CSUM | MERGE);
        // A chain that loops.
        bench.rings[TX].descriptor(0, SENT, 16, crate::testing::NEXT, 1);
        bench.rings[TX].descriptor(1, SENT, 16, crate::testing::NEXT, 0);
        bench.rings[TX].offer_head(0);
        kick(&bench, TX);
        assert_eq!(bench.turn(20_000), 1, "the kernel tells");
        assert!(bench.needs_reset());
        let metrics = bench.device.lock().unwrap().metrics();
        assert!(metrics.contains(&("backend_errors", 1)));
    });
}
