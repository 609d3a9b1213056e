//! Memory device (virtio 1.2, 5.15): a window of the guest's address space in which it plugs and unplugs
//! blocks of memory as the host wants it to have more or less.
//! Knows nothing of what memory is made of; it asks a [`Backing`] for that.
//!
//! ```text
//!  start                  start + usable          start + size
//!    ├──────────┬───────────────┼─────────────────────┤
//!    │ blocks, each plugged or  │ refused until more  │
//!    │ not, as the driver chose │ is requested        │
//!    └──────────┴───────────────┴─────────────────────┘
//!  plugged ≤ requested is what a request may lead to; after less was requested it holds again when the
//!  driver has unplugged enough, which it may be unable to.
//! ```
//!
//! A guest can touch blocks that are not plugged, although it promises not to. What that costs the host
//! is the [`Backing`]'s to prevent or the machine's limit to catch; the device counts plugged blocks.

mod device;
mod metrics;
mod persist;
#[cfg(test)]
mod tests;
mod window;
mod worker;

use std::{io, ops::Range};

pub use device::Mem;
pub use metrics::Metrics;
pub use persist::State;

/// Makes and ends memory behind the window.
pub trait Backing: Send {
    /// Makes memory of these guest addresses, whole blocks that were not plugged. It reads as zeros.
    ///
    /// # Errors
    /// There is no memory; the driver is told to try again later.
    fn plug(&mut self, range: Range<u64>) -> io::Result<()>;

    /// Gives the memory of these guest addresses back, whole blocks. Some of them may not be plugged.
    ///
    /// # Errors
    /// The memory stays as it is; the driver is told to try again later.
    fn unplug(&mut self, range: Range<u64>) -> io::Result<()>;
}

/// What the window is. It cannot change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MemConfig {
    /// Its first guest address, a multiple of [`ALIGNMENT`].
    pub start: u64,
    /// Its bytes, a multiple of [`ALIGNMENT`].
    pub size: u64,
    /// Bytes of a block: a power of two from [`BLOCK_SIZE`] to [`ALIGNMENT`].
    pub block_size: u64,
}

/// The smallest block: a huge page of x86-64 and of Linux's allocator (a page block), so that no huge page
/// of the host is in two of them. Linux deals with parts of its own memory blocks from this size on.
pub const BLOCK_SIZE: u64 = 2 << 20;
/// Linux's memory block on x86-64 below 64 GiB: it uses only whole ones of the window.
pub const ALIGNMENT: u64 = 128 << 20;
/// The largest window, 64 TiB: half the address space that Linux has for memory with 4 levels of tables.
pub const SIZE_LIMIT: u64 = 1 << 46;
/// What a driver may use beyond what is requested of it: room to choose other blocks where it cannot move
/// what is in the way.
const SLACK: u64 = 2 * ALIGNMENT;
/// Descriptors of the one ring. Linux has one request in flight.
const QUEUE_SIZE: u16 = 16;
/// Requests that are served in a turn of the event loop; each asks the [`Backing`] at most once.
const TURN: u16 = 16;
