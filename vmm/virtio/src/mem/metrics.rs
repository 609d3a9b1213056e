//! What the memory device counts.

use crate::counters;

counters! {
    /// Counters of the memory device.
    pub struct Metrics {
        /// Requests that plugged blocks.
        plugs,
        /// Requests that unplugged blocks, some or all.
        unplugs,
        /// Requests for the state of blocks.
        queries,
        /// Requests for more than the host wants the guest to have.
        refused,
        /// Requests that the host had no memory for, or could not take memory back for.
        busy,
        /// Requests that name what is not in the window, or is in the wrong state, or that cannot be read.
        errors,
        /// Faults of the driver after which the device asked for its reset.
        faults,
    }
}
