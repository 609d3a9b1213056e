//! A block device as plain data: what its driver was told, and where its ring stands. The file's bytes are
//! not part of it.

use serde::{Deserialize, Serialize};

use crate::ring::RingState;

/// A saved block device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Its ring, where it is active.
    pub rings: Vec<RingState>,
    /// Its size in sectors of 512 bytes. The file it is restored on may be larger, not smaller.
    pub sectors: u64,
    /// Whether the driver was told that it cannot be written. The restored one must be the same.
    pub read_only: bool,
    /// What GET_ID answers.
    pub serial: String,
}
