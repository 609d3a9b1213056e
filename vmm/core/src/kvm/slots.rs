//! Memory that comes and goes: a KVM slot for each block of the window that has anything plugged in it.
//! What is not in a slot does not exist for the guest's processors.

use std::{io, ops::Range};

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::Vm;
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
    /// Bytes plugged in each block.
    plugged: Vec<u64>,
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

    /// Lets the guest have a stretch of the window that it does not have.
    ///
    /// # Errors
    /// The stretch is not in the window, or KVM refuses; nothing has changed then.
    pub(crate) fn plug(&mut self, range: Range<u64>) -> io::Result<()> {
        for (block, part) in self.blocks(range)? {
            let before = self.plugged[block];
            if before == 0 {
                self.set(block, true)?;
            }
            self.plugged[block] = before + (part.end - part.start);
        }
        Ok(())
    }

    /// Takes a stretch from the guest that it has, and gives its pages back to the host.
    ///
    /// # Errors
    /// The stretch is not in the window, or KVM or the host refuse.
    pub(crate) fn unplug(&mut self, range: Range<u64>) -> io::Result<()> {
        for (block, part) in self.blocks(range.clone())? {
            let left = self.plugged[block].saturating_sub(part.end - part.start);
            self.plugged[block] = left;
            if left == 0 {
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

    /// The blocks that a stretch touches, each with its part of it.
    fn blocks(&self, range: Range<u64>) -> io::Result<Vec<(usize, Range<u64>)>> {
        if range.start < self.window.start || range.end > self.window.end || range.start >= range.end {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "memory outside of the window"));
        }
        let block = |at: u64| ((at - self.window.start) / layout::GROWTH_ALIGN) as usize;
        Ok((block(range.start)..=block(range.end - 1))
            .map(|n| {
                let start = self.window.start + n as u64 * layout::GROWTH_ALIGN;
                (n, range.start.max(start)..range.end.min(start + layout::GROWTH_ALIGN))
            })
            .collect())
    }
}
