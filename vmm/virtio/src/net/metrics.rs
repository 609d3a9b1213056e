//! What a network card counts. With vhost-net the frames go past it, and only faults are seen.

use crate::counters;

counters! {
    /// Counters of a network card.
    pub struct Metrics {
        /// Frames that the guest got.
        rx_frames,
        /// Their bytes, with headers.
        rx_bytes,
        /// Frames dropped because the guest's buffers are too small for them.
        rx_too_small,
        /// Buffers for frames that cannot hold even a header, or that the driver wrote to.
        rx_malformed,
        /// Frames dropped at a pause or at a driver's start: they were for nobody.
        rx_dropped,
        /// Times that the tap had an error instead of a frame.
        rx_errors,
        /// Frames that the guest sent.
        tx_frames,
        /// Their bytes, with headers.
        tx_bytes,
        /// Frames of the guest without a whole header, in too many pieces, or in buffers of the wrong
        /// direction.
        tx_malformed,
        /// Frames of the guest larger than a frame can be.
        tx_oversized,
        /// Frames of the guest that the host's kernel refused: a lying header, or a tap that is down.
        tx_refused,
        /// Times that the tap had no room.
        tx_blocked,
        /// Times that the tap or vhost-net refused what the driver agreed on, or that vhost-net reported a
        /// fault. The device then asked for its reset.
        backend_errors,
        /// Faults of the driver after which the device asked for its reset.
        faults,
    }
}
