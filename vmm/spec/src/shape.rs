//! What the guest can see of its machine: two machines of one shape are interchangeable to a guest.
//! Knows nothing of the host's paths and descriptors; those are [`crate::Bindings`].

use serde::{Deserialize, Serialize};

/// An amount of memory in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SizeMib(pub u64);

impl SizeMib {
    /// The same amount in bytes.
    pub fn bytes(self) -> u64 {
        self.0 << 20
    }

    /// The smallest whole number of MiB that holds `bytes`.
    pub fn holding(bytes: u64) -> Self {
        Self(bytes.div_ceil(1 << 20))
    }
}

/// A block device as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockShape {
    /// Serial number, at most 20 bytes (virtio 1.2, 5.2.6.1): how the guest finds the device again.
    pub serial: String,
    /// Refuses writes.
    pub read_only: bool,
}

/// A network card as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NetShape {
    /// Hardware address.
    pub mac: [u8; 6],
    /// Largest packet in bytes, if it is not 1500.
    pub mtu: Option<u16>,
}

/// The machine as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Processors present at boot, at least 1.
    pub vcpus: u32,
    /// Processors that can be brought online later, those at boot among them. A backend that cannot do so
    /// has those at boot.
    pub max_vcpus: u32,
    /// Memory present at boot.
    pub memory: SizeMib,
    /// Memory that can be added later. A backend that cannot do so adds none.
    pub growth: SizeMib,
    /// The kernel's command line, without what a backend must add for its own devices.
    pub cmdline: String,
    /// Tag of the virtio-fs device, if there is one.
    pub share_tag: Option<String>,
    /// Block devices in the order of their slots.
    pub blocks: Vec<BlockShape>,
    /// Network cards in the order of their slots.
    pub nets: Vec<NetShape>,
    /// Slots for devices that are attached later. A backend that cannot do so has none.
    pub spare_slots: u32,
}
