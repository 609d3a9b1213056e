//! What the file system device counts. The requests are counted by nobody: they pass this process by.

use crate::counters;

counters! {
    /// Counters of the file system device.
    pub struct Metrics {
        /// Messages that the backend was sent.
        messages,
        /// Messages that the backend refused, answered wrongly or not in time.
        failures,
        /// Times the backend ended the connection; there is no second one.
        hang_ups,
    }
}
