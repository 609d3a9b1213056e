//! File system device (virtio 1.2, 5.11): the rings are served by virtiofsd, a process of its own, which
//! is told of them by the vhost-user protocol.
//! Knows nothing of files or FUSE: between `start` and `stop` this process does not touch the rings.
//!
//! ```text
//!  driver ──kick eventfd──▶ virtiofsd ──irqfd──▶ driver          (no part of this process in between)
//!     │                        ▲
//!     └─registers─▶ Fs ─socket─┘   features, memory, rings: at construction, activation, pause, reset
//! ```
//!
//! A guest can make virtiofsd end itself (it exits on a chain that it cannot read). The device then asks
//! for its reset and never works again: what the guest had open is known to nobody any more.

mod connection;
mod device;
mod metrics;
mod persist;
#[cfg(test)]
mod tests;
mod worker;

use std::time::Duration;

pub use device::Fs;
pub use metrics::Metrics;
pub use persist::State;

/// Descriptors of the ring for what must not wait behind requests (FUSE_INTERRUPT, FUSE_FORGET).
const PRIORITY_QUEUE_SIZE: u16 = 128;
/// Descriptors of a ring for requests. Linux asks for at most as many pages in one request.
const REQUEST_QUEUE_SIZE: u16 = 1024;
/// Bytes of a tag (5.11.4).
const TAG: usize = 36;
/// How long the backend may take to answer one message. The slowest answers are those to the first message
/// about memory and to the end of a ring, which waits for the request being served. A vCPU waits with us.
const PATIENCE: Duration = Duration::from_secs(5);
