//! With a tap of Linux, in a network namespace of the test's thread: needs root and /dev/net/tun, as the
//! tests of this project do.
#![allow(unsafe_code)]

use std::{
    fs::File,
    net::UdpSocket,
    os::unix::fs::OpenOptionsExt,
    process::Command,
    time::{Duration, Instant},
};

use super::*;

pub(super) const HOST: &str = "192.0.2.1";
pub(super) const GUEST: &str = "192.0.2.2";
pub(super) const CSUM: u64 = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_GUEST_CSUM;

/// Runs on a thread with a network of its own, which ends with it.
pub(super) fn isolated(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: takes a number; changes the calling thread alone, which ends with the test.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "unshare: {} (these tests need root)", std::io::Error::last_os_error());
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn run(command: &str) {
    let mut words = command.split(' ');
    let status = Command::new(words.next().unwrap()).args(words).status().unwrap();
    assert!(status.success(), "{command}");
}

/// A tap made with these flags.
pub(super) fn tap(flags: libc::c_int, non_blocking: bool) -> File {
    let custom = if non_blocking { libc::O_NONBLOCK } else { 0 };
    let file = File::options().read(true).write(true).custom_flags(custom).open("/dev/net/tun");
    let file = file.expect("open /dev/net/tun (these tests need it)");
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"tap0");
    request[16..18].copy_from_slice(&(flags as u16).to_ne_bytes());
    // TUNSETIFF, _IOW('T', 202, int).
    // SAFETY: reads and writes one struct ifreq, 40 bytes, which `request` has.
    let result = unsafe { vmm_sys_util::ioctl::ioctl_with_mut_ref(&file, 0x4004_54ca, &mut request) };
    assert_eq!(result, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    file
}

pub(super) const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

pub(super) fn config(tap: File) -> NetConfig {
    NetConfig { tap, mac: MAC, mtu: None, vhost: None }
}

/// Brings the tap up, with the host's address on it and the guest's as a neighbour.
pub(super) fn bring_up() {
    // Nothing but the test's frames: no router solicitations.
    std::fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "1").unwrap();
    run(&format!("ip addr add {HOST}/24 dev tap0"));
    run("ip link set tap0 up");
    run(&format!("ip neigh add {GUEST} lladdr 52:00:00:00:00:07 dev tap0"));
}

/// A card on a tap that is up.
fn card(features: u64) -> Bench<Net> {
    let net = Net::new(config(tap(FLAGS, true))).unwrap();
    assert_eq!(features & !net.features(), 0);
    bring_up();
    let mut bench = Bench::new(net);
    bench.activate(features).unwrap();
    bench.settle();
    bench
}

fn counted(bench: &Bench<Net>, name: &str) -> u64 {
    let metrics = bench.device.lock().unwrap().metrics();
    metrics.into_iter().find(|(n, _)| *n == name).unwrap().1
}

/// The next frame that the guest gets.
fn received(bench: &mut Bench<Net>) -> (u16, u32) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(used) = bench.rings[RX].take_used() {
            return used;
        }
        let left = deadline.checked_duration_since(Instant::now()).expect("a frame in time");
        bench.turn(left.as_millis() as i32);
    }
}

fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | w.get(1).map_or(0, |&b| u32::from(b)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A UDP datagram from the guest to the host whose checksum is left to be done, as an Ethernet frame with
/// its header, and the header saying so.
pub(super) fn datagram(host_mac: &[u8], port: u16, payload: &[u8]) -> Vec<u8> {
    let udp_len = 8 + payload.len() as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_len).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 2, 192, 0, 2, 1]);
    let checksum = !sum(&ip);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut pseudo = ip[12..20].to_vec();
    pseudo.extend([0, 17]);
    pseudo.extend(udp_len.to_be_bytes());

    let mut frame = vec![1, 0];
    frame.extend([0u8; 4]);
    // Where the checksum begins, and where in there it goes.
    frame.extend(34u16.to_le_bytes());
    frame.extend(6u16.to_le_bytes());
    frame.extend([0, 0]);
    frame.extend(host_mac);
    frame.extend(MAC);
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(4000u16.to_be_bytes());
    frame.extend(port.to_be_bytes());
    frame.extend(udp_len.to_be_bytes());
    frame.extend(sum(&pseudo).to_be_bytes());
    frame.extend(payload);
    frame
}

pub(super) fn host_mac() -> Vec<u8> {
    let out = Command::new("ip").args(["-brief", "link", "show", "tap0"]).output().unwrap();
    let out = String::from_utf8(out.stdout).unwrap();
    let mac = out.split_whitespace().nth(2).unwrap();
    mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

#[test]
fn the_guest_gets_what_the_host_sends_as_it_agreed() {
    isolated(|| {
        let mut bench = card(CSUM | MERGE);
        let socket = UdpSocket::bind((HOST, 5000)).unwrap();
        for n in 0..4 {
            bench.rings[RX].offer(&[(BUFFERS + 0x1000 * n, 2048, true)]);
        }
        bench.kick(RX);
        socket.send_to(b"to the guest", (GUEST, 4000)).unwrap();
        let (_, len) = received(&mut bench);
        let bytes = bench.bytes(BUFFERS, len as usize);
        assert!(bytes.ends_with(b"to the guest"));
        assert_eq!(bytes[0], VIRTIO_NET_HDR_F_NEEDS_CSUM as u8, "the checksum was left undone");
        assert_eq!(bytes[10..12], [1, 0]);
        assert_eq!(bytes[12..18], MAC);
    });
}

#[test]
fn what_the_host_leaves_in_one_piece_goes_over_several_buffers() {
    isolated(|| {
        let pieces = 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
        // A tap before Linux 6.2 does not have it: then the host's kernel cuts.
        let offered = Net::new(config(tap(FLAGS, true))).unwrap().features() & pieces;
        let mut bench = card(CSUM | MERGE | offered);
        for n in 0..16 {
            bench.rings[RX].offer(&[(BUFFERS + 0x1000 * n, 2048, true)]);
        }
        bench.kick(RX);
        let socket = UdpSocket::bind((HOST, 5000)).unwrap();
        let size: libc::c_int = 1000;
        // SAFETY: UDP_SEGMENT reads one int, which `size` is.
        let result = unsafe {
            let (size, len) = (&raw const size, size_of_val(&size) as libc::socklen_t);
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, size.cast(), len)
        };
        assert_eq!(result, 0, "UDP_SEGMENT: {}", std::io::Error::last_os_error());
        let payload: Vec<u8> = (0..5000).map(|n| (n % 251) as u8).collect();
        socket.send_to(&payload, (GUEST, 4000)).unwrap();

        let headers = HEADER + ETHERNET + 20 + 8;
        let mut found: Vec<u8> = Vec::new();
        let mut buffer = 0;
        let mut counts = Vec::new();
        while found.len() < payload.len() {
            let (_, len) = received(&mut bench);
            let mut bytes = bench.bytes(BUFFERS + 0x1000 * buffer, len as usize);
            let count = u16::from_le_bytes([bytes[10], bytes[11]]);
            counts.push(count);
            for n in 1..u64::from(count) {
                let (_, len) = bench.rings[RX].take_used().expect("all of a frame at once");
                bytes.extend(bench.bytes(BUFFERS + 0x1000 * (buffer + n), len as usize));
            }
            buffer += u64::from(count);
            found.extend(&bytes[headers..]);
        }
        assert_eq!(found, payload);
        let whole = offered == pieces;
        assert_eq!(counts, if whole { vec![3] } else { vec![1; 5] });
    });
}

#[test]
fn a_guest_without_offloads_gets_whole_checksums() {
    isolated(|| {
        let mut bench = card(0);
        let socket = UdpSocket::bind((HOST, 5000)).unwrap();
        bench.rings[RX].offer(&[(BUFFERS, 2048, true)]);
        bench.kick(RX);
        socket.send_to(b"to the guest", (GUEST, 4000)).unwrap();
        let (_, len) = received(&mut bench);
        let bytes = bench.bytes(BUFFERS, len as usize);
        assert_eq!(bytes[0] & VIRTIO_NET_HDR_F_NEEDS_CSUM as u8, 0);
        let udp = &bytes[HEADER + ETHERNET + 20..];
        let pseudo = [&bytes[HEADER + ETHERNET + 12..][..8], &[0, 17], &udp[4..6], udp].concat();
        assert_eq!(sum(&pseudo), 0xffff);
    });
}

#[test]
fn the_host_gets_what_the_guest_sends_and_no_lies() {
    isolated(|| {
        let mut bench = card(CSUM | MERGE);
        let socket = UdpSocket::bind((HOST, 5000)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let honest = datagram(&host_mac(), 5000, b"to the host");
        let mut segments = honest.clone();
        // A segment size of nothing, of a kind that there is not, with a checksum far outside.
        (segments[1], segments[4]) = (0x77, 0);
        let mut outside = honest.clone();
        outside[6..8].copy_from_slice(&u16::MAX.to_le_bytes());
        let mut endless = honest.clone();
        (endless[1], endless[4]) = (VIRTIO_NET_HDR_GSO_TCPV4 as u8, 0);
        for lie in [&segments, &outside, &endless] {
            bench.fill(SENT, lie);
            bench.rings[TX].offer(&[(SENT, lie.len() as u32, false)]);
            bench.kick(TX);
        }
        assert_eq!(counted(&bench, "tx_refused"), 3);
        bench.fill(SENT, &honest);
        bench.rings[TX].offer(&[(SENT, 12, false), (SENT + 12, honest.len() as u32 - 12, false)]);
        bench.kick(TX);
        let mut bytes = [0; 64];
        let (n, from) = socket.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..n], from.port()), (&b"to the host"[..], 4000));
        assert_eq!(counted(&bench, "tx_frames"), 1);
        assert_eq!(std::iter::from_fn(|| bench.rings[TX].take_used()).count(), 4);
        run("ip link set tap0 down");
        bench.rings[TX].offer(&[(SENT, honest.len() as u32, false)]);
        bench.kick(TX);
        assert_eq!(counted(&bench, "tx_refused"), 4, "nobody listens");
    });
}

#[test]
fn what_is_no_such_tap_is_refused_with_a_reason() {
    isolated(|| {
        let refused = |tap| Net::new(config(tap)).err().unwrap().to_string();
        assert!(refused(tap(libc::IFF_TAP | libc::IFF_NO_PI, true)).contains("IFF_VNET_HDR"));
        assert!(refused(tap(libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR, true)).contains("IFF_TAP"));
        assert!(refused(tap(FLAGS, false)).contains("O_NONBLOCK"));
        let vhost = Some(File::open("/dev/null").unwrap());
        let error = Net::new(NetConfig { vhost, ..config(tap(FLAGS, true)) }).err().unwrap().to_string();
        assert!(error.contains("VHOST_SET_OWNER"), "{error}");
    });
}
