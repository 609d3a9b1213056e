//! The guest's memory: where it lies, what backs it, and how it is given back.
//! Knows mappings; KVM learns of them in `kvm`.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
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
    fn huge_pages_would_fit() {
        let map = GuestMemoryMap::new(SizeMib(16), SizeMib(0), true).unwrap();
        let region = map.memory.iter().next().unwrap();
        assert_eq!(region.as_ptr() as usize % (2 << 20), 0);
    }
}
