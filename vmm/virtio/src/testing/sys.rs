//! What fuzzing needs from the system: guest memory between fences, and a thread's processor time.
//! Knows nothing of devices. One of the few files with unsafe code.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::{fd::FromRawFd, unix::fs::FileExt},
    sync::Arc,
    time::Duration,
};

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, mmap::MmapRegionBuilder};

use crate::Memory;

/// Bytes of a fence.
const FENCE: usize = 16 << 10;
/// What a fence is made of.
const FILL: u8 = 0xa5;

/// A file in memory, of this size.
pub(super) fn memory_file(size: u64) -> io::Result<File> {
    // SAFETY: the name is a string with its end; the descriptor is new and nobody else's.
    let file = unsafe {
        match libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) {
            -1 => return Err(io::Error::last_os_error()),
            fd => File::from_raw_fd(fd),
        }
    };
    file.set_len(size)?;
    Ok(file)
}

/// Processor time that this thread has used.
pub(super) fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Guest memory whose regions lie between fences: whoever leaves one tramples a fence.
pub(super) struct Fenced {
    file: File,
    /// Offset and size of each region in the file.
    places: Vec<(u64, usize)>,
    memory: Memory,
}

impl Fenced {
    /// Maps these regions, guest address and size each, for the rest of the process' life.
    pub(super) fn new(regions: &[(u64, usize)]) -> io::Result<Self> {
        let size = regions.iter().map(|r| r.1 + FENCE).sum::<usize>() + FENCE;
        let file = memory_file(size as u64)?;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at a place of the kernel's choice, in nobody's way.
        let base = unsafe {
            let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
            libc::mmap(std::ptr::null_mut(), size, prot, flags, fd, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mut places = Vec::new();
        let mut parts = Vec::new();
        let mut offset = FENCE;
        for &(guest, size) in regions {
            let at = base.cast::<u8>().wrapping_add(offset);
            let builder = MmapRegionBuilder::new(size).with_mmap_prot(prot).with_mmap_flags(flags);
            let builder = builder.with_file_offset(FileOffset::new(file.try_clone()?, offset as u64));
            // SAFETY: `size` bytes from `at` on are within the mapping, which is never undone.
            let region = unsafe { builder.with_raw_mmap_pointer(at) }.build().map_err(io::Error::other)?;
            parts.push(GuestRegionMmap::new(region, GuestAddress(guest)).ok_or(io::ErrorKind::InvalidInput)?);
            places.push((offset as u64, size));
            offset += size + FENCE;
        }
        let memory = Arc::new(GuestMemoryMmap::from_regions(parts).map_err(io::Error::other)?);
        Ok(Self { file, places, memory })
    }

    pub(super) fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// Puts the fences up, and zeros between them.
    pub(super) fn raise(&self) -> io::Result<()> {
        for (at, size) in self.fences() {
            self.file.write_all_at(&vec![FILL; size], at)?;
        }
        self.places.iter().try_for_each(|&(at, size)| self.file.write_all_at(&vec![0; size], at))
    }

    /// Whether every fence stands as it was put up.
    pub(super) fn stand(&self) -> io::Result<bool> {
        let mut bytes = [0; FENCE];
        for (at, size) in self.fences() {
            self.file.read_exact_at(&mut bytes[..size], at)?;
            if bytes[..size].iter().any(|&byte| byte != FILL) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn fences(&self) -> impl Iterator<Item = (u64, usize)> {
        let ends = self.places.iter().map(|&(at, size)| at + size as u64);
        std::iter::once(0).chain(ends).map(|at| (at, FENCE))
    }
}
