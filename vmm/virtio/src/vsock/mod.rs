//! Socket device (virtio 1.2, 5.10): streams between the guest's AF_VSOCK and unix sockets of the host.
//! Knows nothing of paths: what is needed from outside comes in as open sockets.
//!
//! ```text
//!  guest connects to CID 2, port N ──REQUEST──▶ Dialer::dial(id, N) ┄ broker connects to <path>_N ┄▶
//!                                  ◀─RESPONSE── Vsock::dialed(id, Some(stream))        (None: RST)
//!  host connects, "CONNECT N\n" ──REQUEST──▶ guest listening at N ──RESPONSE──▶ "OK <host port>\n"
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `packet.rs` | the header of a packet |
//! | `socket.rs` | the host's end of a connection, and its first line |
//! | `stream.rs` | one connection: its phase, both credits, both half-closes; its packets for the guest |
//! | `hub.rs` | all connections: who is next, how many there may be; whose the guest's packets are |
//! | `worker.rs` | the three rings |
//! | `transfer.rs` | bytes between guest memory and a socket, without a copy of ours |
//!
//! * **Credit** (5.10.6.3): the guest may have 256 KiB under way that the host has not read, on a crowded
//!   device 64 KiB. They wait here, so this bounds the memory of a connection. The other way nothing waits:
//!   bytes are read from the host's socket right into the guest's buffer.
//! * **Order**: what the guest wrote before its SHUTDOWN or RST reaches the host before the end of file;
//!   what the host wrote before it closed reaches the guest before the SHUTDOWN.
//! * **Fairness**: connections with something for the guest take turns, packet by packet.
//! * **The descriptors** of connections are in an epoll set of the device's own, which is all that the event
//!   loop watches: so connections can be added and dropped by any thread that holds the device's lock.

mod device;
mod hub;
mod metrics;
mod packet;
mod persist;
mod socket;
mod stream;
#[cfg(test)]
mod tests;
mod transfer;
mod worker;

pub use device::Vsock;
pub use metrics::Metrics;
pub use persist::State;

/// Finds the host's end for connections that the guest opens.
///
/// The device is jailed and opens nothing; whoever stands behind this connects in its place.
pub trait Dialer: Send {
    /// Asks for a stream to the host's `port`. The answer comes by [`Vsock::dialed`] with the same `id`,
    /// at any later time. Each is answered in the end: there are only so many without an answer.
    /// Called with the device's lock held: it must not block, nor answer from within.
    fn dial(&mut self, id: u64, port: u32);
}

/// The host's address (5.10.4).
const HOST_CID: u64 = 2;
/// Descriptors of the receiving and of the sending ring.
const QUEUE_SIZE: u16 = 128;
/// Descriptors of the event ring; Linux offers 8 buffers.
const EVENT_QUEUE_SIZE: u16 = 16;
/// Connections at once, in all phases; beyond it the guest is refused, and the host waits in its backlog.
const STREAM_LIMIT: usize = 1024;
/// Dials without an answer; beyond it the guest is refused.
const DIAL_LIMIT: usize = 128;
/// Refusals that wait for a buffer of the guest's; beyond it its packets are left in the ring.
const RESET_LIMIT: usize = 256;
/// Bytes that the guest may have under way on each of the first [`WIDE_STREAMS`] connections.
const WIDE_WINDOW: u32 = 256 << 10;
/// Bytes that the guest may have under way on each further connection.
const NARROW_WINDOW: u32 = 64 << 10;
/// Connections with a wide window.
const WIDE_STREAMS: usize = 64;
/// The most bytes of one packet to the guest.
const PACKET_LIMIT: u64 = 64 << 10;
