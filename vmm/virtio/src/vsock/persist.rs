//! The socket device as plain data. Connections are not part of it: their host's ends cannot be written
//! down, so a restored guest is told that they are gone (virtio 1.2, 5.10.6.7).

use serde::{Deserialize, Serialize};

use crate::ring::RingState;

/// A saved socket device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The guest's address.
    pub cid: u64,
    /// Its rings, where it is active.
    pub rings: Vec<RingState>,
}
