//! The entropy source as plain data: nothing but where its ring stands.

use serde::{Deserialize, Serialize};

use crate::ring::RingState;

/// A saved entropy source.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Its ring, where it is active.
    pub rings: Vec<RingState>,
}
