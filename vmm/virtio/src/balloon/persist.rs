//! The balloon as plain data.

use serde::{Deserialize, Serialize};

use super::Stats;
use crate::ring::RingState;

/// A saved balloon.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Its rings, where it is active.
    pub rings: Vec<RingState>,
    /// Pages that the guest is asked to give up.
    pub target: u32,
    /// Pages that the driver says it has given up.
    pub actual: u32,
    /// What the driver told last of its memory.
    pub stats: Box<Stats>,
    /// The request of the statistics ring that is kept until newer numbers are asked for.
    pub held: Option<u16>,
}
