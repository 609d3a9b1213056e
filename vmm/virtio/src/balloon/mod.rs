//! Memory balloon (virtio 1.2, 5.5): takes pages back from a guest that can spare them.
//! Knows nothing of how a host gives pages back; it asks a [`Discard`] for that.
//!
//! | ring | what the driver puts there | what is done |
//! |---|---|---|
//! | inflate | numbers of pages that it gives up | they are discarded |
//! | deflate | numbers of pages that it takes again | nothing: a page comes back when it is touched |
//! | statistics | a list of numbers, kept until newer ones are asked for | it is read |
//! | reporting | buffers that are free at this moment | they are discarded |
//!
//! Discarding is an offer and may be left out; so a driver's list is followed only so far in one request
//! (see the constants), and what lies outside of memory or is less than a page is skipped and counted.

mod device;
mod metrics;
mod persist;
mod stats;
#[cfg(test)]
mod tests;
mod worker;

use std::io;

pub use device::Balloon;
pub use metrics::Metrics;
pub use persist::State;
pub use stats::Stats;
use vm_memory::GuestAddress;

/// Gives the host's memory behind the guest's pages back.
pub trait Discard: Send {
    /// Gives the host's pages behind this stretch of guest memory back; it reads as zeros, or as it did,
    /// when it is touched again. The stretch is whole pages (4096 bytes), and whole in one region.
    ///
    /// # Errors
    /// The host keeps them, which is counted and otherwise of no consequence.
    fn discard(&mut self, address: GuestAddress, len: u64) -> io::Result<()>;
}

/// Descriptors of each ring. Linux has one request in flight, and reports at most 32 buffers with it.
const QUEUE_SIZE: u16 = 128;
/// Bytes of a page in the balloon's numbers (5.5.6), whatever the guest's pages are.
const PAGE: u64 = 4096;
/// Pages of one request that are looked at; Linux sends at most 256.
const PAGES: usize = 1024;
/// Reported buffers of one request that are looked at.
const BUFFERS: usize = 256;
/// Requests that one ring is served in a turn of the event loop. With [`PAGES`] it bounds the calls of
/// [`Discard`] in a turn to 4096 for each ring, some milliseconds.
const TURN: u16 = 4;
