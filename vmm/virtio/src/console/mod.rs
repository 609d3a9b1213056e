//! Console (virtio 1.2, 5.3): one port, of which Linux makes /dev/hvc0.
//! Knows nothing of terminals or files: bytes go to an output, and come from an input.
//!
//! Linux spins until what it wrote is taken. So output is taken at once and never kept: what the sink has
//! no room for is dropped and counted. Input is read only when the guest has room for it, and waits in the
//! host's pipe or terminal until then.

mod device;
mod metrics;
mod persist;
#[cfg(test)]
mod tests;
mod worker;

pub use device::Console;
pub use metrics::Metrics;
pub use persist::State;

/// Descriptors of each ring.
const QUEUE_SIZE: u16 = 64;
/// Bytes that are moved at once.
const PIECE: usize = 4096;
/// The most bytes of one request that are written; Linux sends at most a page.
const REQUEST_LIMIT: u64 = 16 << 10;
/// Bytes that one ring may move in a turn of the event loop, give or take one request.
const TURN: u64 = 64 << 10;
