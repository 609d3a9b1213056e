//! Network card (virtio 1.2, 5.1): Ethernet frames between the guest and a tap of the host.
//! Knows nothing of addresses, routes or who made the tap: it is handed over open and configured.
//!
//! ```text
//!              ┌─ worker: readv/writev on the event loop's thread ─┐
//!  guest rings ┤                                                   ├ tap
//!              └─ vhost-net: a thread of the kernel, irqfd direct ─┘   (which: NetConfig::vhost)
//! ```
//!
//! * One pair of rings, and no control ring: nothing in a pod's network asks for more.
//! * Frames go between the tap and the guest's buffers without a copy here. A frame larger than the buffers
//!   at hand waits in a scratch buffer for more of them, one frame at most.
//! * Checksums and segmentation are left to whoever needs them: both sides of a tap are in one kernel. The
//!   header with a frame is the guest's word, and the kernel's to check (tun_get_user): what it refuses is
//!   counted and dropped.
//! * Every turn of the loop takes a bounded number of frames. Without buffers of the guest nothing is read
//!   from the tap, whose queue then drops; without room in the tap nothing is taken from the guest.
//!
//! # System calls after construction
//! | where | calls |
//! |---|---|
//! | event loop | read, write (eventfds); readv, writev, read (tap); ioctl(TUNSETOFFLOAD) once an activation |
//! | event loop with vhost | also ioctl(VHOST_SET_FEATURES, VHOST_SET_MEM_TABLE, VHOST_SET_VRING_NUM, VHOST_SET_VRING_BASE, VHOST_SET_VRING_ADDR, VHOST_SET_VRING_CALL, VHOST_SET_VRING_ERR, VHOST_SET_VRING_KICK, VHOST_NET_SET_BACKEND), and no readv, writev |
//! | [`Device::activate`](crate::Device::activate), [`Device::resume`](crate::Device::resume) (any thread) | write (eventfd) |
//! | [`Device::reset`](crate::Device::reset), [`Device::pause`](crate::Device::pause) with vhost (any thread) | ioctl(VHOST_NET_SET_BACKEND, VHOST_GET_VRING_BASE) |
//!
//! At construction, before a filter: TUNGETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ, fcntl(F_GETFL),
//! VHOST_SET_OWNER, VHOST_GET_FEATURES.

mod device;
mod metrics;
mod offload;
mod persist;
mod rx;
mod sys;
mod tap;
#[cfg(test)]
mod tests;
mod tx;
mod vhost;
mod worker;

pub use device::{Net, NetConfig};
pub use metrics::Metrics;
pub use persist::State;

/// Descriptors of each ring.
const QUEUE_SIZE: u16 = 256;
/// The ring for what the guest gets (5.1.2).
const RX: usize = 0;
/// The ring for what the guest sends.
const TX: usize = 1;
/// Bytes of the header before each frame (5.1.6): with VERSION_1 it always counts its buffers.
const HEADER: usize = 12;
/// Where in the header the number of buffers is.
const NUM_BUFFERS: u64 = 10;
/// Bytes of an Ethernet header, the shortest frame that a tap takes.
const ETHERNET: usize = 14;
/// The largest frame with its header (5.1.6.3.1): 64 KiB of IP, as segmentation offload allows.
const FRAME_LIMIT: usize = 65562;
/// The least MTU that can be told (5.1.4.1).
const LEAST_MTU: u16 = 68;
