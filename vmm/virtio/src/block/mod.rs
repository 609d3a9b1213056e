//! Block device (virtio 1.2, 5.2): a raw image or a block device of the host as the guest's disk.
//! Knows nothing of where the file came from: it is handed over open, and nothing is opened here.
//!
//! ```text
//!  chain ──request::parse──▶ Job ──▶ Engine ──(io_uring, or preadv and its kin)──▶ file
//!    ▲                         │ refused: status at once                             │
//!    └── status byte, used ring ◀──────────── Worker::finish ◀── eventfd ◀───────────┘
//! ```
//!
//! * The guest's buffers are handed to the kernel as they are: no byte is copied here.
//! * As many requests as the ring has entries are in flight, never more, whatever the guest offers.
//! * Without io_uring (refused by a sysctl, a seccomp filter or an old kernel, which is found out in
//!   [`Block::new`]) each request is done when it is taken, so one turn of the loop takes few bytes.
//! * FLUSH is fdatasync(2). A driver that did not negotiate it gets a disk that writes through.
//!
//! # System calls after construction
//! | where | calls |
//! |---|---|
//! | event loop | read, write (eventfds); io_uring_enter, or preadv, pwritev, fdatasync, fallocate |
//! | [`Device::reset`](crate::Device::reset), [`Device::pause`](crate::Device::pause), drop (any thread) | io_uring_enter |
//! | [`Block::resize_to_file`] | statx; for a block device ioctl(BLKGETSIZE64) |
//!
//! The ring is restricted at its creation to reads, writes, fdatasync and fallocate on this one file
//! (IORING_REGISTER_RESTRICTIONS), because a seccomp filter does not see what is submitted to it.

mod device;
mod io;
mod metrics;
mod persist;
mod request;
mod sys;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{Block, BlockConfig};
pub use io::EngineChoice;
pub use metrics::Metrics;
pub use persist::State;

/// Descriptors of its one ring, and the most requests in flight.
const QUEUE_SIZE: u16 = 128;
/// Bytes of a sector, the unit of the protocol whatever the disk's own block (virtio 1.2, 5.2.6).
const SECTOR: u64 = 512;
/// The most data buffers of a request: what a chain as long as the ring has besides header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// The most bytes of a buffer. Together they bound what one request can be, and how long a reset waits.
const SEGMENT_BYTES: u32 = 1 << 20;
/// The most pieces of a request in memory; a buffer across two regions is two.
const PIECES: usize = 2 * SEGMENTS as usize;
/// Bytes of a serial number (5.2.6).
const SERIAL_BYTES: usize = virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES as usize;
/// The most sectors of one DISCARD or WRITE_ZEROES: 2 GiB.
const RANGE_SECTORS: u32 = 1 << 22;
