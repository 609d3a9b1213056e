//! What the socket device counts.

use crate::counters;

counters! {
    /// Counters of the socket device.
    pub struct Metrics {
        /// Connections that the guest opened and the host accepted.
        guest_connections,
        /// Connections that the host opened and the guest accepted.
        host_connections,
        /// Dials that were answered with a refusal.
        dials_refused,
        /// Connections of the guest's refused because there were too many, or too many dials.
        crowded,
        /// Connections of the host's closed because they did not begin with a good `CONNECT` line.
        bad_greetings,
        /// Bytes that the guest's packets carried.
        bytes_from_guest,
        /// Bytes written to the guest.
        bytes_to_guest,
        /// Packets of the guest's.
        packets_from_guest,
        /// Packets written to the guest.
        packets_to_guest,
        /// Resets written to the guest.
        resets_sent,
        /// Resets of the guest's.
        resets_received,
        /// Packets shorter than a header, or than their header says; dropped.
        malformed,
        /// Packets with a source other than the guest; dropped.
        wrong_source,
        /// Packets to somebody other than the host; reset.
        wrong_destination,
        /// Packets that belong to no stream socket; reset.
        wrong_type,
        /// Packets with an operation that there is not; reset.
        unknown_operation,
        /// Packets of connections that there are not; reset.
        unknown_connection,
        /// Packets that make no sense in their connection's phase; reset.
        unexpected,
        /// Packets with more bytes than the guest had credit for; reset.
        credit_violations,
        /// Buffers for the guest's packets without room for a byte of data; given back empty.
        small_buffers,
        /// Faults of the driver after which the device asked for its reset.
        faults,
    }
}
