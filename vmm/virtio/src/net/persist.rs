//! A network card as plain data: what its driver was told and agreed on, and where its rings stand.
//! Frames on their way are not part of it: networks lose frames.

use serde::{Deserialize, Serialize};

use crate::ring::RingState;

/// A saved network card.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Its rings, where it is active: what it gets, what it sends.
    pub rings: Vec<RingState>,
    /// Its address.
    pub mac: [u8; 6],
    /// The largest packet, if the driver was told, in bytes.
    pub mtu: Option<u16>,
    /// What the driver lets the tap leave undone (TUN_F_* of Linux): another tap must be able to.
    pub offload: u32,
}
