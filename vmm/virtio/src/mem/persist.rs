//! The memory device as plain data.

use serde::{Deserialize, Serialize};

use super::MemConfig;
use crate::ring::RingState;

/// A saved memory device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Its ring, where it is active.
    pub rings: Vec<RingState>,
    /// The window.
    pub config: MemConfig,
    /// Bytes that the host wants the guest to have.
    pub requested: u64,
    /// Bytes of the window that the driver may use.
    pub usable: u64,
    /// A bit for each block, the lowest block in the lowest bit of the first word: whether it is plugged.
    pub plugged: Vec<u64>,
}
