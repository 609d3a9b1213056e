//! What the console counts.

use crate::counters;

counters! {
    /// Counters of the console.
    pub struct Metrics {
        /// Bytes of the guest's that went to the output.
        written_bytes,
        /// Bytes of the guest's that the output had no room for, or that were too many in one request.
        dropped_bytes,
        /// Bytes of the input that went to the guest.
        read_bytes,
        /// Errors of the output or the input, besides that they were not ready.
        failures,
        /// Faults of the driver after which the device asked for its reset.
        faults,
    }
}
