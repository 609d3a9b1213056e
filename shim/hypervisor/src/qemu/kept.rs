//! Memory that an emulated machine is kept from: where it lies, and what of it is there.
//! Knows a file and addresses; that the guest uses no more than it was told of is its agent's part.
//!
//! ```text
//!  file      0          boot        start                                      start + blocks
//!            ├── memory at boot ──┤···├─ block 0 ─┼─ block 1 ─┼ … ─┼─ last block ─┤
//!  guest     told at boot (`mem=`)    told later, or never
//!  length                      └ nothing given     └ block 1 given, block 0 perhaps not: a hole
//! ```
//! The machine has all of it in its map from the start, since a microvm can be given none later. The file behind the
//! map is only as long as what was given: a guest that touches more ends its machine (SIGBUS), and takes nothing from
//! the host. It is cut when the guest has said hello, for the firmware puts the initial root file system at the end
//! of low memory; the kernel has moved it by then.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use bulkhead_vmm_spec::{Shape, SizeMib};
use nix::{
    fcntl::{FallocateFlags, fallocate},
    sys::memfd::{MFdFlags, memfd_create},
    unistd::ftruncate,
};

/// Memory comes and goes in such blocks: Linux's on x86-64 with less than 64 GiB at boot (memory_block_size_bytes).
pub const BLOCK: SizeMib = SizeMib(128);
/// Where a microvm's low memory ends, and its high memory begins (hw/i386/microvm.c, microvm_memory_init).
const LOW_END: SizeMib = SizeMib(3 << 10);
const HIGH_START: SizeMib = SizeMib(4 << 10);

/// The guest's address of a place in the file.
fn address(offset: SizeMib) -> SizeMib {
    if offset < LOW_END { offset } else { SizeMib(offset.0 - LOW_END.0 + HIGH_START.0) }
}

/// Where the guest's memory ends at boot, as `mem=` names it.
pub(super) fn boot_end(shape: &Shape) -> SizeMib {
    // An end is the address behind the last byte.
    SizeMib(address(SizeMib(shape.memory.0 - 1)).0 + 1)
}

/// Memory at boot and all that is kept back, with what lies between them.
pub(super) fn total(shape: &Shape) -> SizeMib {
    SizeMib(shape.memory.0.next_multiple_of(BLOCK.0) + shape.growth.0)
}

/// The guest's memory as a file, and which blocks behind the memory at boot are there.
#[derive(Debug)]
pub struct Kept {
    file: OwnedFd,
    boot: SizeMib,
    blocks: u64,
    given: Mutex<BTreeSet<u64>>,
}

impl Kept {
    /// A file for all the memory that a machine of this shape can ever have.
    pub(super) fn new(shape: &Shape) -> io::Result<Self> {
        let file = memfd_create("guest-memory", MFdFlags::MFD_CLOEXEC)?;
        ftruncate(&file, total(shape).bytes() as i64)?;
        let blocks = shape.growth.0 / BLOCK.0;
        Ok(Self { file, boot: shape.memory, blocks, given: Mutex::default() })
    }

    /// The same file, for the machine.
    pub(super) fn share(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// How many blocks there can be; they are numbered from 0.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Where the guest finds a block, in bytes.
    pub fn address(&self, block: u64) -> u64 {
        address(self.place(block)).bytes()
    }

    fn place(&self, block: u64) -> SizeMib {
        SizeMib(self.boot.0.next_multiple_of(BLOCK.0) + block * BLOCK.0)
    }

    /// Takes everything but the memory at boot and what was given from the machine; once its guest has said hello.
    ///
    /// # Errors
    /// The system refuses.
    pub fn cut(&self) -> io::Result<()> {
        self.set_length(&self.lock())
    }

    /// Blocks that are there.
    pub fn given(&self) -> BTreeSet<u64> {
        self.lock().clone()
    }

    /// Gives blocks, which read as zeros; the host has memory for them when they are touched.
    ///
    /// # Errors
    /// The system refuses; nothing has changed then.
    pub fn give(&self, blocks: &[u64]) -> io::Result<()> {
        let mut given = self.lock();
        let mut more = given.clone();
        more.extend(blocks.iter().filter(|block| **block < self.blocks));
        self.set_length(&more)?;
        *given = more;
        Ok(())
    }

    /// Takes blocks, which the guest must not use any more, and gives their memory back to the host.
    ///
    /// # Errors
    /// The system refuses; some memory may not be given back then.
    pub fn take(&self, blocks: &[u64]) -> io::Result<()> {
        let mut given = self.lock();
        for block in blocks.iter().filter(|block| given.contains(block)) {
            let (start, len) = (self.place(*block).bytes() as i64, BLOCK.bytes() as i64);
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&self.file, hole, start, len)?;
        }
        for block in blocks {
            given.remove(block);
        }
        self.set_length(&given)
    }

    fn set_length(&self, given: &BTreeSet<u64>) -> io::Result<()> {
        let end = given.last().map_or(self.boot, |last| self.place(last + 1));
        Ok(ftruncate(&self.file, end.bytes() as i64)?)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::testing::shape_and_bindings;

    fn shape(memory: u64, growth: u64) -> Shape {
        let (mut shape, _) = shape_and_bindings();
        (shape.memory, shape.growth) = (SizeMib(memory), SizeMib(growth));
        shape
    }

    #[test]
    fn blocks_lie_behind_the_memory_at_boot_and_leave_the_hole_for_devices_free() {
        let kept = Kept::new(&shape(228, 3072)).unwrap();
        let mib = |block| kept.address(block) >> 20;
        assert_eq!((mib(0), mib(1), mib(21), mib(22)), (256, 384, 2944, 4096));
        assert_eq!(kept.blocks(), 24);
        let ends = [(1152, 1152), (3072, 3072), (3074, 4098), (8192, 9216)];
        for (memory, end) in ends {
            assert_eq!(boot_end(&shape(memory, 128)), SizeMib(end), "{memory} MiB");
        }
    }

    #[test]
    fn the_file_is_as_long_as_what_was_given_and_what_was_taken_is_gone() {
        let kept = Kept::new(&shape(200, 1024)).unwrap();
        let file = std::fs::File::from(kept.share().unwrap());
        let mib = || file.metadata().unwrap().len() >> 20;
        let held = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) / 8;
        assert_eq!(mib(), 1280);
        kept.cut().unwrap();
        assert_eq!(mib(), 200);
        kept.give(&[0, 2, 99]).unwrap();
        assert_eq!((mib(), kept.given()), (640, BTreeSet::from([0, 2])), "block 99 is none");
        for block in [0, 2] {
            file.write_all_at(b"x", kept.place(block).bytes()).unwrap();
        }
        assert_eq!(held(), 2, "pages of 4 KiB");
        kept.take(&[0]).unwrap();
        assert_eq!((mib(), held()), (640, 1), "a hole");
        kept.take(&[2, 7]).unwrap();
        assert_eq!((mib(), held(), kept.given()), (200, 0, BTreeSet::new()));
    }
}
