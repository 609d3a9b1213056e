//! The console as plain data: nothing but where its rings stand.

use serde::{Deserialize, Serialize};

use crate::ring::RingState;

/// A saved console.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Its rings, where it is active.
    pub rings: Vec<RingState>,
}
