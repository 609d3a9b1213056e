//! What a chain asks for (virtio 1.2, 5.2.6). Decides only: reads the header, does nothing to the disk.
//! Knows nothing of how the jobs get done.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP as UNMAP,
};
use vm_memory::GuestAddress;

use super::{PIECES, RANGE_SECTORS, SECTOR, SEGMENT_BYTES, SEGMENTS, SERIAL_BYTES, io::Job};
use crate::{
    Memory,
    buffers::Buffers,
    ring::{Chain, total},
};

/// Bytes of a request's header: type, reserved, sector.
const HEADER: u64 = 16;
/// Bytes of one range of a DISCARD or WRITE_ZEROES: sector, number of sectors, flags.
const RANGE: u64 = 16;

/// What bounds a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// The disk's size.
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    /// What both sides agreed on.
    pub(super) features: u64,
}

/// What a request is, for the counters and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// So many bytes.
    Read(u32),
    /// So many bytes.
    Write(u32),
    Flush,
    Discard,
    Zero,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Malformed,
    OutOfRange,
    Oversized,
    ReadOnly,
    Unsupported,
}

impl Fault {
    /// The status byte that says so.
    pub(super) fn status(self) -> u8 {
        match self {
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
            _ => VIRTIO_BLK_S_IOERR as u8,
        }
    }
}

/// What is to be done.
#[derive(Debug)]
pub(super) enum Work {
    /// The serial number goes into the buffers.
    Identify,
    /// A job on the file.
    File(Kind, Job),
}

/// A request whose answer has a place.
#[derive(Debug)]
pub(super) struct Request {
    /// Where its status byte goes: the last byte that the device may write.
    pub(super) status: GuestAddress,
    pub(super) work: Result<Work, Fault>,
}

/// Reads a request. `None` if it has no place for a status.
pub(super) fn parse(chain: &Chain, memory: &Memory, limits: &Limits) -> Option<Request> {
    let last = chain.writable.last()?;
    let status = GuestAddress(last.address.0 + u64::from(last.len) - 1);
    Some(Request { status, work: work(chain, memory, limits) })
}

fn work(chain: &Chain, memory: &Memory, limits: &Limits) -> Result<Work, Fault> {
    let mut header = [0; HEADER as usize];
    if chain.read(memory, 0, &mut header) != Ok(header.len()) {
        return Err(Fault::Malformed);
    }
    let (kind, sector) = (le32(&header, 0), le64(&header, 8));
    let written = total(&chain.readable) - HEADER;
    let room = total(&chain.writable) - 1;
    match kind {
        VIRTIO_BLK_T_IN => read(chain, memory, limits, sector, (written, room)),
        VIRTIO_BLK_T_OUT => write(chain, memory, limits, sector, (written, room)),
        VIRTIO_BLK_T_FLUSH => Ok(Work::File(Kind::Flush, Job::Sync)),
        VIRTIO_BLK_T_GET_ID if room < SERIAL_BYTES as u64 => Err(Fault::Malformed),
        VIRTIO_BLK_T_GET_ID => Ok(Work::Identify),
        VIRTIO_BLK_T_DISCARD if limits.features & 1 << VIRTIO_BLK_F_DISCARD != 0 => {
            let (range, flags) = range(chain, memory, limits, written)?;
            // 5.2.6.2: the flag is for WRITE_ZEROES alone, and an unknown one is not to be ignored.
            if flags != 0 {
                return Err(Fault::Unsupported);
            }
            Ok(Work::File(Kind::Discard, Job::Punch { offset: range.0, len: range.1 }))
        }
        VIRTIO_BLK_T_WRITE_ZEROES if limits.features & 1 << VIRTIO_BLK_F_WRITE_ZEROES != 0 => {
            let (range, flags) = range(chain, memory, limits, written)?;
            let (offset, len) = range;
            match flags {
                0 => Ok(Work::File(Kind::Zero, Job::Zero { offset, len })),
                UNMAP => Ok(Work::File(Kind::Zero, Job::Punch { offset, len })),
                _ => Err(Fault::Unsupported),
            }
        }
        _ => Err(Fault::Unsupported),
    }
}

fn read(
    chain: &Chain,
    memory: &Memory,
    limits: &Limits,
    sector: u64,
    (written, room): (u64, u64),
) -> Result<Work, Fault> {
    if written != 0 {
        return Err(Fault::Malformed);
    }
    let offset = whole_sectors(limits, sector, room)?;
    if chain.writable.len() > PIECES {
        return Err(Fault::Oversized);
    }
    let buffers = Buffers::new(memory, &chain.writable, 0, room).ok_or(Fault::Malformed)?;
    Ok(Work::File(Kind::Read(room as u32), Job::Read { offset, buffers }))
}

fn write(
    chain: &Chain,
    memory: &Memory,
    limits: &Limits,
    sector: u64,
    (written, room): (u64, u64),
) -> Result<Work, Fault> {
    if room != 0 {
        return Err(Fault::Malformed);
    }
    let offset = whole_sectors(limits, sector, written)?;
    if limits.read_only {
        return Err(Fault::ReadOnly);
    }
    if chain.readable.len() > PIECES {
        return Err(Fault::Oversized);
    }
    let buffers = Buffers::new(memory, &chain.readable, HEADER, written).ok_or(Fault::Malformed)?;
    Ok(Work::File(Kind::Write(written as u32), Job::Write { offset, buffers }))
}

/// Where `len` bytes from `sector` on begin in the file.
fn whole_sectors(limits: &Limits, sector: u64, len: u64) -> Result<u64, Fault> {
    if len == 0 || !len.is_multiple_of(SECTOR) {
        return Err(Fault::Malformed);
    }
    if len > u64::from(SEGMENTS) * u64::from(SEGMENT_BYTES) {
        return Err(Fault::Oversized);
    }
    within(limits, sector, len / SECTOR)
}

/// Where `count` sectors from `sector` on begin in the file, if the disk has them all.
fn within(limits: &Limits, sector: u64, count: u64) -> Result<u64, Fault> {
    match sector.checked_add(count) {
        // The disk's size in bytes is a u64, so this cannot overflow.
        Some(end) if end <= limits.sectors => Ok(sector * SECTOR),
        _ => Err(Fault::OutOfRange),
    }
}

/// The one range of a DISCARD or WRITE_ZEROES, as offset and length in bytes, and its flags.
fn range(chain: &Chain, memory: &Memory, limits: &Limits, written: u64) -> Result<((u64, u64), u32), Fault> {
    if limits.read_only {
        return Err(Fault::ReadOnly);
    }
    if written > RANGE {
        // The configuration space says one.
        return Err(if written.is_multiple_of(RANGE) { Fault::Oversized } else { Fault::Malformed });
    }
    let mut range = [0; RANGE as usize];
    if chain.read(memory, HEADER, &mut range) != Ok(range.len()) {
        return Err(Fault::Malformed);
    }
    let (sector, count, flags) = (le64(&range, 0), le32(&range, 8), le32(&range, 12));
    if count == 0 {
        return Err(Fault::Malformed);
    }
    if count > RANGE_SECTORS {
        return Err(Fault::Oversized);
    }
    let offset = within(limits, sector, u64::from(count))?;
    Ok(((offset, u64::from(count) * SECTOR), flags))
}

fn le32(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le64(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}
