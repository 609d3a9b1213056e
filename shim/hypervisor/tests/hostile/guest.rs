//! A guest that is nothing but an attacker: it boots in place of a kernel and owns the whole machine.
//! Built without a library by `tests/parts/hostile-guest`; `tests/hostile.rs` watches it from outside.
//!
//! The command line's word `attack=` is a list of letters, done in their order:
//!
//! | letter | what |
//! |---|---|
//! | `p` | port I/O everywhere, in every width, as strings too |
//! | `c` | CPUID and model-specific registers, KVM's own pointed at devices and outside of memory |
//! | `m` | device registers in every width, at any offset, across windows |
//! | `r` | rings: loops, jumps, lies about addresses and lengths, queues taken back while busy, device by device |
//! | `v` | an honest driver dials the host on vsock port 1024, says `hello`, and answers lines: `again` begins the list anew, `restart` ends the machine |
//! | `x` | runs code where a device's registers are |
//! | `h` | halts for good, with interrupts off |
//! | `t` | triple fault |
//!
//! Numbers come from a generator with a fixed start: what fails, fails again.
#![no_std]
#![no_main]

use core::{
    arch::{asm, global_asm, x86_64::__cpuid_count},
    ptr::{addr_of, addr_of_mut, read_volatile, write_volatile},
};

mod machine;
mod vsock;

use machine::*;

/// Where the devices are (bulkhead-vmm's layout), and from one to the next.
const WINDOWS: u64 = 0xd000_0000;
const STEP: u64 = 0x1000;
/// Windows that are looked for.
const COUNT: u64 = 12;
/// What is in a slot's first register (virtio 1.2, 4.2.2).
const MAGIC: u32 = 0x7472_6976;
/// Memory that is the attack's own: rings and buffers.
pub const POOL: u64 = 32 << 20;
pub const POOL_SIZE: u64 = 16 << 20;
/// Rounds with the rings of one device: in every other one the rings are as they should be, and only what
/// is in them lies, since a device stops looking at the first ring that is broken.
const ROUNDS: u32 = 24;

/// Looks at a ring before a device is not waited for any more.
const PATIENCE: u32 = 20_000;

/// Registers of virtio-mmio (4.2.2).
pub mod register {
    pub const DEVICE_ID: u64 = 0x8;
    pub const FEATURES: u64 = 0x10;
    pub const FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const DESCRIPTORS: u64 = 0x80;
    pub const AVAILABLE: u64 = 0x90;
    pub const USED: u64 = 0xa0;
    pub const CONFIG: u64 = 0x100;
}
use register::*;

#[unsafe(no_mangle)]
extern "C" fn attack(boot_params: u64) -> ! {
    let memory = start(boot_params);
    let attacks = attacks(boot_params);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    loop {
        let mut again = false;
        for letter in attacks.into_iter().take_while(|&letter| letter != 0) {
            say(b"hostile guest: ");
            say(&[letter, b'\n']);
            match letter {
                b'p' => ports(&mut random),
                b'c' => processor(&mut random),
                b'm' => registers(&mut random),
                b'r' => {
                    for at in windows() {
                        say(b"hostile guest: device ");
                        say(&[b'a' + read(at + DEVICE_ID) as u8, b'\n']);
                        (0..ROUNDS).for_each(|round| rings(at, memory, round % 2 == 0, &mut random));
                        write(at + STATUS, 0);
                    }
                }
                b'v' => again = vsock::talk(),
                b'x' => jump(WINDOWS + NOTIFY),
                b'h' => halt(),
                _ => triple_fault(),
            }
        }
        if !again {
            triple_fault();
        }
    }
}

/// The windows with a device in them.
pub fn windows() -> impl Iterator<Item = u64> {
    let all = (0..COUNT).map(|n| WINDOWS + n * STEP);
    all.filter(|&at| read(at) == MAGIC && read(at + DEVICE_ID) != 0)
}

fn ports(random: &mut Random) {
    // Most ports have nobody behind them, each of them costs two exits.
    let some = (0..0x400u16).chain((0x400..=0xffff).step_by(53));
    for port in some {
        in8(port);
        match port {
            // Its own words would be lost among the noise, and 0xfe at 0x64 ends the machine.
            0x3f8 | 0x64 => {}
            _ => out8(port, random.next() as u8),
        }
        if port % 16 == 3 {
            in16(port);
            in32(port);
            out16(port, random.next() as u16);
            out32(port, random.next() as u32);
            strings(port);
        }
    }
    // The serial port as it was, to be heard again. The timer to one shot and its controllers silent: at a
    // rate chosen by chance it would cost more than all that is to be measured.
    for (port, value) in [
        (0x3fb, 3),
        (0x3f9, 0),
        (0x3fc, 0),
        (0x43, 0x30),
        (0x40, 0xff),
        (0x40, 0xff),
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xff),
        (0xa0, 0x11),
        (0xa1, 0x28),
        (0xa1, 2),
        (0xa1, 1),
        (0xa1, 0xff),
    ] {
        out8(port, value);
    }
}

fn processor(random: &mut Random) {
    for base in [0u32, 0x4000_0000, 0x8000_0000, 0xc000_0000, 0xffff_ff00] {
        for n in 0..48 {
            let _ = __cpuid_count(base.wrapping_add(n), random.next() as u32 & 7);
        }
    }
    for base in [0u32, 0x170, 0x200, 0x400, 0x800, 0xc000_0080, 0xc001_0000, 0xc001_1000, 0x4b56_4d00] {
        for msr in base..base + 64 {
            read_msr(msr);
            // Its own legs: the APIC's place, how system calls and pages work.
            if !matches!(msr, 0x1b | 0xc000_0080 | 0x277) {
                write_msr(msr, random.next());
            }
        }
    }
    // Where KVM itself writes: clock, steal time, end of interrupt, page faults.
    for msr in [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04, 0x4b56_4d06] {
        for target in [WINDOWS, u64::MAX - 63, 1 << 45, 0xfee0_0000, POOL] {
            write_msr(msr, target | 1);
        }
        write_msr(msr, 0);
    }
}

fn registers(random: &mut Random) {
    for n in 0..COUNT {
        let at = WINDOWS + n * STEP;
        for _ in 0..250 {
            let offset = match random.below(4) {
                0 => random.below(STEP),
                1 => CONFIG + random.below(0x104),
                _ => random.below(0x40) * 4,
            };
            // The last bytes of a window reach into the next one.
            access(at + offset, random.next(), random.next());
        }
        write(at + STATUS, 0);
    }
}

/// Addresses that devices should not believe, and some that they may.
fn place(memory: u64, at: u64, random: &mut Random) -> u64 {
    let near = random.below(64);
    match random.below(16) {
        0 => at + random.below(STEP),
        1 => memory - near,
        2 => memory + random.next() % (1 << 40),
        3 => u64::MAX - near,
        4 => random.next(),
        5 => (1 << 32) + near,
        6 => 0xfee0_0000 + near * 16,
        _ => POOL + (random.below(POOL_SIZE) & !15),
    }
}

fn length(random: &mut Random) -> u32 {
    let lengths = [0, 1, 11, 12, 16, 44, 45, 512, 4096, 65_536, 1 << 20, 1 << 31, u32::MAX, u32::MAX - 43];
    lengths[random.below(lengths.len() as u64) as usize]
}

/// One round: a driver comes up, lies, and takes back what it gave.
fn rings(at: u64, memory: u64, polite: bool, random: &mut Random) {
    let kind = read(at + DEVICE_ID);
    let mut queues = [Queue::default(); 4];
    come_up(at, memory, polite, random, &mut queues);
    for step in 0..12 {
        for (number, queue) in queues.iter().enumerate().filter(|(_, q)| q.size > 0) {
            queue.lie(kind, number, random);
            if !polite {
                queue.tangle(at, memory, random);
            }
            queue.offer(polite, random);
            write(at + NOTIFY, number as u32);
            if polite {
                queue.wait();
            }
        }
        // While it is busy.
        write(at + QUEUE_SELECT, random.below(4) as u32);
        match random.below(8) {
            0 => write(at + QUEUE_READY, step & 1),
            1 => write(at + QUEUE_SIZE, random.next() as u32),
            2 => write(at + DESCRIPTORS, random.next() as u32),
            3 => write(at + NOTIFY, random.next() as u32),
            4 => write(at + STATUS, random.next() as u32 | 1),
            5 => write(at + CONFIG + random.below(64) * 4, random.next() as u32),
            6 => write(at + INTERRUPT_ACK, read(at + INTERRUPT_STATUS)),
            _ => write(at + USED, random.next() as u32),
        }
    }
    write(at + STATUS, 0);
}

fn come_up(at: u64, memory: u64, polite: bool, random: &mut Random, queues: &mut [Queue; 4]) {
    [0, 1, 3].into_iter().for_each(|status| write(at + STATUS, status));
    for half in 0..2 {
        write(at + FEATURES_SELECT, half);
        let offered = read(at + FEATURES);
        let wanted = if random.below(2) == 0 { u32::MAX } else { random.next() as u32 };
        write(at + DRIVER_FEATURES_SELECT, half);
        // The interface of virtio 1 (bit 32), without which there is nothing to attack.
        write(at + DRIVER_FEATURES, offered & wanted | half);
    }
    write(at + STATUS, 0xb);
    for (number, queue) in queues.iter_mut().enumerate() {
        write(at + QUEUE_SELECT, number as u32);
        let most = read(at + QUEUE_MAX);
        if most == 0 {
            break;
        }
        let size = most >> random.below(3);
        // One ring in eight is somewhere else.
        let base = POOL + number as u64 * (1 << 18);
        let mut part = |n| if polite || random.below(24) > 0 { base + n } else { place(memory, at, random) };
        *queue = Queue { size, descriptors: part(0), available: part(1 << 16), used: part(1 << 17), base };
        write(at + QUEUE_SIZE, size);
        let parts = [(DESCRIPTORS, queue.descriptors), (AVAILABLE, queue.available), (USED, queue.used)];
        for (register, address) in parts {
            write(at + register, address as u32);
            write(at + register + 4, (address >> 32) as u32);
        }
        write(at + QUEUE_READY, 1);
        // What is left of the last round is part of the attack, but not the positions.
        store::<u16>(base + (1 << 16) + 2, 0);
        store::<u16>(base + (1 << 17) + 2, 0);
    }
    write(at + STATUS, 0xf);
}

/// A ring of the attacker's. What is written is written where it should be, wherever the device was told.
#[derive(Clone, Copy, Default)]
struct Queue {
    size: u32,
    descriptors: u64,
    available: u64,
    used: u64,
    base: u64,
}

impl Queue {
    /// What hangs at the next head: of the form that the device expects, mostly.
    fn lie(&self, kind: u32, number: usize, random: &mut Random) {
        let head = self.head();
        match (kind, number) {
            (1, 1) => frame(self, head, random),
            (2, _) => block(self, head, random),
            (5, _) => pages(self, head, random),
            (19, 1) => packet(self, head, random),
            _ => {
                let address = POOL + (8 << 20) + random.below(1 << 20);
                self.describe(head, address, length(random) & 0x1fff, random.below(2) as u16 * 2, 0);
            }
        }
    }

    /// Descriptors at random, and one that is its own successor.
    fn tangle(&self, at: u64, memory: u64, random: &mut Random) {
        let size = u64::from(self.size);
        if random.below(4) == 0 {
            for _ in 0..8 {
                let index = random.below(size) as u16;
                let (address, len) = (place(memory, at, random), length(random));
                self.describe(index, address, len, random.below(8) as u16, random.below(size + 2) as u16);
            }
        }
        if random.below(8) == 0 {
            self.describe(self.head(), POOL, 1, 1, self.head());
        }
    }

    /// Where the next chain begins: each has room for three descriptors.
    fn head(&self) -> u16 {
        let index: u16 = load(self.base + (1 << 16) + 2);
        (u32::from(index) * 4 % self.size) as u16
    }

    fn offer(&self, polite: bool, random: &mut Random) {
        let ring = self.base + (1 << 16);
        let (index, head) = (load::<u16>(ring + 2), self.head());
        store(ring + 4 + 2 * (u64::from(index) % u64::from(self.size)), head);
        let jump = if !polite && random.below(16) == 0 { random.next() as u16 } else { 1 };
        store(ring + 2, index.wrapping_add(jump));
    }

    /// Waits for what was offered to be looked at, but not for ever: a device may have given itself up.
    fn wait(&self) {
        let offered: u16 = load(self.base + (1 << 16) + 2);
        // SAFETY: it is memory.
        let used = || unsafe { read_volatile((self.base + (1 << 17) + 2) as *const u16) };
        (0..PATIENCE).take_while(|_| used() != offered).for_each(drop);
    }

    fn describe(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.base + 16 * u64::from(index);
        store(at, address);
        store(at + 8, len);
        store(at + 12, flags);
        store(at + 14, next);
    }
}

/// A frame whose header lies about what is to be done to it.
fn frame(queue: &Queue, head: u16, random: &mut Random) {
    let buffer = POOL + (4 << 20) + random.below(256) * 4096;
    // Flags, kind of segmentation, lengths and offsets (virtio 1.2, 5.1.6), then an IPv4 frame's beginning.
    let kinds = [0, 1, 3, 4, 5, 0x80, random.next() as u8];
    store(buffer, random.next());
    store(buffer, random.below(4) as u8);
    store(buffer + 1, kinds[random.below(kinds.len() as u64) as usize]);
    store(buffer + 24, 0x0045_0008u32);
    let next = (head + 1) % queue.size as u16;
    queue.describe(head, buffer, length(random).min(4096), 1, next);
    queue.describe(next, buffer + 64, length(random).min(1 << 20), random.below(8) as u16 / 7 * 2, 0);
}

/// A request of a disk's, most of the time of the right form, at a place that may not be there.
fn block(queue: &Queue, head: u16, random: &mut Random) {
    let buffer = POOL + (4 << 20) + random.below(256) * 4096;
    let kinds = [0, 1, 1, 1, 4, 8, 11, 13, random.next() as u32];
    store(buffer, kinds[random.below(kinds.len() as u64) as usize]);
    // The disks of the test have 8192 sectors.
    let sectors = [0, 64, 8190, 8191, 8192, 8193, 1 << 53, u64::MAX, u64::MAX / 512, random.next()];
    let sector = sectors[random.below(sectors.len() as u64) as usize];
    store(buffer + 8, sector);
    // What a DISCARD says.
    store(buffer + 16, sector);
    store(buffer + 24, random.next());
    let next = |n: u16| (head + n) % queue.size as u16;
    queue.describe(head, buffer, 16, 1, next(1));
    let len = length(random).min(1 << 22) & !511;
    queue.describe(next(1), buffer, len.max(512), 1 | random.below(2) as u16 * 2, next(2));
    queue.describe(next(2), buffer + 2048, 1, 2, 0);
}

/// Numbers of pages for a balloon: some of the pool's, some that there are not.
fn pages(queue: &Queue, head: u16, random: &mut Random) {
    let buffer = POOL + (4 << 20) + random.below(256) * 4096;
    for n in 0..64 {
        let odd = [u32::MAX, 1 << 20, (WINDOWS >> 12) as u32, random.next() as u32 | 1 << 28];
        let page = match random.below(8) {
            0 => odd[random.below(4) as usize],
            _ => ((POOL + (9 << 20)) >> 12) as u32 + random.below(512) as u32,
        };
        store(buffer + 4 * n, page);
    }
    queue.describe(head, buffer, 1 + random.below(256) as u32, random.below(2) as u16 * 2, 0);
}

/// A packet, in one field of which is something else.
fn packet(queue: &Queue, head: u16, random: &mut Random) {
    let buffer = POOL + (4 << 20) + random.below(256) * 4096;
    let mut header = vsock::header(random.below(10) as u16, random.below(8) as u32, 0);
    let odd = random.next();
    match random.below(8) {
        0 => header.src_cid = odd,
        1 => header.dst_cid = odd,
        2 => header.len = odd as u32,
        3 => header.kind = odd as u16,
        4 => header.fwd_cnt = odd as u32,
        5 => header.dst_port = odd as u32,
        _ => header.buf_alloc = odd as u32,
    }
    // Somebody listens there, and never says anything.
    header.dst_port += (header.dst_port == vsock::HOST_PORT) as u32;
    vsock::put(buffer, &header);
    let next = (head + 1) % queue.size as u16;
    queue.describe(head, buffer, length(random).min(4096), 1, next);
    queue.describe(next, buffer + 64, length(random).min(1 << 20), 0, 0);
}
