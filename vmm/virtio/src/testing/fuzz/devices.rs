//! The devices, each with its host's side and with what an honest driver asks of it.

use std::{
    fs::File,
    io::{Read, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
    },
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use super::{
    input::{BUFFERS, Input},
    world::{Shared, Subject, World},
};
use crate::{
    block::{Block, BlockConfig, EngineChoice},
    console::Console,
    fs::Fs,
    net::Net,
    rng::Rng,
    testing::sys::memory_file,
    vsock::{Dialer, Vsock},
};

/// Sockets that a script may have open.
const SOCKETS: usize = 16;

pub(super) struct RngSubject(Shared);

impl Subject for RngSubject {
    fn new(_input: &mut Input<'_>) -> Self {
        let sevens = |out: &mut [u8]| {
            out.fill(7);
            Ok(())
        };
        Self(Arc::new(Mutex::new(Rng::new(sevens).expect("make the device"))))
    }

    fn device(&self) -> Shared {
        self.0.clone()
    }

    fn honest(&mut self, world: &mut World) {
        let head = world.rings[0].offer(&[(BUFFERS, 16, true)]);
        world.kick(0);
        assert_eq!(world.rings[0].take_used(), Some((head, 16)));
        assert_eq!(world.bytes(BUFFERS, 17)[..], [&[7; 16][..], &[0]].concat());
    }
}

/// Bytes of the disk.
const DISK: u64 = 64 << 10;

pub(super) struct BlockSubject {
    device: Arc<Mutex<Block>>,
    file: File,
}

impl Subject for BlockSubject {
    fn new(input: &mut Input<'_>) -> Self {
        let kind = input.byte();
        let file = memory_file(DISK).expect("make a disk");
        let config = BlockConfig {
            file: file.try_clone().expect("share the disk"),
            read_only: kind & 1 != 0,
            serial: "fuzz".into(),
            // An io_uring is slow to make.
            engine: if kind & 0xf0 == 0xf0 { EngineChoice::Auto } else { EngineChoice::Plain },
        };
        Self { device: Arc::new(Mutex::new(Block::new(config).expect("make the device"))), file }
    }

    fn device(&self) -> Shared {
        self.device.clone()
    }

    fn host(&mut self, input: &mut Input<'_>) {
        // Whoever owns the image may change its size.
        self.file.set_len(u64::from(input.byte()) * DISK / 128).expect("change the disk's size");
        let size = self.device.lock().expect("the device").resize_to_file();
        assert_eq!(size.expect("look at the disk"), self.size() / 512);
    }

    fn calm(&mut self) {
        let told = self.device.lock().expect("the device").sectors();
        assert_eq!(self.size() / 512, told, "no guest makes its disk longer or shorter");
        self.file.set_len(DISK).expect("change the disk's size");
        self.device.lock().expect("the device").resize_to_file().expect("look at the disk");
    }

    fn honest(&mut self, world: &mut World) {
        let status = BUFFERS + 4096;
        world.fill(status, &[0xff]);
        let chain = [(BUFFERS, 16, false), (BUFFERS + 512, 512, true), (status, 1, true)];
        let head = world.rings[0].offer(&chain);
        world.kick(0);
        assert_eq!(world.answer(0), (head, 513));
        assert_eq!(world.bytes(status, 1), [0]);
    }
}

impl BlockSubject {
    fn size(&self) -> u64 {
        self.file.metadata().expect("look at the disk").len()
    }
}

pub(super) struct NetSubject {
    device: Shared,
    wire: UnixDatagram,
}

impl NetSubject {
    /// The next frame of the guest's.
    fn sent(&self, into: &mut [u8]) -> Option<usize> {
        self.wire.recv(into).ok()
    }
}

impl Subject for NetSubject {
    fn new(input: &mut Input<'_>) -> Self {
        let (near, wire) = UnixDatagram::pair().expect("make a wire");
        for end in [&near, &wire] {
            end.set_nonblocking(true).expect("make a wire");
        }
        let mtu = [None, Some(68), Some(1500), Some(u16::MAX)][usize::from(input.byte() & 3)];
        let net = Net::on_socket(near, [2, 0, 0, 0, 0, 1], mtu).expect("make the device");
        Self { device: Arc::new(Mutex::new(net)), wire }
    }

    fn device(&self) -> Shared {
        self.device.clone()
    }

    fn host(&mut self, input: &mut Input<'_>) {
        if input.byte() & 3 == 0 {
            while self.sent(&mut [0; 64]).is_some() {}
            return;
        }
        let mut frame = vec![0; (input.len() as usize).min(70_000)];
        let len = frame.len().min(32);
        let front = input.bytes(len);
        frame[..front.len()].copy_from_slice(front);
        // A full wire drops it.
        let _ = self.wire.send(&frame);
    }

    fn calm(&mut self) {
        while self.sent(&mut [0; 64]).is_some() {}
    }

    fn honest(&mut self, world: &mut World) {
        world.rest();
        let frame: Vec<u8> = [0; 12].into_iter().chain(0..60).collect();
        // Before it come frames that waited on the wire for the first driver.
        let mut free: Vec<u64> = (0..32).collect();
        let (head, len) = loop {
            for n in free.drain(..) {
                world.rings[0].offer(&[(BUFFERS + 4096 * n, 4096, true)]);
            }
            world.kick(0);
            let received: Vec<_> = std::iter::from_fn(|| world.rings[0].take_used()).collect();
            match received.last() {
                Some(_) => free.extend(received.iter().map(|&(head, _)| u64::from(head) % 32)),
                None => self.wire.send(&frame).map(|_| ()).expect("send a frame"),
            }
            world.rest();
            if let Some(used) = world.rings[0].take_used() {
                break used;
            }
        };
        assert_eq!(len, 72);
        assert_eq!(world.bytes(BUFFERS + 4096 * (u64::from(head) % 32) + 12, 60), frame[12..]);

        world.fill(BUFFERS, &frame);
        let head = world.rings[1].offer(&[(BUFFERS, 72, false)]);
        world.kick(1);
        assert_eq!(world.rings[1].take_used().map(|used| used.0), Some(head));
        let mut got = [0; 128];
        let len = self.sent(&mut got).expect("the frame is sent");
        assert_eq!(got[..len], frame);
    }
}

/// What the device asked for: name and port.
type Dials = Arc<Mutex<Vec<(u64, u32)>>>;

struct Recorder(Dials);

impl Dialer for Recorder {
    fn dial(&mut self, id: u64, port: u32) {
        self.0.lock().expect("the dials").push((id, port));
    }
}

pub(super) struct VsockSubject {
    device: Arc<Mutex<Vsock>>,
    dials: Dials,
    address: SocketAddr,
    /// The ends of the host's programs.
    programs: Vec<UnixStream>,
}

/// The guest's address, and the ports of the honest connection.
const CID: u64 = 3;
const PORTS: (u32, u32) = (0xffff_0001, 1024);
const HEADER: usize = 44;

impl VsockSubject {
    fn answer(&mut self, stream: bool) {
        let Some((id, _)) = self.dials.lock().expect("the dials").pop() else { return };
        let ours = (stream && self.programs.len() < SOCKETS).then(|| {
            let (program, ours) = UnixStream::pair().expect("make a stream");
            program.set_nonblocking(true).expect("make a stream");
            self.programs.push(program);
            ours
        });
        self.device.lock().expect("the device").dialed(id, ours);
    }

    fn connect(&mut self, line: &[u8]) {
        if self.programs.len() >= SOCKETS {
            return;
        }
        let mut program = UnixStream::connect_addr(&self.address).expect("connect to the device");
        program.set_nonblocking(true).expect("make a stream");
        let _ = program.write(line);
        self.programs.push(program);
    }
}

impl Subject for VsockSubject {
    fn new(_input: &mut Input<'_>) -> Self {
        // An abstract name: no file to clean up.
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("bulkhead-fuzz-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("name a socket");
        let listener = UnixListener::bind_addr(&address).expect("listen");
        let dials = Dials::default();
        let device = Vsock::new(CID, Some(listener), Box::new(Recorder(dials.clone())));
        let device = Arc::new(Mutex::new(device.expect("make the device")));
        Self { device, dials, address, programs: Vec::new() }
    }

    fn device(&self) -> Shared {
        self.device.clone()
    }

    fn host(&mut self, input: &mut Input<'_>) {
        let kind = input.byte();
        let which = usize::from(kind >> 4);
        match kind % 8 {
            0 | 1 => self.answer(true),
            2 => self.answer(false),
            3 => self.connect(format!("CONNECT {}\n", input.half()).as_bytes()),
            4 => {
                let len = usize::from(input.byte());
                self.connect(input.bytes(len));
            }
            5 if which < self.programs.len() => drop(self.programs.swap_remove(which)),
            6 => {
                if let Some(program) = self.programs.get_mut(which) {
                    let len = (input.len() as usize).min(1 << 18);
                    let _ = program.write(&vec![7; len]);
                }
            }
            _ => {
                if let Some(program) = self.programs.get_mut(which) {
                    let mut buffer = vec![0; (input.len() as usize).min(1 << 18)];
                    let _ = program.read(&mut buffer);
                }
            }
        }
    }

    fn calm(&mut self) {
        self.programs.clear();
        // Every dial is answered in the end: so a dialer has promised.
        while !self.dials.lock().expect("the dials").is_empty() {
            self.answer(false);
        }
    }

    fn honest(&mut self, world: &mut World) {
        for n in 0..64 {
            world.rings[0].offer(&[(BUFFERS + 1024 * (n + 1), 1024, true)]);
        }
        world.kick(0);
        let mut packet = Vec::new();
        packet.extend([CID, 2].map(u64::to_le_bytes).concat());
        // Ports, no payload, a stream's (1) request (1), no flags, a window, nothing taken.
        packet.extend([PORTS.0, PORTS.1, 0, 1 | 1 << 16, 0, 4096, 0].map(u32::to_le_bytes).concat());
        world.fill(BUFFERS, &packet);
        let head = world.rings[1].offer(&[(BUFFERS, HEADER as u32, false)]);
        world.kick(1);
        assert_eq!(world.rings[1].take_used().map(|used| used.0), Some(head));
        assert_eq!(self.dials.lock().expect("the dials").last().map(|dial| dial.1), Some(PORTS.1));
        self.answer(true);
        world.rest();
        // Before it may come requests of programs that had connected while no driver was there.
        let received: Vec<_> = std::iter::from_fn(|| world.rings[0].take_used()).collect();
        let answer = received.into_iter().find_map(|(head, len)| {
            assert!(len as usize >= HEADER, "a packet without a header");
            let bytes = world.bytes(BUFFERS + 1024 * (u64::from(head) + 1), HEADER);
            let port = u32::from_le_bytes([bytes[20], bytes[21], bytes[22], bytes[23]]);
            (port == PORTS.0).then(|| u16::from_le_bytes([bytes[30], bytes[31]]))
        });
        assert_eq!(answer, Some(2), "the connection is accepted");
    }
}

/// What the guest wrote, as far as there is room.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

/// Bytes that a screen takes.
const SCREEN: usize = 64 << 10;

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut screen = self.0.lock().expect("the screen");
        let n = bytes.len().min(SCREEN - screen.len());
        if n == 0 {
            return Err(std::io::ErrorKind::WouldBlock.into());
        }
        screen.extend(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

pub(super) struct ConsoleSubject {
    device: Shared,
    keys: UnixStream,
    screen: Screen,
}

impl Subject for ConsoleSubject {
    fn new(_input: &mut Input<'_>) -> Self {
        let (keys, typed) = UnixStream::pair().expect("make a keyboard");
        keys.set_nonblocking(true).expect("make a keyboard");
        let screen = Screen::default();
        let typed = File::from(std::os::fd::OwnedFd::from(typed));
        let console = Console::new(Box::new(screen.clone()), Some(typed)).expect("make the device");
        Self { device: Arc::new(Mutex::new(console)), keys, screen }
    }

    fn device(&self) -> Shared {
        self.device.clone()
    }

    fn host(&mut self, input: &mut Input<'_>) {
        if input.byte() & 1 == 0 {
            self.screen.0.lock().expect("the screen").clear();
        } else {
            // What has no room is not typed.
            let _ = self.keys.write(&vec![b'k'; (input.len() as usize).min(1 << 18)]);
        }
    }

    fn calm(&mut self) {
        self.screen.0.lock().expect("the screen").clear();
    }

    fn honest(&mut self, world: &mut World) {
        world.fill(BUFFERS, b"written");
        let head = world.rings[1].offer(&[(BUFFERS, 7, false)]);
        world.kick(1);
        assert_eq!(world.rings[1].take_used().map(|used| used.0), Some(head));
        assert_eq!(*self.screen.0.lock().expect("the screen"), b"written");
        world.rings[0].offer(&[(BUFFERS, 64, true)]);
        world.kick(0);
        let _ = self.keys.write(b"typed");
        world.rest();
        assert!(world.rings[0].take_used().is_some_and(|(_, len)| len > 0), "keys arrive");
    }
}

pub(super) struct FsSubject {
    /// Until the end.
    device: Option<Shared>,
    /// Whether the backend has always answered as it must.
    honest: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// The vhost-user protocol, as far as a backend of no files needs it.
mod vhost_user {
    pub(super) const GET_FEATURES: u32 = 1;
    pub(super) const GET_VRING_BASE: u32 = 11;
    pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(super) const GET_QUEUE_NUM: u32 = 17;
    /// Version 1, and the bit of a reply.
    pub(super) const REPLY: u32 = 1 | 4;
    pub(super) const NEED_REPLY: u32 = 8;
    /// VERSION_1, PROTOCOL_FEATURES, EVENT_IDX, INDIRECT_DESC
    pub(super) const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;
}

/// Answers until the other end goes, or until the `at`th message, whose answer is `odd`.
fn backend(mut socket: UnixStream, at: u8, odd: &[u8], honest: &AtomicBool) {
    use vhost_user::*;
    let mut header = [0; 12];
    for count in 0u32.. {
        if socket.read_exact(&mut header).is_err() {
            return;
        }
        let word = |n: usize| u32::from_ne_bytes([header[n], header[n + 1], header[n + 2], header[n + 3]]);
        let (request, flags) = (word(0), word(4));
        let mut body = vec![0; word(8) as usize];
        if socket.read_exact(&mut body).is_err() {
            return;
        }
        if at != 0 && count == u32::from(at) {
            honest.store(false, Ordering::SeqCst);
            // And then it hangs up: it may keep nobody waiting.
            return drop(socket.write_all(odd));
        }
        let number = match request {
            GET_FEATURES => FEATURES,
            GET_PROTOCOL_FEATURES => u64::MAX,
            GET_QUEUE_NUM => 2,
            // The number of the ring, and a position of 7 behind it.
            GET_VRING_BASE => u64::from(body[0]) | 7 << 32,
            _ if flags & NEED_REPLY != 0 => 0,
            _ => continue,
        };
        let mut answer = [request, REPLY, 8].map(u32::to_ne_bytes).concat();
        answer.extend(number.to_ne_bytes());
        if socket.write_all(&answer).is_err() {
            return;
        }
    }
}

impl Subject for FsSubject {
    fn new(input: &mut Input<'_>) -> Self {
        let at = input.byte();
        let len = usize::from(input.byte() % 32);
        let odd = input.bytes(len).to_vec();
        let honest = Arc::new(AtomicBool::new(true));
        let start = |at: u8, odd: Vec<u8>| {
            let (ours, theirs) = UnixStream::pair().expect("make a connection");
            let honest = honest.clone();
            let thread = std::thread::spawn(move || backend(theirs, at, &odd, &honest));
            (Fs::new("share", ours, 1), thread)
        };
        let (device, thread) = match start(at, odd) {
            (Ok(device), thread) => (device, thread),
            // One that lies from the beginning is refused; the guest's part needs another.
            (Err(_), thread) => {
                thread.join().expect("the backend");
                honest.store(true, Ordering::SeqCst);
                let (device, thread) = start(0, Vec::new());
                (device.expect("make the device"), thread)
            }
        };
        Self { device: Some(Arc::new(Mutex::new(device))), honest, thread: Some(thread) }
    }

    fn device(&self) -> Shared {
        self.device.clone().expect("the device")
    }

    fn must_serve(&self) -> bool {
        // Without its backend it serves nobody again, and says so.
        self.honest.load(Ordering::SeqCst)
    }

    fn honest(&mut self, _world: &mut World) {
        // That the backend was handed the rings is what its driver's being ready means.
    }
}

impl Drop for FsSubject {
    fn drop(&mut self) {
        // The end of the device is the end of the connection, and that of the backend. In a panic somebody
        // else may hold the device still.
        self.device = None;
        if let Some(thread) = self.thread.take().filter(|_| !std::thread::panicking()) {
            thread.join().expect("the backend");
        }
    }
}
