//! Puts kernel, initial root file system and boot parameters into the guest's memory.
//! Knows files and memory; registers are `arch`'s.

mod cmdline;

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
};

use bulkhead_virtio::Memory;
use bulkhead_vmm_spec::Shape;
use linux_loader::loader::{KernelLoader, elf::Elf};
use vm_memory::{GuestAddress, GuestMemory, Permissions, ReadVolatile, VolatileSlice};

use crate::{
    arch::{boot_params, layout, mptable, registers},
    sys,
};
pub(crate) use cmdline::{DeviceWord, Words};

/// Why a guest cannot be put into memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// The kernel file is not one.
    #[error("the kernel is not an uncompressed x86-64 ELF (vmlinux): {0}; name another in hypervisor.kernel")]
    Kernel(String),
    /// The initial root file system does not fit beside the kernel.
    #[error(
        "the initrd has {size} bytes, and {room} are free beside the kernel: give the machine more memory or a smaller image"
    )]
    InitrdSize {
        /// Its size.
        size: u64,
        /// What is free.
        room: u64,
    },
    /// The initial root file system cannot be read.
    #[error("cannot read the initrd: {0}")]
    Initrd(io::Error),
    /// Tables or parameters cannot be written.
    #[error("cannot write the boot parameters: {0}")]
    Parameters(io::Error),
}

/// Loads everything, and answers where the first instruction is.
///
/// # Errors
/// See [`BootError`]; each says what is wrong with which file.
pub(crate) fn load(
    memory: &Memory,
    shape: &Shape,
    kernel: &mut File,
    initrd: &mut File,
    words: &Words<'_>,
) -> Result<GuestAddress, BootError> {
    let loaded = Elf::load(&**memory, None, kernel, Some(GuestAddress(layout::ABOVE_1M)))
        .map_err(|e| BootError::Kernel(e.to_string()))?;
    let initrd = load_initrd(memory, shape.memory.bytes(), loaded.kernel_end, initrd)?;
    let cmdline = words.line(shape);
    let mut seed = [0; boot_params::SEED];
    sys::random(&mut seed).map_err(BootError::Parameters)?;
    let told = boot_params::Told { cmdline: &cmdline, initrd, memory: shape.memory.bytes(), seed };
    boot_params::write(memory, &told).map_err(BootError::Parameters)?;
    mptable::write(memory, shape.max_vcpus).map_err(BootError::Parameters)?;
    registers::write_tables(memory).map_err(BootError::Parameters)?;
    Ok(loaded.kernel_load)
}

/// Where the archive lies: at the end of low memory, where the kernel does not put anything else first.
pub(crate) fn initrd_range(memory: u64, size: u64) -> Option<std::ops::Range<u64>> {
    // boot.rst, initrd_addr_max: the kernel's own limit is 2 GiB - 1.
    let end = memory.min(layout::LOW_MEMORY_END).min(1 << 31);
    let at = end.checked_sub(size)? & !0xfff;
    Some(at..at + size)
}

/// The size of a file, which is then read from its beginning.
///
/// # Errors
/// It has none.
pub(crate) fn size_of(file: &mut File) -> io::Result<u64> {
    let size = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    Ok(size)
}

/// Reads the archive to its place.
fn load_initrd(
    memory: &Memory,
    size_of_memory: u64,
    kernel_end: u64,
    file: &mut File,
) -> Result<(GuestAddress, u32), BootError> {
    let size = size_of(file).map_err(BootError::Initrd)?;
    let range = initrd_range(size_of_memory, size).filter(|range| range.start >= kernel_end);
    let room = initrd_range(size_of_memory, 0).map_or(0, |end| end.start.saturating_sub(kernel_end));
    let too_large = BootError::InitrdSize { size, room };
    let Some(at) = range.map(|range| range.start) else { return Err(too_large) };
    let len = u32::try_from(size).map_err(|_| too_large)?;
    let at = GuestAddress(at);
    read_exact(memory, at, size as usize, file).map_err(BootError::Initrd)?;
    Ok((at, len))
}

fn read_exact(memory: &Memory, at: GuestAddress, len: usize, file: &mut File) -> io::Result<()> {
    let slices = memory.get_slices(at, len, Permissions::Write).map_err(io::Error::other)?;
    for slice in slices {
        let mut slice: VolatileSlice<'_, ()> = slice.map_err(io::Error::other)?;
        file.read_exact_volatile(&mut slice).map_err(io::Error::other)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
