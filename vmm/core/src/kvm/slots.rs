//! Memory that comes and goes: a KVM slot for each block of the window that has anything plugged in it.
//! What is not in a slot does not exist for the guest's processors.

use std::{io, ops::Range};

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::Vm;
use bulkhead_virtio::mem::Backing;

use crate::{arch::layout, memory::Giver};

/// The window of memory that can be added.
pub(crate) struct Growth {
    vm: Vm,
    giver: Giver,
    window: Range<u64>,
    /// Where the window is mapped in this process.
    host: u64,
    /// The first KVM slot that is free for it.
    first_slot: u32,
    /// For each slot of [`layout::GROWTH_ALIGN`] bytes a bit for each piece of [`PIECE`] that is plugged.
    plugged: Vec<u64>,
}

/// What a bit stands for: 64 of them are a slot.
const PIECE: u64 = layout::GROWTH_ALIGN / 64;

/// The bits of the pieces from byte `start` to byte `end` of a slot.
fn bits(start: u64, end: u64) -> u64 {
    let (first, last) = (start / PIECE, end.div_ceil(PIECE));
    let below = |n: u64| if n >= 64 { u64::MAX } else { (1 << n) - 1 };
    below(last) & !below(first)
}

impl Growth {
    /// The window with nothing plugged. `None` if there is no such window in `memory`.
    pub(crate) fn new(
        vm: Vm,
        memory: &bulkhead_virtio::Memory,
        giver: Giver,
        window: Range<u64>,
        first_slot: u32,
    ) -> Option<Self> {
        let region = memory.find_region(GuestAddress(window.start)).filter(|_| !window.is_empty())?;
        let host = region.as_ptr() as u64 + (window.start - region.start_addr().raw_value());
        let blocks = (window.end - window.start).div_ceil(layout::GROWTH_ALIGN);
        Some(Self { vm, giver, window, host, first_slot, plugged: vec![0; blocks as usize] })
    }

    fn give(&mut self, range: Range<u64>) -> io::Result<()> {
        for (block, bits) in self.blocks(range)? {
            if self.plugged[block] == 0 {
                self.set(block, true)?;
            }
            self.plugged[block] |= bits;
        }
        Ok(())
    }

    fn take(&mut self, range: Range<u64>) -> io::Result<()> {
        for (block, bits) in self.blocks(range.clone())? {
            let before = self.plugged[block];
            self.plugged[block] &= !bits;
            if before != 0 && self.plugged[block] == 0 {
                self.set(block, false)?;
            }
        }
        self.giver.give_back(GuestAddress(range.start), range.end - range.start)
    }

    fn set(&self, block: usize, present: bool) -> io::Result<()> {
        let offset = block as u64 * layout::GROWTH_ALIGN;
        let at = self.window.start + offset;
        let size = (self.window.end - at).min(layout::GROWTH_ALIGN);
        let slot = self.first_slot + block as u32;
        let size = if present { size } else { 0 };
        self.vm.set_slot(slot, at, size, self.host + offset).map_err(io::Error::other)
    }

    /// The slots that a stretch touches, each with the bits of its pieces.
    fn blocks(&self, range: Range<u64>) -> io::Result<Vec<(usize, u64)>> {
        if range.start < self.window.start || range.end > self.window.end || range.start >= range.end {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "memory outside of the window"));
        }
        let block = |at: u64| ((at - self.window.start) / layout::GROWTH_ALIGN) as usize;
        Ok((block(range.start)..=block(range.end - 1))
            .map(|n| {
                let start = self.window.start + n as u64 * layout::GROWTH_ALIGN;
                let end = range.end.min(start + layout::GROWTH_ALIGN);
                (n, bits(range.start.max(start) - start, end - start))
            })
            .collect())
    }
}

impl Backing for Growth {
    fn plug(&mut self, range: Range<u64>) -> io::Result<()> {
        self.give(range)
    }

    fn unplug(&mut self, range: Range<u64>) -> io::Result<()> {
        self.take(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_stands_for_a_piece() {
        assert_eq!(bits(0, PIECE), 1);
        assert_eq!(bits(0, layout::GROWTH_ALIGN), u64::MAX);
        assert_eq!(bits(62 * PIECE, layout::GROWTH_ALIGN), 3 << 62);
        assert_eq!(bits(PIECE, 3 * PIECE), 0b110);
    }
}
