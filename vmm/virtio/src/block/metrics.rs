//! What a block device counts.

use crate::counters;

counters! {
    /// Counters of a block device.
    pub struct Metrics {
        /// Requests answered, well or not.
        requests,
        /// Bytes read from the disk.
        read_bytes,
        /// Bytes written to the disk.
        written_bytes,
        /// Times that what was written was made durable: on request, or after each write where the driver
        /// cannot request it.
        flushes,
        /// Ranges discarded.
        discards,
        /// Ranges overwritten with zeros.
        zeroed,
        /// Requests without a byte for their status: nobody can be told.
        no_status,
        /// Requests without a whole header, or with buffers of the wrong length or direction.
        malformed,
        /// Requests past the end of the disk.
        out_of_range,
        /// Requests larger than the configuration space allows.
        oversized,
        /// Writes to a read-only disk.
        read_only,
        /// Requests of a kind, or with a flag, that is not offered.
        unsupported,
        /// Requests that the host's file refused.
        io_errors,
        /// Times that as many requests were in flight as can be, and the driver's next ones had to wait.
        full,
        /// Times that io_uring did not take what was submitted and was asked again.
        retries,
        /// Faults of the driver after which the device asked for its reset.
        faults,
    }
}
