//! virtio devices and the MMIO transport (virtio 1.2): what a guest's drivers speak with.
//! Knows guest memory, rings and eventfds; knows nothing of KVM, processes or containers.
//!
//! # How a device is built
//! A device is a drawer with the same files in each:
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | what the device is, its constants, its public names |
//! | `device.rs` | the [`Device`]: features, configuration space, activation, the events it watches |
//! | `worker.rs` | what happens to the rings once they are handed over |
//! | `persist.rs` | its state as plain data, and back |
//! | `metrics.rs` | what it counts |
//! | `tests.rs` | a driver's side of it, honest and hostile |
//!
//! ```text
//!  vCPU thread: register access ──▶ mmio::Transport ──lock──▶ Device ──activate(rings)──▶ Worker
//!  guest's notification ──ioeventfd──▶ kick eventfd ──▶ event loop ──lock──▶ Device::process ─▶ Worker
//!  Worker ──▶ Interrupt (status bits, irqfd) ──▶ guest
//! ```
//!
//! * **Activation is a transfer of ownership**: the rings belong to the transport while the driver sets
//!   them up, and to the device's worker from DRIVER_OK until the reset.
//! * **The guest is the attacker.** Every address and length is checked by [`ring::Ring`], which answers a
//!   [`ring::RingError`] for what no honest driver does; a device then stops looking at its rings, counts
//!   the fault and sets DEVICE_NEEDS_RESET. Nothing here panics, and nothing grows with what a guest asks.
//! * **State is plain data**: [`Device::save`] and [`mmio::Transport::save`] answer values that can be
//!   written down and turned into the same device elsewhere.

pub mod balloon;
pub mod block;
mod buffers;
pub mod console;
pub mod device;
pub mod fs;
pub mod interrupt;
pub mod mem;
pub mod metrics;
pub mod mmio;
pub mod net;
pub mod ring;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vsock;

use std::sync::Arc;

pub use device::{ActivateError, Activation, Device, DeviceState, Kind};
pub use interrupt::Interrupt;
use vm_memory::GuestMemoryMmap;

/// The guest's memory, as every device of a machine sees it: fixed for the life of the machine.
///
/// The window of the memory device is part of it from the start, backed only where blocks are plugged.
pub type Memory = Arc<GuestMemoryMmap<()>>;
