//! The file system device before the real virtiofsd: a driver's side that opens a FUSE session and looks
//! a file up. `tests/run unit` says where that program is, and makes it if there is none.

use std::{
    io::Read,
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use bulkhead_virtio::{
    Device,
    fs::Fs,
    testing::{BUFFERS, Bench, shared_memory},
};

/// VIRTIO_F_VERSION_1 and the features that the device offers.
const FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 29;
/// struct fuse_in_header and struct fuse_out_header (linux/fuse.h).
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
const LOOKUP: u32 = 1;
const INIT: u32 = 26;
const DEADLINE: Duration = Duration::from_secs(10);

fn program() -> PathBuf {
    let path = std::env::var_os("BULKHEAD_TEST_VIRTIOFSD").map(PathBuf::from);
    path.expect("BULKHEAD_TEST_VIRTIOFSD names the program that tests/parts/virtiofsd prints: see tests/run")
}

struct Daemon {
    child: Child,
    _socket: tempfile::TempDir,
    share: tempfile::TempDir,
}

impl Daemon {
    fn start() -> (Self, UnixStream) {
        let share = tempfile::tempdir().unwrap();
        std::fs::write(share.path().join("hello"), "seventeen bytes..").unwrap();
        let socket = tempfile::tempdir().unwrap();
        let path = socket.path().join("fs");
        let mut child = Command::new(program())
            .arg("--shared-dir")
            .arg(share.path())
            .arg("--socket-path")
            .arg(&path)
            .args(["--sandbox", "none", "--log-level", "info"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It says when it listens.
        let mut log = String::new();
        let mut stderr = child.stderr.take().unwrap();
        while !log.contains("Waiting for vhost-user socket connection") {
            let mut bytes = [0; 512];
            let n = stderr.read(&mut bytes).unwrap();
            assert!(n > 0, "virtiofsd ended: {log}");
            log.push_str(&String::from_utf8_lossy(&bytes[..n]));
        }
        // What it says later has room in the pipe.
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        let stream = UnixStream::connect(&path).unwrap();
        (Self { child, _socket: socket, share }, stream)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Guest {
    bench: Bench<Fs>,
    unique: u64,
    daemon: Daemon,
}

impl Guest {
    fn new() -> Self {
        let (daemon, socket) = Daemon::start();
        let bench = Bench::with_memory(Fs::new("share", socket, 1).unwrap(), shared_memory());
        Self { bench, unique: 0, daemon }
    }

    /// Sends a request through the ring and waits for the interrupt; answers error and body.
    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        self.send(opcode, node, body);
        self.answer()
    }

    fn send(&mut self, opcode: u32, node: u64, body: &[u8]) {
        self.unique += 1;
        let mut request = Vec::with_capacity(IN_HEADER + body.len());
        request.extend(((IN_HEADER + body.len()) as u32).to_le_bytes());
        request.extend(opcode.to_le_bytes());
        request.extend(self.unique.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend([0; 16]); // uid, gid, pid, total_extlen
        request.extend(body);
        self.bench.fill(BUFFERS, &request);
        let (answer, len) = (BUFFERS + 0x1000, 0x1000);
        self.bench.rings[1].offer(&[(BUFFERS, request.len() as u32, false), (answer, len, true)]);
        self.bench.device.lock().unwrap().kicks()[1].write(1).unwrap();
    }

    fn answer(&mut self) -> (i32, Vec<u8>) {
        wait(self.bench.interrupt.line());
        assert_eq!(self.bench.interrupt.pending() & 1, 1, "the driver is told to look at its rings");
        self.bench.interrupt.line().read().unwrap();
        let (_, written) = self.bench.rings[1].take_used().expect("an answer with the interrupt");
        let bytes = self.bench.bytes(BUFFERS + 0x1000, written as usize);
        assert_eq!(bytes[8..16], self.unique.to_le_bytes());
        (i32::from_le_bytes(bytes[4..8].try_into().unwrap()), bytes[OUT_HEADER..].to_vec())
    }

    /// FUSE_INIT, protocol 7.38, no flags.
    fn init(&mut self) {
        let words = [7u32, 38, 0x10000, 0];
        let mut body: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        body.resize(64, 0);
        let (error, answer) = self.call(INIT, 0, &body);
        assert_eq!(error, 0);
        assert_eq!(u32::from_le_bytes(answer[..4].try_into().unwrap()), 7, "the major version");
    }

    fn look_up(&mut self, name: &str) -> Result<u64, i32> {
        let (error, answer) = self.call(LOOKUP, 1, &[name.as_bytes(), b"\0"].concat());
        if error != 0 {
            return Err(error);
        }
        // struct fuse_entry_out: 40 bytes, then struct fuse_attr with ino, size.
        Ok(u64::from_le_bytes(answer[48..56].try_into().unwrap()))
    }
}

fn wait(event: &impl AsRawFd) {
    let mut events = [vmm_sys_util::epoll::EpollEvent::default()];
    let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
    let interest = vmm_sys_util::epoll::EpollEvent::new(vmm_sys_util::epoll::EventSet::IN, 0);
    epoll.ctl(vmm_sys_util::epoll::ControlOperation::Add, event.as_raw_fd(), interest).unwrap();
    let n = epoll.wait(DEADLINE.as_millis() as i32, &mut events).unwrap();
    assert_eq!(n, 1, "no interrupt within {DEADLINE:?}");
}

#[test]
fn a_guest_opens_a_session_and_finds_a_file() {
    let mut guest = Guest::new();
    guest.bench.activate(FEATURES & !(1 << 29)).unwrap();
    guest.init();
    assert_eq!(guest.look_up("hello"), Ok(17));
    assert_eq!(guest.look_up("nothing"), Err(-2), "ENOENT");
}

#[test]
fn with_the_event_index_too() {
    let mut guest = Guest::new();
    guest.bench.activate(FEATURES).unwrap();
    guest.init();
}

#[test]
fn paused_it_rests_and_resumed_it_goes_on_in_its_session() {
    let mut guest = Guest::new();
    guest.bench.activate(FEATURES & !(1 << 29)).unwrap();
    guest.init();
    guest.bench.device.lock().unwrap().pause();
    let state = guest.bench.device.lock().unwrap().save();
    assert_eq!(state.rings()[1].next_avail, 1);
    assert_eq!(state.rings()[1].next_used, 1);
    guest.send(LOOKUP, 1, b"hello\0");
    // A stopped ring is not looked at: the kick is still there to be read.
    assert_eq!(guest.bench.device.lock().unwrap().kicks()[1].read().unwrap(), 1);
    assert_eq!(guest.bench.rings[1].take_used(), None);
    guest.bench.device.lock().unwrap().resume();
    assert_eq!(guest.answer().0, 0);
    assert_eq!(guest.look_up("hello"), Ok(17));
}

#[test]
fn after_a_reset_a_new_driver_opens_its_own_session() {
    let mut guest = Guest::new();
    guest.bench.activate(FEATURES & !(1 << 29)).unwrap();
    guest.init();
    guest.bench.device.lock().unwrap().reset();
    for (n, ring) in guest.bench.rings.iter_mut().enumerate() {
        let at = 0x10_0000 * (n as u64 + 1);
        *ring = bulkhead_virtio::testing::DriverRing::new(&guest.bench.memory, at, ring.size);
    }
    guest.bench.activate(FEATURES & !(1 << 29)).unwrap();
    std::fs::write(guest.daemon.share.path().join("later"), "x").unwrap();
    guest.init();
    assert_eq!(guest.look_up("later"), Ok(1));
}

#[test]
fn when_virtiofsd_ends_the_device_asks_for_its_reset() {
    let mut guest = Guest::new();
    guest.bench.activate(FEATURES).unwrap();
    guest.daemon.child.kill().unwrap();
    guest.daemon.child.wait().unwrap();
    guest.bench.turn(DEADLINE.as_millis() as i32);
    assert!(guest.bench.needs_reset());
}
