//! Bytes between guest memory and a socket, without a buffer of ours in between.
//!
//! A write to a socket whose other end is gone is an error, not a signal: Rust's runtime ignores SIGPIPE.

use std::{io, os::unix::net::UnixStream};

use vm_memory::{GuestMemory, Permissions, ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use crate::{
    Memory,
    ring::{RingError, Span},
};

/// The most calls for one packet. Linux's packets have 18 pieces at most; a guest that cuts its buffers into
/// crumbs shall not keep the loop busy with them.
const PIECES: usize = 64;

/// Reads from the socket into `spans` from byte `offset` on, at most `limit` bytes.
/// Answers how many there were: 0 at the end of file.
pub(super) fn from_host(
    mut socket: &UnixStream,
    memory: &Memory,
    spans: &[Span],
    offset: u64,
    limit: u64,
) -> Result<io::Result<u64>, RingError> {
    move_bytes(memory, spans, offset, limit, |slice| socket.read_volatile(slice))
}

/// Writes `len` bytes of `spans` from byte `offset` on to the socket. Answers how many it took.
pub(super) fn to_host(
    mut socket: &UnixStream,
    memory: &Memory,
    spans: &[Span],
    offset: u64,
    len: u64,
) -> Result<io::Result<u64>, RingError> {
    move_bytes(memory, spans, offset, len, |slice| socket.write_volatile(slice))
}

/// Moves piece by piece until one is not moved whole, or there were [`PIECES`]. An error after the first piece is left for the next
/// time: the socket says it again, or says what came of it.
fn move_bytes(
    memory: &Memory,
    spans: &[Span],
    mut offset: u64,
    limit: u64,
    mut step: impl FnMut(&mut VolatileSlice) -> Result<usize, VolatileMemoryError>,
) -> Result<io::Result<u64>, RingError> {
    let (mut done, mut pieces) = (0, 0);
    for span in spans {
        let len = u64::from(span.len);
        if offset >= len {
            offset -= len;
            continue;
        }
        let wanted = (len - offset).min(limit - done);
        if wanted == 0 || pieces == PIECES {
            break;
        }
        pieces += 1;
        let mut address = span.address;
        address.0 += offset;
        offset = 0;
        let mut slices = memory
            .get_slices(address, wanted as usize, Permissions::ReadWrite)
            .map_err(|_| RingError::Chain)?;
        // A span lies in one region: there is one slice.
        let slice = slices.next().ok_or(RingError::Chain)?;
        let mut slice = slice.map_err(|_| RingError::Chain)?;
        let moved = loop {
            match step(&mut slice) {
                Err(VolatileMemoryError::IOError(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        match moved {
            Ok(n) => {
                done += n as u64;
                if (n as u64) < wanted {
                    break;
                }
            }
            Err(_) if done > 0 => break,
            Err(VolatileMemoryError::IOError(e)) => return Ok(Err(e)),
            Err(_) => return Err(RingError::Chain),
        }
    }
    Ok(Ok(done))
}
