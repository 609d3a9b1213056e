//! The guest's memory: where it lies, what backs it, and how it is given back.
//! Knows mappings; KVM learns of them in `kvm`.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    thread::JoinHandle,
};

use bulkhead_virtio::Memory;
use bulkhead_vmm_spec::SizeMib;
use nix::{
    fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion, Permissions,
};

use crate::{arch::layout, sys};

/// The guest's memory and what is behind it.
#[derive(Debug)]
pub(crate) struct GuestMemoryMap {
    /// As the devices see it: the memory at boot, and the window of what can be added.
    pub(crate) memory: Memory,
    /// The window of memory that can be added; empty if none can.
    pub(crate) growth: std::ops::Range<u64>,
    /// Shared with device programs, if there are any.
    file: Option<OwnedFd>,
}

/// A stretch of guest memory and where it is backed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    address: u64,
    size: u64,
}

/// Where memory of that size lies: below the hole for devices, and the rest from 4 GiB on.
fn stretches(boot: u64, growth: u64) -> (Vec<Stretch>, std::ops::Range<u64>) {
    let low = boot.min(layout::LOW_MEMORY_END);
    let mut all = vec![Stretch { address: 0, size: low }];
    let mut end = layout::HIGH_MEMORY;
    if boot > low {
        all.push(Stretch { address: end, size: boot - low });
        end += boot - low;
    }
    // Linux takes and gives memory in blocks of 128 MiB (x86 memory_block_size).
    let start = end.next_multiple_of(layout::GROWTH_ALIGN);
    if growth > 0 {
        all.push(Stretch { address: start, size: growth });
    }
    (all, start..start + growth)
}

/// What a guest's kernel fills before it starts a program: everything up to its own end, and the array of
/// page descriptors (64 bytes for each 4 KiB), which it puts as high as it can, with little else beside it.
fn filled_first(boot: u64, kernel: u64, initrd: std::ops::Range<u64>) -> [Stretch; 2] {
    const HUGE: u64 = 2 << 20;
    let low = (layout::KERNEL + kernel + HUGE).next_multiple_of(HUGE).min(boot);
    let (stretches, _) = stretches(boot, 0);
    let end = stretches.last().map_or(0, |s| s.address + s.size);
    let top = if initrd.contains(&(end - 1)) { initrd.start } else { end };
    let array = (boot / 64).next_multiple_of(HUGE) + HUGE;
    // Down to a whole huge page: the top one is the initrd's as well.
    let start = top.saturating_sub(array) & !(HUGE - 1);
    [Stretch { address: 0, size: low }, Stretch { address: start, size: top - start }]
}

impl GuestMemoryMap {
    /// Maps memory, which the host gives only when it is touched. `shared` says that programs beside us
    /// will map it too.
    ///
    /// # Errors
    /// The host has no room for it.
    pub(crate) fn new(boot: SizeMib, growth: SizeMib, shared: bool) -> io::Result<Self> {
        let (stretches, growth) = stretches(boot.bytes(), growth.bytes());
        let file = shared.then(|| memory_file(stretches.iter().map(|s| s.size).sum())).transpose()?;
        let mut regions = Vec::new();
        let mut offset = 0;
        for stretch in stretches {
            regions.push(map(stretch, file.as_ref(), offset)?);
            offset += stretch.size;
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)?;
        Ok(Self { memory: Arc::new(memory), growth, file })
    }

    /// Has the host give, on a thread of its own, the pages that the guest's kernel fills before anything
    /// else: the guest would wait at each of them while the host clears 2 MiB. `kernel` is the length of its
    /// file, `initrd` where the initial root file system lies.
    ///
    /// # Errors
    /// There is no thread.
    pub(crate) fn warm(
        &self,
        boot: SizeMib,
        kernel: u64,
        initrd: std::ops::Range<u64>,
    ) -> io::Result<JoinHandle<()>> {
        let memory = self.memory.clone();
        let ranges = filled_first(boot.bytes(), kernel, initrd);
        std::thread::Builder::new().name("warm".into()).spawn(move || {
            for Stretch { address, size } in ranges {
                // In a guest too small for such a stretch it is left out.
                if let Ok(slice) = memory.get_slice(GuestAddress(address), size as usize) {
                    sys::populate(slice.ptr_guard_mut().as_ptr(), size as usize);
                }
            }
        })
    }

    /// What can give pages back.
    pub(crate) fn giver(&self) -> io::Result<Giver> {
        let file = self.file.as_ref().map(|f| f.as_fd().try_clone_to_owned()).transpose()?;
        Ok(Giver { memory: self.memory.clone(), file })
    }
}

fn memory_file(size: u64) -> io::Result<OwnedFd> {
    let file = memfd_create("guest-memory", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&file, size as libc::off_t)?;
    // A device program that shrank it could kill us by a touch.
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

fn map(stretch: Stretch, file: Option<&OwnedFd>, offset: u64) -> io::Result<GuestRegionMmap<()>> {
    let at = sys::map_guest_memory(file.map(|f| (f, offset)), stretch.size as usize)?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let (kind, file) = match file {
        Some(file) => {
            let file = std::fs::File::from(file.as_fd().try_clone_to_owned()?);
            (libc::MAP_SHARED, Some(FileOffset::new(file, offset)))
        }
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None),
    };
    let builder = vm_memory::mmap::MmapRegionBuilder::new(stretch.size as usize)
        .with_mmap_prot(prot)
        .with_mmap_flags(kind | libc::MAP_NORESERVE);
    let builder = match file {
        Some(file) => builder.with_file_offset(file),
        None => builder,
    };
    // SAFETY: `at` is a mapping of exactly this size and kind, made a moment ago; it stays for ever.
    let region: MmapRegion<()> =
        unsafe { builder.with_raw_mmap_pointer(at) }.build().map_err(io::Error::other)?;
    GuestRegionMmap::new(region, GuestAddress(stretch.address))
        .ok_or_else(|| io::Error::other("guest memory beyond the end of the address space"))
}

/// Gives the host's pages behind guest memory back.
#[derive(Debug)]
pub(crate) struct Giver {
    memory: Memory,
    file: Option<OwnedFd>,
}

impl Giver {
    /// Forgets the content of `len` bytes from `address` on; they read as zeros afterwards.
    ///
    /// # Errors
    /// It is not guest memory, or the host refuses.
    pub(crate) fn give_back(&self, address: GuestAddress, len: u64) -> io::Result<()> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        if !GuestMemory::check_range(&*self.memory, address, len as usize, Permissions::Write) {
            return Err(outside());
        }
        let mut at = address;
        let end = address.0 + len;
        while at.0 < end {
            let region = self.memory.find_region(at).ok_or_else(outside)?;
            let inside = at.0 - region.start_addr().0;
            let n = (region.len() - inside).min(end - at.0);
            match (&self.file, region.file_offset()) {
                (Some(file), Some(offset)) => {
                    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    let start = (offset.start() + inside) as libc::off_t;
                    fallocate(file, flags, start, n as libc::off_t)?;
                }
                _ => sys::forget(region.as_ptr().wrapping_add(inside as usize), n as usize)?,
            }
            at.0 += n;
        }
        Ok(())
    }
}

impl bulkhead_virtio::balloon::Discard for Giver {
    fn discard(&mut self, address: GuestAddress, len: u64) -> io::Result<()> {
        self.give_back(address, len)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_leaves_the_hole_for_devices_free() {
        let (small, growth) = stretches(GIB, 0);
        assert_eq!(small, [Stretch { address: 0, size: GIB }]);
        assert!(growth.is_empty());
        let (large, growth) = stretches(5 * GIB, GIB);
        assert_eq!(large[0], Stretch { address: 0, size: layout::LOW_MEMORY_END });
        assert_eq!(large[1].address, 4 * GIB);
        assert_eq!(large[0].size + large[1].size, 5 * GIB);
        assert_eq!(growth.start % layout::GROWTH_ALIGN, 0);
        assert!(growth.start >= large[1].address + large[1].size);
        assert_eq!(growth.end - growth.start, GIB);
    }

    #[test]
    fn what_is_given_back_reads_as_zeros_and_the_rest_stays() {
        for shared in [false, true] {
            let map = GuestMemoryMap::new(SizeMib(16), SizeMib(128), shared).unwrap();
            let (here, there) = (GuestAddress(2 << 20), GuestAddress(4 << 20));
            map.memory.write_obj(7u64, here).unwrap();
            map.memory.write_obj(8u64, there).unwrap();
            let giver = map.giver().unwrap();
            giver.give_back(here, 2 << 20).unwrap();
            assert_eq!(map.memory.read_obj::<u64>(here).unwrap(), 0, "shared: {shared}");
            assert_eq!(map.memory.read_obj::<u64>(there).unwrap(), 8);
            giver.give_back(GuestAddress(map.growth.start), 128 << 20).unwrap();
            assert!(giver.give_back(GuestAddress(16 << 20), 4096).is_err(), "no memory there");
        }
    }

    #[test]
    fn what_is_filled_first_is_the_kernel_and_the_descriptors() {
        let initrd = (512 << 20) - 0x7a_8000..512 << 20;
        let [low, high] = filled_first(512 << 20, 21_000_000, initrd);
        assert_eq!(low, Stretch { address: 0, size: 40 << 20 });
        // 8 MiB of descriptors, and a little more.
        assert_eq!((high.address, high.address + high.size), (494 << 20, (512 << 20) - 0x7a_8000));
        let [_, high] = filled_first(4 * GIB, 21_000_000, 2 * GIB - 4096..2 * GIB);
        assert_eq!((high.address, high.size), (5 * GIB - (66 << 20), 66 << 20), "the initrd is elsewhere");
    }

    #[test]
    fn warmed_memory_keeps_its_content() {
        let map = GuestMemoryMap::new(SizeMib(64), SizeMib(0), true).unwrap();
        map.memory.write_obj(7u64, GuestAddress(1 << 20)).unwrap();
        map.warm(SizeMib(64), 4096, 60 << 20..64 << 20).unwrap().join().unwrap();
        assert_eq!(map.memory.read_obj::<u64>(GuestAddress(1 << 20)).unwrap(), 7);
        let blocks = nix::sys::stat::fstat(map.file.as_ref().unwrap()).unwrap().st_blocks;
        // 20 MiB from below and 4 from the end, in blocks of 512 bytes.
        assert!(blocks >= 24 << 11, "{blocks} blocks");
    }

    #[test]
    fn huge_pages_would_fit() {
        let map = GuestMemoryMap::new(SizeMib(16), SizeMib(0), true).unwrap();
        let region = map.memory.iter().next().unwrap();
        assert_eq!(region.as_ptr() as usize % (2 << 20), 0);
    }
}
