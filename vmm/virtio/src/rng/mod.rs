//! Entropy source (virtio 1.2, 5.4): fills the guest's buffers with the host kernel's random bytes.
//! Knows nothing of who asks; a bucket bounds how much a guest gets in a second.

mod device;
mod metrics;
mod persist;
#[cfg(test)]
mod tests;
mod worker;

pub use device::Rng;
pub use metrics::Metrics;
pub use persist::State;

/// Descriptors of its one ring.
const QUEUE_SIZE: u16 = 64;
/// The most bytes that one request gets. A driver asks again for more; Linux asks for 64.
const REQUEST_LIMIT: usize = 4096;
