//! What every device is to the transport and to the machine.
//! Knows no particular device but for the list of their states.

use std::sync::Arc;

use event_manager::MutEventSubscriber;
use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::{Interrupt, Memory, balloon, block, console, fs, mem, net, rng, vsock};

/// The kinds of devices (virtio 1.2, 5): the number is what the guest reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u32)]
pub enum Kind {
    /// A slot without a device: a driver leaves it alone.
    None = 0,
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
    /// Traditional memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// Memory device.
    Mem = 24,
    /// File system.
    Fs = 26,
}

/// What a device is handed when its driver is ready: from here on the rings are the device's.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory.
    pub memory: Memory,
    /// The features that both sides agreed on.
    pub features: u64,
    /// The rings, in the order of [`Device::queue_sizes`]. One that the driver left unused is not ready.
    pub queues: Vec<Queue>,
    /// How the guest is told of what was done.
    pub interrupt: Arc<Interrupt>,
}

/// Why a device did not accept its driver's set-up. The guest sees DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// A ring that the device cannot do without is not set up, or lies outside the guest's memory.
    #[error("queue {0} is not usable")]
    Queue(usize),
    /// What stands behind the device refused.
    #[error("cannot {what}: {source}")]
    Backend {
        /// What was tried.
        what: &'static str,
        /// What came of it.
        source: std::io::Error,
    },
}

/// A device behind the transport. It lives in a mutex that the transport (on a vCPU thread) and one
/// event loop share; events reach it through [`MutEventSubscriber`].
///
/// The kicks and every other descriptor are watched from [`MutEventSubscriber::init`] on, for the whole
/// life of the device: an event that comes while the device is not active is drained and forgotten. What
/// may be readable while nobody reads it is watched edge-triggered, and looked at on activation and resume.
pub trait Device: MutEventSubscriber + Send {
    /// What the guest is told it is.
    fn kind(&self) -> Kind;

    /// The features that it offers besides VIRTIO_F_VERSION_1, which the transport adds.
    fn features(&self) -> u64;

    /// The largest size of each of its rings, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// One eventfd for each ring, written at the guest's notifications; the same ones for ever.
    fn kicks(&self) -> &[EventFd];

    /// Reads its configuration space; what lies outside of it reads as zeros (`data` comes zeroed).
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes its configuration space; what cannot be written is ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Takes the rings and begins to work. An error leaves it inactive.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Drops the rings: when this returns, nothing touches the guest's memory for this device any more.
    fn reset(&mut self);

    /// Stops work at a point from which it can be resumed or saved: nothing is in flight afterwards.
    fn pause(&mut self);

    /// Goes on after [`Device::pause`], and looks at everything that may have happened meanwhile.
    fn resume(&mut self);

    /// Its own state, with its rings' positions. Called while it is paused.
    fn save(&self) -> DeviceState;

    /// Takes over a saved state; called before [`Device::activate`] with the rings of that state.
    /// Refuses (`false`) the state of another kind of device, or one that cannot be.
    fn restore(&mut self, state: &DeviceState) -> bool;

    /// What it counted so far.
    fn metrics(&self) -> Vec<(&'static str, u64)>;
}

/// The state of a device as plain data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Of [`crate::balloon`].
    Balloon(balloon::State),
    /// Of [`crate::block`].
    Block(block::State),
    /// Of [`crate::console`].
    Console(console::State),
    /// Of [`crate::fs`].
    Fs(fs::State),
    /// Of [`crate::mem`].
    Mem(mem::State),
    /// Of [`crate::net`].
    Net(net::State),
    /// Of [`crate::rng`].
    Rng(rng::State),
    /// Of [`crate::vsock`].
    Vsock(vsock::State),
}

impl DeviceState {
    /// Where its rings stand, if it was active.
    pub fn rings(&self) -> &[crate::ring::RingState] {
        match self {
            Self::Balloon(state) => &state.rings,
            Self::Block(state) => &state.rings,
            Self::Console(state) => &state.rings,
            Self::Fs(state) => &state.rings,
            Self::Mem(state) => &state.rings,
            Self::Net(state) => &state.rings,
            Self::Rng(state) => &state.rings,
            Self::Vsock(state) => &state.rings,
        }
    }
}
