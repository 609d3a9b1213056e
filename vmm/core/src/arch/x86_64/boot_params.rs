//! The page of boot parameters of the Linux boot protocol (Documentation/arch/x86/boot.rst).

use std::io;

use bulkhead_virtio::Memory;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress};

use super::layout;

/// Usable memory and what is not (e820).
const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// "HdrS" of the setup header.
const HEADER_MAGIC: u32 = 0x5372_6448;
/// A loader without a number of its own.
const UNDEFINED_LOADER: u8 = 0xff;
/// Values that only the real-mode code would use, but that the kernel checks.
const BOOT_FLAG: u16 = 0xaa55;
const ALIGNMENT: u32 = 0x0100_0000;

/// A seed that the kernel counts as enough (drivers/char/random.c: 256 bits).
pub(crate) const SEED: usize = 32;
/// The kind of setup_data that is a seed (asm/setup_data.h), and the length of a setup_data without content.
const SETUP_RNG_SEED: u64 = 9;
const SETUP_HEADER: u64 = 16;

/// What the kernel is told.
#[derive(Debug)]
pub(crate) struct Told<'a> {
    /// The command line.
    pub(crate) cmdline: &'a str,
    /// Where the initial root file system lies, and how long it is.
    pub(crate) initrd: (GuestAddress, u32),
    /// Bytes of memory at boot.
    pub(crate) memory: u64,
    /// What its random numbers begin with, from the first one on; the entropy device is found later.
    pub(crate) seed: [u8; SEED],
}

/// The map of memory at boot; memory that can be added is not in it.
fn e820(memory: u64) -> Vec<boot_e820_entry> {
    let entry = |addr, end: u64, kind| boot_e820_entry { addr, size: end - addr, r#type: kind };
    let mut map = vec![
        entry(0, layout::MP_TABLE, RAM),
        entry(layout::MP_TABLE, layout::ABOVE_1M, RESERVED),
        entry(layout::ABOVE_1M, memory.min(layout::LOW_MEMORY_END), RAM),
    ];
    if memory > layout::LOW_MEMORY_END {
        let high = layout::HIGH_MEMORY + memory - layout::LOW_MEMORY_END;
        map.push(entry(layout::HIGH_MEMORY, high, RAM));
    }
    map
}

/// Writes command line and boot parameters.
///
/// # Errors
/// They do not fit: the command line is too long, or memory too small.
pub(crate) fn write(memory: &Memory, told: &Told<'_>) -> io::Result<()> {
    if told.cmdline.len() >= layout::CMDLINE_MAX {
        let (is, max) = (told.cmdline.len(), layout::CMDLINE_MAX - 1);
        return Err(io::Error::other(format!("a command line of {is} bytes, with room for {max}")));
    }
    let mut text = told.cmdline.as_bytes().to_vec();
    text.push(0);
    memory.write_slice(&text, GuestAddress(layout::CMDLINE)).map_err(io::Error::other)?;

    let put = |value: u64, at: u64| memory.write_obj(value, GuestAddress(at)).map_err(io::Error::other);
    // The next one (none); kind and length, 32 bits each; the content. The kernel wipes it when it has read it.
    put(0, layout::SETUP_DATA)?;
    put(SETUP_RNG_SEED | (SEED as u64) << 32, layout::SETUP_DATA + 8)?;
    let content = GuestAddress(layout::SETUP_DATA + SETUP_HEADER);
    memory.write_slice(&told.seed, content).map_err(io::Error::other)?;

    let mut params = boot_params::default();
    params.hdr.setup_data = layout::SETUP_DATA;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = UNDEFINED_LOADER;
    params.hdr.kernel_alignment = ALIGNMENT;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = text.len() as u32;
    params.hdr.ramdisk_image = told.initrd.0.0 as u32;
    params.hdr.ramdisk_size = told.initrd.1;
    let map = e820(told.memory);
    params.e820_entries = map.len() as u8;
    params.e820_table[..map.len()].copy_from_slice(&map);
    memory.write_obj(params, GuestAddress(layout::ZERO_PAGE)).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Start, end and type of each entry.
    fn map(memory: u64) -> Vec<(u64, u64, u32)> {
        e820(memory).iter().map(|e| (e.addr, e.addr + e.size, e.r#type)).collect()
    }

    #[test]
    fn the_map_has_all_memory_and_no_device() {
        assert_eq!(map(512 << 20), [(0, 0x9fc00, 1), (0x9fc00, 0x10_0000, 2), (0x10_0000, 512 << 20, 1)]);
        let large = map(8 << 30);
        assert_eq!(large[2].1, layout::LOW_MEMORY_END);
        assert_eq!(large[3], (4 << 30, (8 << 30) + (1 << 30), 1));
    }
}
