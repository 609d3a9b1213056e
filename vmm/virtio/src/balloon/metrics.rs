//! What the balloon counts.

use crate::counters;

counters! {
    /// Counters of the balloon.
    pub struct Metrics {
        /// Pages (4096 bytes) that the driver gave up.
        inflated,
        /// Pages that the driver took again.
        deflated,
        /// Bytes that the driver reported as free and that were discarded.
        reported_bytes,
        /// Pages or reported buffers that were left alone: outside of memory, less than a page, or too
        /// many in one request.
        skipped,
        /// Stretches that the host did not take back.
        failures,
        /// Lists of statistics that were read.
        statistics,
        /// Faults of the driver after which the device asked for its reset.
        faults,
    }
}
