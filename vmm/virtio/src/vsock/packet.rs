//! The header of a packet (virtio 1.2, 5.10.6).

/// Bytes of a header.
pub(super) const HEADER: usize = 44;
/// VIRTIO_VSOCK_TYPE_STREAM
pub(super) const STREAM: u16 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_RCV: the sender of the packet receives no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_SEND: the sender of the packet sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// VIRTIO_VSOCK_OP_REQUEST
pub(super) const REQUEST: u16 = 1;
/// VIRTIO_VSOCK_OP_RESPONSE
pub(super) const RESPONSE: u16 = 2;
/// VIRTIO_VSOCK_OP_RST
pub(super) const RST: u16 = 3;
/// VIRTIO_VSOCK_OP_SHUTDOWN
pub(super) const SHUTDOWN: u16 = 4;
/// VIRTIO_VSOCK_OP_RW
pub(super) const RW: u16 = 5;
/// VIRTIO_VSOCK_OP_CREDIT_UPDATE
pub(super) const CREDIT_UPDATE: u16 = 6;
/// VIRTIO_VSOCK_OP_CREDIT_REQUEST
pub(super) const CREDIT_REQUEST: u16 = 7;

/// `struct virtio_vsock_hdr`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // Named as in the specification.
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// The header in these bytes; any bytes are one.
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Self {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    /// The bytes of this header.
    pub(super) fn bytes(&self) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        out[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        out[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        out[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        out[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        out[24..28].copy_from_slice(&self.len.to_le_bytes());
        out[28..30].copy_from_slice(&self.kind.to_le_bytes());
        out[30..32].copy_from_slice(&self.op.to_le_bytes());
        out[32..36].copy_from_slice(&self.flags.to_le_bytes());
        out[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        out[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        out
    }

    /// The refusal of this packet: the same two ends the other way round.
    pub(super) fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: RST,
            ..Self::default()
        }
    }
}
