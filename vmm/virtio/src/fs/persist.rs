//! The file system device as plain data: where its rings stand.
//!
//! What the guest has open is virtiofsd's to know and is not part of it. So an active device cannot be
//! restored in front of another virtiofsd, and [`Device::restore`](crate::Device::restore) says so.

use serde::{Deserialize, Serialize};

use crate::ring::RingState;

/// A saved file system device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Its rings, where it is active.
    pub rings: Vec<RingState>,
}
