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
/// How long the backend may take for the messages of one step (agreeing on features, taking over the
/// rings). A vCPU waits with us.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to stop the rings. It ends the request that it is serving first, and that can be a
/// guest's fsync on a slow disk, which is no reason to give the file system up.
const DRAIN: Duration = Duration::from_secs(30);
