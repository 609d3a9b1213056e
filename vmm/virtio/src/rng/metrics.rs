//! What the entropy source counts.

use crate::counters;

counters! {
    /// Counters of the entropy source.
    pub struct Metrics {
        /// Requests served.
        requests,
        /// Bytes handed out.
        bytes,
        /// Requests with nothing to write to.
        empty,
        /// Faults of the driver after which the device asked for its reset.
        faults,
    }
}
