//! The devices by which a guest gets and gives memory. What they ask of the host is checked at once.

use std::{
    io,
    ops::Range,
    sync::{Arc, Mutex},
};

use vm_memory::GuestAddress;

use super::{
    input::{BUFFERS, Input, REGIONS},
    world::{Shared, Subject, World},
};
use crate::{
    balloon::{Balloon, Discard},
    mem::{ALIGNMENT, BLOCK_SIZE, Backing, Mem, MemConfig},
};

/// Checks that only pages of the guest's are given back.
struct Checked;

impl Discard for Checked {
    fn discard(&mut self, address: GuestAddress, len: u64) -> io::Result<()> {
        let (start, end) = (address.0, address.0 + len);
        assert!(len > 0 && start.is_multiple_of(4096) && len.is_multiple_of(4096), "{start:#x} {len:#x}");
        let inside = REGIONS.iter().any(|&(at, size)| at <= start && end <= at + size as u64);
        assert!(inside, "{start:#x} to {end:#x} is not in one region of the guest's memory");
        if start & 0x1000 == 0 { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }
}

pub(super) struct BalloonSubject(Arc<Mutex<Balloon>>);

impl Subject for BalloonSubject {
    fn new(_input: &mut Input<'_>) -> Self {
        Self(Arc::new(Mutex::new(Balloon::new(Box::new(Checked)).expect("make the device"))))
    }

    fn device(&self) -> Shared {
        self.0.clone()
    }

    fn host(&mut self, input: &mut Input<'_>) {
        let mut balloon = self.0.lock().expect("the device");
        match input.byte() & 1 {
            0 => balloon.set_target(input.word()),
            _ => drop(balloon.request_stats()),
        }
    }

    fn honest(&mut self, world: &mut World) {
        let page = (BUFFERS / 4096) as u32 + 2;
        world.fill(BUFFERS, &page.to_le_bytes());
        let head = world.rings[0].offer(&[(BUFFERS, 4, false)]);
        world.kick(0);
        assert_eq!(world.rings[0].take_used().map(|used| used.0), Some(head));
        // A list of the guest's numbers is kept until newer ones are asked for.
        let head = world.rings[2].offer(&[(BUFFERS, 10, false)]);
        world.kick(2);
        assert_eq!(world.rings[2].take_used(), None);
        assert!(self.0.lock().expect("the device").request_stats());
        assert_eq!(world.rings[2].take_used().map(|used| used.0), Some(head));
    }
}

/// A window beyond all other memory.
const WINDOW: MemConfig = MemConfig { start: 4 << 30, size: 4 * ALIGNMENT, block_size: BLOCK_SIZE };

/// What the host has made of the window: a flag for each block.
type Blocks = Arc<Mutex<Vec<bool>>>;

struct Made(Blocks);

impl Made {
    fn set(&mut self, range: Range<u64>, to: bool) {
        let (start, end) = (WINDOW.start, WINDOW.start + WINDOW.size);
        assert!(start <= range.start && range.start < range.end && range.end <= end, "{range:x?}");
        assert!([range.start, range.end].iter().all(|at| at.is_multiple_of(BLOCK_SIZE)), "{range:x?}");
        let number = |at: u64| ((at - start) / BLOCK_SIZE) as usize;
        for block in &mut self.0.lock().expect("the blocks")[number(range.start)..number(range.end)] {
            assert!(!(to && *block), "a block that is there is made again");
            *block = to;
        }
    }
}

impl Backing for Made {
    fn plug(&mut self, range: Range<u64>) -> io::Result<()> {
        // Now and then there is none.
        if range.start & 0x400_0000 != 0 {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.set(range, true);
        Ok(())
    }

    fn unplug(&mut self, range: Range<u64>) -> io::Result<()> {
        self.set(range, false);
        Ok(())
    }
}

pub(super) struct MemSubject {
    device: Arc<Mutex<Mem>>,
    made: Blocks,
    /// The most that was ever asked of the guest: it may keep what it had.
    most: u64,
}

impl MemSubject {
    fn request(&mut self, bytes: u64) {
        let mut device = self.device.lock().expect("the device");
        if device.set_requested(bytes).is_ok() {
            self.most = self.most.max(bytes);
        }
    }

    fn check(&self) {
        let made = self.made.lock().expect("the blocks").iter().filter(|made| **made).count() as u64;
        assert_eq!(made * BLOCK_SIZE, self.device.lock().expect("the device").plugged());
        assert!(made * BLOCK_SIZE <= self.most, "the guest has more than was ever asked of it");
    }

    fn ask(&self, world: &mut World, kind: u16, address: u64, blocks: u16) -> u16 {
        let mut request = [0; 24];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&blocks.to_le_bytes());
        world.fill(BUFFERS, &request);
        let head = world.rings[0].offer(&[(BUFFERS, 24, false), (BUFFERS + 32, 10, true)]);
        world.kick(0);
        assert_eq!(world.rings[0].take_used(), Some((head, 10)));
        let answer = world.bytes(BUFFERS + 32, 2);
        u16::from_le_bytes([answer[0], answer[1]])
    }
}

impl Subject for MemSubject {
    fn new(_input: &mut Input<'_>) -> Self {
        let made = Blocks::new(Mutex::new(vec![false; (WINDOW.size / BLOCK_SIZE) as usize]));
        let device = Mem::new(WINDOW, Box::new(Made(made.clone()))).expect("make the device");
        let mut this = Self { device: Arc::new(Mutex::new(device)), made, most: 0 };
        this.request(16 * BLOCK_SIZE);
        this
    }

    fn device(&self) -> Shared {
        self.device.clone()
    }

    fn host(&mut self, input: &mut Input<'_>) {
        self.request(u64::from(input.byte()) * BLOCK_SIZE);
    }

    fn calm(&mut self) {
        self.check();
        self.request(16 * BLOCK_SIZE);
    }

    fn honest(&mut self, world: &mut World) {
        // Everything away, as a driver begins; then one block, which is seen.
        assert_eq!(self.ask(world, 2, 0, 0), 0);
        assert_eq!(self.ask(world, 0, WINDOW.start, 1), 0);
        self.check();
        assert_eq!(self.device.lock().expect("the device").plugged(), BLOCK_SIZE);
    }
}
