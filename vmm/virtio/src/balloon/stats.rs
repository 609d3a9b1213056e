//! What a driver tells of its guest's memory (virtio 1.2, 5.5.6.4).

use serde::{Deserialize, Serialize};

/// Bytes of one entry: a tag of 16 bits, a value of 64, without padding.
const ENTRY: usize = 10;
/// Entries of a list that are looked at.
const ENTRIES: usize = 64;
/// Bytes of a list that are looked at.
pub(super) const BYTES: usize = ENTRY * ENTRIES;

/// The names of the values by their tags (VIRTIO_BALLOON_S_*).
const NAMES: [&str; 16] = [
    "swap_in_bytes",
    "swap_out_bytes",
    "major_faults",
    "minor_faults",
    "free_bytes",
    "total_bytes",
    "available_bytes",
    "cache_bytes",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kills",
    "allocation_stalls",
    "async_scanned_bytes",
    "direct_scanned_bytes",
    "async_reclaimed_bytes",
    "direct_reclaimed_bytes",
];

/// What the driver told last. It is the guest's word and no more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats([Option<u64>; NAMES.len()]);

impl Stats {
    /// Reads a list; unknown tags are skipped, and of two values for one tag the last holds.
    pub(super) fn parse(list: &[u8]) -> Self {
        let mut stats = Self::default();
        for entry in list.chunks_exact(ENTRY).take(ENTRIES) {
            let (tag, value) = entry.split_at(2);
            let tag = usize::from(u16::from_le_bytes([tag[0], tag[1]]));
            if let (Some(slot), Ok(value)) = (stats.0.get_mut(tag), value.try_into()) {
                *slot = Some(u64::from_le_bytes(value));
            }
        }
        stats
    }

    /// Bytes of memory that are not used for anything.
    pub fn free(&self) -> Option<u64> {
        self.0[4]
    }

    /// Bytes of memory that the guest's kernel manages.
    pub fn total(&self) -> Option<u64> {
        self.0[5]
    }

    /// Bytes of memory that programs could get without swapping, as in /proc/meminfo.
    pub fn available(&self) -> Option<u64> {
        self.0[6]
    }

    /// Everything that was told, by name.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        NAMES.iter().zip(&self.0).filter_map(|(name, value)| Some((*name, (*value)?))).collect()
    }
}
