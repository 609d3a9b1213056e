use std::{
    fs::File,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use virtio_bindings::{virtio_blk::*, virtio_ring::VIRTIO_RING_F_EVENT_IDX};

use super::*;
use crate::{
    Device, DeviceState,
    testing::{BUFFERS, Bench, DriverRing},
};

mod hostile;

/// Where the tests put a request's parts.
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;
const ALL: u64 = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
const ENGINES: [EngineChoice; 2] = [EngineChoice::Auto, EngineChoice::Plain];
/// Sectors of the tests' disks.
const SECTORS: u64 = 2048;

/// A disk whose bytes are their sector's number, with the file seen from outside.
struct Disk {
    bench: Bench<Block>,
    file: File,
}

fn image() -> File {
    let file = tempfile::tempfile().unwrap();
    for sector in 0..SECTORS {
        file.write_all_at(&[sector as u8; SECTOR as usize], sector * SECTOR).unwrap();
    }
    file
}

fn config(file: &File, engine: EngineChoice) -> BlockConfig {
    BlockConfig { file: file.try_clone().unwrap(), read_only: false, serial: "pod-7".into(), engine }
}

impl Disk {
    fn new(engine: EngineChoice) -> Self {
        Self::with(ALL, engine, false)
    }

    fn with(features: u64, engine: EngineChoice, read_only: bool) -> Self {
        let file = image();
        let block = Block::new(BlockConfig { read_only, ..config(&file, engine) }).unwrap();
        Self::of(block, file, features)
    }

    fn of(block: Block, file: File, features: u64) -> Self {
        assert_eq!(features & !block.features(), 0, "what the tests agree on is offered");
        let mut bench = Bench::new(block);
        bench.activate(features).unwrap();
        Self { bench, file }
    }

    /// Offers a request of this type at `sector`, with data buffers.
    fn offer(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u16 {
        self.bench.fill(HEADER, &header(kind, sector));
        self.bench.fill(STATUS, &[0xff]);
        let mut chain = vec![(HEADER, 16, false)];
        chain.extend(data);
        chain.push((STATUS, 1, true));
        self.bench.rings[0].offer(&chain)
    }

    /// The next answer, waiting for it.
    fn answer(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(used) = self.bench.rings[0].take_used() {
                return used;
            }
            // A turn without an event is no sign: io_uring may interrupt the wait.
            let left = deadline.checked_duration_since(Instant::now()).expect("an answer in time");
            self.bench.turn(left.as_millis() as i32);
        }
    }

    /// Makes a request; answers its status and the length.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u32, u32) {
        let head = self.offer(kind, sector, data);
        self.bench.kick(0);
        let (answered, len) = self.answer();
        assert_eq!(answered, head);
        (self.bench.bytes(STATUS, 1)[0].into(), len)
    }

    fn counted(&self, name: &str) -> u64 {
        let metrics = self.bench.device.lock().unwrap().metrics();
        metrics.into_iter().find(|(n, _)| *n == name).unwrap().1
    }

    fn stored(&self, sector: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, sector * SECTOR).unwrap();
        bytes
    }

    fn in_flight(&self) -> usize {
        self.bench.device.lock().unwrap().in_flight()
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn range(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&count.to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}

#[test]
fn io_uring_is_used_where_it_is() {
    let file = image();
    assert!(Block::new(config(&file, EngineChoice::Auto)).unwrap().uses_io_uring());
    assert!(!Block::new(config(&file, EngineChoice::Plain)).unwrap().uses_io_uring());
}

#[test]
fn reads_and_writes_through_many_buffers() {
    for engine in ENGINES {
        let mut disk = Disk::new(engine);
        let answer = disk.request(VIRTIO_BLK_T_IN, 7, &[(DATA, 500, true), (DATA + 0x1000, 524, true)]);
        assert_eq!(answer, (VIRTIO_BLK_S_OK, 1025));
        assert_eq!(disk.bench.bytes(DATA, 500), [7; 500]);
        assert_eq!(disk.bench.bytes(DATA + 0x1000, 12), [7; 12]);
        assert_eq!(disk.bench.bytes(DATA + 0x100c, 512), [8; 512]);
        assert!(disk.bench.interrupted());

        disk.bench.fill(DATA, &[0xaa; 4096]);
        let answer =
            disk.request(VIRTIO_BLK_T_OUT, SECTORS - 2, &[(DATA, 1, false), (DATA + 1, 1023, false)]);
        assert_eq!(answer, (VIRTIO_BLK_S_OK, 1));
        assert_eq!(disk.stored(SECTORS - 2, 1024), [0xaa; 1024]);
        assert_eq!(disk.stored(SECTORS - 3, 512), [(SECTORS - 3) as u8; 512]);
        assert_eq!((disk.counted("read_bytes"), disk.counted("written_bytes")), (1024, 1024));
    }
}

#[test]
fn a_header_and_a_status_may_lie_anywhere() {
    for engine in ENGINES {
        let mut disk = Disk::new(engine);
        // The header in three pieces, the last of which holds the data; and data and status in one buffer.
        disk.bench.fill(HEADER, &header(VIRTIO_BLK_T_OUT, 3));
        disk.bench.fill(HEADER + 16, &[9; 512]);
        let write = [
            (HEADER, 3, false),
            (HEADER + 3, 0, false),
            (HEADER + 3, 9, false),
            (HEADER + 12, 516, false),
            (STATUS + 0x400, 1, true),
        ];
        let head = disk.bench.rings[0].offer(&write);
        disk.bench.kick(0);
        assert_eq!(disk.answer(), (head, 1));
        assert_eq!(disk.stored(3, 512), [9; 512]);

        disk.bench.fill(HEADER, &header(VIRTIO_BLK_T_IN, 3));
        disk.bench.fill(DATA, &[0xff; 600]);
        let head = disk.bench.rings[0].offer(&[(HEADER, 16, false), (DATA, 513, true)]);
        disk.bench.kick(0);
        assert_eq!(disk.answer(), (head, 513));
        assert_eq!(disk.bench.bytes(DATA, 514), [&[9; 512][..], &[0, 0xff]].concat());
    }
}

#[test]
fn a_serial_number_is_told() {
    let mut disk = Disk::new(EngineChoice::Plain);
    assert_eq!(disk.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, true)]), (VIRTIO_BLK_S_OK, 21));
    assert_eq!(disk.bench.bytes(DATA, 20), *b"pod-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn what_is_flushed_or_written_through_is_there() {
    for engine in ENGINES {
        let mut disk = Disk::new(engine);
        assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (VIRTIO_BLK_S_OK, 1));
        assert_eq!(disk.counted("flushes"), 1);

        // Without FLUSH agreed on, the write is followed by a job of its own before it is answered.
        let mut disk = Disk::with(0, engine, false);
        disk.bench.fill(DATA, &[0x5a; 512]);
        assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 1, &[(DATA, 512, false)]), (VIRTIO_BLK_S_OK, 1));
        assert_eq!(disk.stored(1, 512), [0x5a; 512]);
        assert_eq!((disk.counted("requests"), disk.counted("flushes")), (1, 1));
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, 1, &[(DATA, 512, true)]).0, VIRTIO_BLK_S_OK);
        assert_eq!(disk.counted("flushes"), 1, "reading needs none");
    }
}

#[test]
fn ranges_are_given_back_and_zeroed() {
    for engine in ENGINES {
        let mut disk = Disk::new(engine);
        disk.bench.fill(DATA, &range(8, 8, 0));
        assert_eq!(disk.request(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16, false)]), (VIRTIO_BLK_S_OK, 1));
        assert_eq!(disk.stored(8, 4096), [0; 4096]);
        assert_eq!((disk.stored(7, 512), disk.stored(16, 512)), (vec![7; 512], vec![16; 512]));

        disk.bench.fill(DATA, &range(20, 3, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP));
        assert_eq!(disk.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(DATA, 16, false)]).0, VIRTIO_BLK_S_OK);
        assert_eq!(disk.stored(20, 1536), [0; 1536]);

        // In place: what the file system cannot, the driver is told, and nothing has changed.
        disk.bench.fill(DATA, &range(30, 1, 0));
        match disk.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(DATA, 16, false)]).0 {
            VIRTIO_BLK_S_OK => assert_eq!(disk.stored(30, 512), [0; 512]),
            status => {
                assert_eq!(status, VIRTIO_BLK_S_UNSUPP);
                assert_eq!(disk.stored(30, 512), [30; 512]);
            }
        }
        assert_eq!(disk.stored(31, 512), [31; 512]);
        assert_eq!(disk.file.metadata().unwrap().len(), SECTORS * SECTOR);
    }
}

#[test]
fn the_configuration_says_what_there_is() {
    let disk = Disk::new(EngineChoice::Plain);
    let device = disk.bench.device.lock().unwrap();
    let mut config = [0xff; 60];
    device.read_config(0, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[12..16], 126u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    let mut beyond = [0; 8];
    device.read_config(56, &mut beyond);
    assert_eq!(beyond, [1, 0, 0, 0, 0, 0, 0, 0]);
    device.read_config(u64::MAX, &mut beyond);
    assert_eq!(device.features() & 1 << VIRTIO_BLK_F_RO, 0);
}

#[test]
fn a_block_device_of_the_host_is_a_disk() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let out = std::process::Command::new("losetup").args(["--find", "--show"]).arg(image.path()).output();
    let out = out.expect("run losetup");
    assert!(out.status.success(), "losetup: {}", String::from_utf8_lossy(&out.stderr));
    let path = String::from_utf8(out.stdout).unwrap().trim().to_owned();
    let file = File::options().read(true).write(true).open(&path);
    // Detached when the last descriptor is closed, however this test ends.
    assert!(std::process::Command::new("losetup").args(["--detach", &path]).status().unwrap().success());
    let file = file.unwrap();
    let block = Block::new(config(&file, EngineChoice::Auto)).unwrap();
    assert_eq!(block.sectors(), 2048);
    let mut disk = Disk::of(block, file, ALL);
    disk.bench.fill(DATA, &[3; 4096]);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 8, &[(DATA, 4096, false)]).0, VIRTIO_BLK_S_OK);
    assert_eq!(disk.stored(8, 4096), [3; 4096]);
    disk.bench.fill(DATA, &range(8, 8, 0));
    assert_eq!(disk.request(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16, false)]).0, VIRTIO_BLK_S_OK);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 8, &[(DATA, 512, true)]).0, VIRTIO_BLK_S_OK);
    assert_eq!(disk.bench.bytes(DATA, 512), [0; 512]);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 2048, &[(DATA, 512, true)]).0, VIRTIO_BLK_S_IOERR);
}

#[test]
fn what_cannot_be_a_disk_is_refused_with_a_reason() {
    let refused = |config| Block::new(config).err().unwrap().to_string();
    let file = image();
    let serial = "x".repeat(21);
    assert!(refused(BlockConfig { serial, ..config(&file, EngineChoice::Plain) }).contains("20 bytes"));
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    assert!(refused(config(&null, EngineChoice::Plain)).contains("block device"));
    let named = tempfile::NamedTempFile::new().unwrap();
    let readable = File::open(named.path()).unwrap();
    assert!(refused(config(&readable, EngineChoice::Plain)).contains("open for reading and writing"));
    assert!(
        Block::new(BlockConfig { read_only: true, ..config(&readable, EngineChoice::Auto) }).is_ok(),
        "a read-only disk needs no more"
    );
}

#[test]
fn many_requests_are_in_flight_and_all_come_back() {
    for features in [ALL, ALL | 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut disk = Disk::with(features, EngineChoice::Auto, false);
        for round in 0..20u64 {
            let mut heads = Vec::new();
            for n in 0..40u64 {
                let header_at = HEADER + 16 * n;
                disk.bench.fill(header_at, &header(VIRTIO_BLK_T_IN, round * 40 + n));
                let data = DATA + 512 * n;
                let chain = [(header_at, 16, false), (data, 512, true), (STATUS + 0x800 + n, 1, true)];
                heads.push(disk.bench.rings[0].offer(&chain));
            }
            disk.bench.kick(0);
            let mut answered: Vec<u16> = (0..40).map(|_| disk.answer().0).collect();
            answered.sort_unstable();
            heads.sort_unstable();
            assert_eq!(answered, heads);
            for n in 0..40 {
                assert_eq!(disk.bench.bytes(DATA + 512 * n, 512), [(round * 40 + n) as u8; 512]);
            }
        }
        assert_eq!(disk.counted("requests"), 800);
    }
}

#[test]
fn paused_nothing_is_in_flight_and_resumed_it_goes_on() {
    for engine in ENGINES {
        let mut disk = Disk::new(engine);
        let head = disk.offer(VIRTIO_BLK_T_IN, 0, &[(DATA, 1 << 20, true)]);
        disk.bench.device.lock().unwrap().kicks()[0].write(1).unwrap();
        disk.bench.turn(0);
        disk.bench.device.lock().unwrap().pause();
        assert_eq!(disk.in_flight(), 0);
        let used = disk.bench.rings[0].take_used();
        assert_eq!(used, Some((head, (1 << 20) + 1)), "answered before the pause ends");
        assert!(disk.bench.interrupted());

        let head = disk.offer(VIRTIO_BLK_T_IN, 6, &[(DATA, 512, true)]);
        disk.bench.kick(0);
        assert_eq!(disk.bench.rings[0].take_used(), None);
        disk.bench.device.lock().unwrap().resume();
        assert_eq!(disk.answer(), (head, 513));
    }
}

/// A disk on which requests are in flight: what is to be made durable takes its time. Answers how many were
/// offered.
fn busy() -> (Disk, usize) {
    for _ in 0..100 {
        let mut disk = Disk::new(EngineChoice::Auto);
        for n in 0..8 {
            disk.bench.fill(DATA, &[n; 4096]);
            disk.offer(VIRTIO_BLK_T_OUT, 8 * u64::from(n), &[(DATA, 4096, false)]);
            disk.offer(VIRTIO_BLK_T_FLUSH, 0, &[]);
            // A header is read when its request is taken, so each has its turn.
            disk.bench.device.lock().unwrap().run();
        }
        if disk.in_flight() > 0 {
            return (disk, 16);
        }
    }
    panic!("io_uring never had anything in flight");
}

#[test]
fn a_pause_answers_what_is_in_flight() {
    let (mut disk, offered) = busy();
    disk.bench.device.lock().unwrap().pause();
    assert_eq!(disk.in_flight(), 0);
    let answered = std::iter::from_fn(|| disk.bench.rings[0].take_used()).count();
    assert_eq!(answered, offered);
    assert_eq!(disk.counted("requests"), offered as u64);
}

#[test]
fn a_reset_waits_for_what_is_in_flight_and_answers_nothing() {
    let (mut disk, offered) = busy();
    let answered = |disk: &mut Disk| std::iter::from_fn(|| disk.bench.rings[0].take_used()).count();
    let before = answered(&mut disk);
    assert!(before < offered);
    disk.bench.device.lock().unwrap().reset();
    assert_eq!(disk.in_flight(), 0);
    disk.bench.settle();
    assert_eq!(answered(&mut disk), 0, "the ring is the driver's again");
}

#[test]
fn saved_it_goes_on_elsewhere() {
    let mut disk = Disk::new(EngineChoice::Auto);
    disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    disk.bench.device.lock().unwrap().pause();
    let state = disk.bench.device.lock().unwrap().save();
    let DeviceState::Block(saved) = &state else { panic!("another kind of state") };
    assert_eq!((saved.rings[0].next_avail, saved.rings[0].next_used), (1, 1));
    assert_eq!((saved.sectors, saved.serial.as_str()), (SECTORS, "pod-7"));

    let serial = String::new();
    let mut other = Block::new(BlockConfig { serial, ..config(&disk.file, EngineChoice::Plain) }).unwrap();
    assert!(other.restore(&state));
    let queue = state.rings()[0].queue().unwrap();
    let activation = crate::Activation {
        memory: disk.bench.memory.clone(),
        features: ALL,
        queues: vec![queue],
        interrupt: disk.bench.interrupt.clone(),
    };
    other.activate(activation).unwrap();
    *disk.bench.device.lock().unwrap() = other;
    disk.offer(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, true)]);
    disk.bench.device.lock().unwrap().run();
    assert!(disk.bench.rings[0].take_used().is_some());
    assert_eq!(disk.bench.bytes(DATA, 5), *b"pod-7", "what the driver was told before");

    let smaller = tempfile::tempfile().unwrap();
    assert!(!Block::new(config(&smaller, EngineChoice::Plain)).unwrap().restore(&state));
    let read_only = BlockConfig { read_only: true, ..config(&disk.file, EngineChoice::Plain) };
    assert!(!Block::new(read_only).unwrap().restore(&state));
}

#[test]
fn a_file_that_grew_is_announced() {
    let mut disk = Disk::new(EngineChoice::Auto);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, SECTORS, &[(DATA, 512, true)]).0, VIRTIO_BLK_S_IOERR);
    disk.file.set_len((SECTORS + 1) * SECTOR).unwrap();
    let generation = disk.bench.interrupt.generation();
    assert_eq!(disk.bench.device.lock().unwrap().resize_to_file().unwrap(), SECTORS + 1);
    assert_ne!(disk.bench.interrupt.pending() & crate::interrupt::CONFIG_CHANGE, 0);
    assert_ne!(disk.bench.interrupt.generation(), generation);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, SECTORS, &[(DATA, 512, true)]).0, VIRTIO_BLK_S_OK);
}
