//! The bytes of an input as what a script needs. An input that is used up reads as zeros.

/// Where honest buffers are: the guest's second region.
pub(super) const BUFFERS: u64 = 128 << 10;
/// The guest's memory: two regions that meet, and one beyond a hole.
pub(super) const REGIONS: [(u64, usize); 3] = [(0, 128 << 10), (BUFFERS, 128 << 10), (1 << 20, 64 << 10)];
/// Lengths at which something changes in one device or another.
const LENGTHS: [u32; 16] = [0, 1, 2, 11, 12, 14, 16, 44, 45, 60, 512, 4096, 4097, 65536, 1 << 20, u32::MAX];

pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl<'a> Input<'a> {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    pub(super) fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub(super) fn word(&mut self) -> u32 {
        u32::from(self.half()) | u32::from(self.half()) << 16
    }

    pub(super) fn long(&mut self) -> u64 {
        u64::from(self.word()) | u64::from(self.word()) << 32
    }

    /// The next bytes, at most so many.
    pub(super) fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    /// A guest address: most of the time one with memory, else where it is interesting. `rings` are the
    /// tables of the rings.
    pub(super) fn address(&mut self, rings: &[u64]) -> u64 {
        let kind = self.byte();
        let near = |edge: u64, by: u8| edge.wrapping_add(u64::from(by)).wrapping_sub(128);
        match kind {
            0..=127 => BUFFERS + u64::from(kind & 0x7f) * 1024 + u64::from(self.byte()),
            128..=159 => u64::from(self.half()) * 4,
            160..=183 => {
                rings.get(kind as usize % rings.len().max(1)).copied().unwrap_or(0) + u64::from(self.half())
            }
            184..=199 => near(BUFFERS, self.byte()),
            200..=207 => near(2 * BUFFERS, self.byte()),
            208..=223 => near(1 << 20, self.byte()) + u64::from(self.byte()) * 256,
            224..=231 => near((1 << 20) + (64 << 10), self.byte()),
            // The devices' own windows (bulkhead-vmm's layout).
            232..=239 => 0xd000_0000 + u64::from(self.half()),
            240..=247 => near(0, self.byte()),
            _ => self.long(),
        }
    }

    /// A length: small, or where it is interesting.
    pub(super) fn len(&mut self) -> u32 {
        let kind = self.byte();
        match kind {
            0..=95 => u32::from(kind),
            96..=191 => LENGTHS[usize::from(kind) % LENGTHS.len()],
            192..=239 => u32::from(self.half()),
            _ => self.word(),
        }
    }
}
