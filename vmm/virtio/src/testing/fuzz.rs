//! Bytes become a guest: its memory, its rings, and a script of what it and the host do to one device.
//! One function for each device, for the fuzz targets in `tests/fuzz` and for a test that needs no fuzzer.
//!
//! ```text
//!  bytes ─▶ [driver comes up] ─▶ steps: registers, memory, rings, kicks, pauses, the host's side
//!        ─▶ reset ─▶ an honest driver ─▶ an honest request is served
//! ```
//!
//! Whatever the bytes are, it holds that
//! * nothing panics;
//! * nothing is written outside of the guest's memory, whose regions lie between fences;
//! * one turn of the event loop takes a bounded time, and without a new request the loop comes to rest;
//! * after its reset the device serves an honest driver.
//!
//! How much memory a device may take is the caller's to look at ([`Target::heap`]): it owns the allocator.

mod devices;
mod input;
mod memory;
mod world;

/// A device as something to attack.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, which is also that of its fuzz target and of its corpus.
    pub name: &'static str,
    /// Plays one input. Panics where the device is at fault.
    pub play: fn(&[u8]),
    /// Bytes of the heap that one input may need at a time, the input's own and the playing included.
    pub heap: usize,
}

/// What one input needs besides the device: the event loop, sockets, the script's buffers.
const PLAY_HEAP: usize = 4 << 20;

/// Every device there is, and the transport.
pub const TARGETS: &[Target] = &[
    Target { name: "mmio", play: mmio, heap: PLAY_HEAP },
    Target { name: "rng", play: rng, heap: PLAY_HEAP },
    Target { name: "block", play: block, heap: PLAY_HEAP },
    Target { name: "net", play: net, heap: PLAY_HEAP },
    // Each stream may have its window under way; a script opens no more than 64 of the wide ones.
    Target { name: "vsock", play: vsock, heap: PLAY_HEAP + (64 << 18) },
    Target { name: "fs", play: fs, heap: PLAY_HEAP },
    Target { name: "balloon", play: balloon, heap: PLAY_HEAP },
    Target { name: "mem", play: mem, heap: PLAY_HEAP },
    Target { name: "console", play: console, heap: PLAY_HEAP },
];

/// The transport: registers at any offset in any width, save and restore at any time.
pub fn mmio(bytes: &[u8]) {
    world::play_registers(bytes);
}

/// The entropy source.
pub fn rng(bytes: &[u8]) {
    world::play::<devices::RngSubject>(bytes);
}

/// The block device, on a file in memory.
pub fn block(bytes: &[u8]) {
    world::play::<devices::BlockSubject>(bytes);
}

/// The network card, on a socket in place of a tap; the bytes are also the frames that arrive.
pub fn net(bytes: &[u8]) {
    world::play::<devices::NetSubject>(bytes);
}

/// The socket device; the bytes are also what the host's programs do.
pub fn vsock(bytes: &[u8]) {
    world::play::<devices::VsockSubject>(bytes);
}

/// The file system device; the bytes are also what its backend answers.
pub fn fs(bytes: &[u8]) {
    world::play::<devices::FsSubject>(bytes);
}

/// The balloon; the bytes are also what the host asks of the guest.
pub fn balloon(bytes: &[u8]) {
    world::play::<memory::BalloonSubject>(bytes);
}

/// The memory device; the bytes are also what the host asks of the guest.
pub fn mem(bytes: &[u8]) {
    world::play::<memory::MemSubject>(bytes);
}

/// The console; the bytes are also what somebody types.
pub fn console(bytes: &[u8]) {
    world::play::<devices::ConsoleSubject>(bytes);
}

/// Makes inputs of inputs: the same ones for the same seed.
pub struct Mutator(u64);

impl Mutator {
    /// A mutator that begins at `seed`.
    pub fn new(seed: u64) -> Self {
        // Zero is where a xorshift stays.
        Self(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// An input like `from`, with parts of `other` in it.
    pub fn mutate(&mut self, from: &[u8], other: &[u8]) -> Vec<u8> {
        let mut out = from.to_vec();
        for _ in 0..=self.below(6) {
            let at = self.below(out.len() + 1);
            match self.below(6) {
                0 if at < out.len() => out[at] ^= 1 << self.below(8),
                1 if at < out.len() => out[at] = self.next() as u8,
                2 => drop(out.splice(at..at, self.next().to_le_bytes())),
                3 => {
                    let end = (at + self.below(16)).min(out.len());
                    out.drain(at..end);
                }
                4 if !other.is_empty() => {
                    let from = self.below(other.len());
                    let end = (from + self.below(64)).min(other.len());
                    drop(out.splice(at..at, other[from..end].iter().copied()));
                }
                _ => {
                    let value = [0, 1, 0x7f, 0x80, 0xff][self.below(5)];
                    let end = (at + 1 + self.below(4)).min(out.len());
                    out[at..end].fill(value);
                }
            }
        }
        out.truncate(4096);
        out
    }
}
