//! The guest's buffers as the kernel takes them: iovecs that keep the memory they point into mapped.
//! Knows nothing of rings or devices. One of the few files with unsafe code: it hands addresses of guest
//! memory to readv(2) and its kin, and to io_uring by way of [`Buffers::iovecs`].
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
};

use vm_memory::GuestMemoryBackend;

use crate::{Memory, ring::Span};

/// The most iovecs that one call takes (UIO_MAXIOV of Linux).
pub(crate) const IOVECS_LIMIT: usize = 1024;

/// Stretches of guest memory, mapped for as long as this lives.
///
/// The guest may change the bytes at any time; here they are never looked at, only handed to the kernel.
#[derive(Debug)]
pub(crate) struct Buffers {
    iovecs: Vec<libc::iovec>,
    /// The first iovec that is not yet used up.
    first: usize,
    /// Keeps the mapping that the iovecs point into.
    _memory: Memory,
}

// SAFETY: the pointers are to a mapping that belongs to no thread and that `_memory` keeps; nothing here
// follows them.
unsafe impl Send for Buffers {}

impl Buffers {
    /// The bytes `from..from + len` of `spans`. `None` where those are not all there, lie outside of
    /// memory, or are in more pieces than one call takes.
    pub(crate) fn new<'a>(
        memory: &Memory,
        spans: impl IntoIterator<Item = &'a Span>,
        mut from: u64,
        mut len: u64,
    ) -> Option<Self> {
        let spans = spans.into_iter();
        let mut iovecs = Vec::with_capacity(spans.size_hint().0.min(IOVECS_LIMIT));
        for span in spans {
            let here = u64::from(span.len);
            if from >= here {
                from -= here;
                continue;
            }
            if len == 0 {
                break;
            }
            let n = len.min(here - from);
            let at = vm_memory::GuestAddress(span.address.0.checked_add(from)?);
            let slice = memory.get_slice(at, n as usize).ok()?;
            iovecs.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: n as usize });
            (from, len) = (0, len - n);
        }
        let whole = len == 0 && iovecs.len() <= IOVECS_LIMIT;
        whole.then(|| Self { iovecs, first: 0, _memory: memory.clone() })
    }

    /// What is left of them. The pointers are good while this lives and is not changed.
    pub(crate) fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs[self.first..]
    }

    /// Bytes left.
    pub(crate) fn len(&self) -> u64 {
        self.iovecs().iter().map(|v| v.iov_len as u64).sum()
    }

    /// Leaves `n` bytes at the front behind: they are done.
    pub(crate) fn advance(&mut self, mut n: usize) {
        while let Some(iovec) = self.iovecs.get_mut(self.first) {
            if n < iovec.iov_len {
                iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(n).cast();
                iovec.iov_len -= n;
                return;
            }
            n -= iovec.iov_len;
            self.first += 1;
        }
    }

    /// Fills them from `file` at `offset` (preadv). Answers how many bytes came.
    pub(crate) fn read_at(&self, file: &impl AsRawFd, offset: u64) -> io::Result<usize> {
        let (offset, iovecs) = (position(offset)?, self.iovecs());
        // SAFETY: the iovecs are `iovecs.len()` in number and point into a mapping that `self` keeps.
        again(|| unsafe { libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32, offset) })
    }

    /// Writes them to `file` at `offset` (pwritev). Answers how many bytes went.
    pub(crate) fn write_at(&self, file: &impl AsRawFd, offset: u64) -> io::Result<usize> {
        let (offset, iovecs) = (position(offset)?, self.iovecs());
        // SAFETY: as in `read_at`.
        again(|| unsafe { libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32, offset) })
    }

    /// Fills them from `file`, one frame of a tap (readv); what they have no room for goes to `overflow`,
    /// because a tap drops it without a word. Answers how many bytes came in all.
    pub(crate) fn read_from(&mut self, file: RawFd, overflow: &mut [u8]) -> io::Result<usize> {
        self.iovecs.push(libc::iovec { iov_base: overflow.as_mut_ptr().cast(), iov_len: overflow.len() });
        let iovecs = self.iovecs();
        // SAFETY: as in `read_at`; the last one is `overflow`, which is borrowed until the call is over.
        let result = again(|| unsafe { libc::readv(file, iovecs.as_ptr(), iovecs.len() as i32) });
        self.iovecs.pop();
        result
    }

    /// Writes them to `file`, one frame of a tap (writev). Answers how many bytes went.
    pub(crate) fn write_to(&self, file: RawFd) -> io::Result<usize> {
        let iovecs = self.iovecs();
        // SAFETY: as in `read_at`.
        again(|| unsafe { libc::writev(file, iovecs.as_ptr(), iovecs.len() as i32) })
    }
}

fn position(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Calls until a signal does not come between.
fn again(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::testing::{BUFFERS, MEMORY, memory};

    fn spans(spans: &[(u64, u32)]) -> Vec<Span> {
        spans.iter().map(|&(at, len)| Span { address: GuestAddress(BUFFERS + at), len }).collect()
    }

    fn written(buffers: &Buffers) -> Vec<u8> {
        let file = tempfile::tempfile().unwrap();
        let n = buffers.write_at(&file, 3).unwrap();
        assert_eq!(n as u64, buffers.len());
        let mut bytes = vec![0; n];
        file.read_exact_at(&mut bytes, 3).unwrap();
        bytes
    }

    #[test]
    fn they_are_the_bytes_that_were_asked_for() {
        let memory = memory();
        let bytes: Vec<u8> = (0..=255).collect();
        memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
        let spans = spans(&[(0, 10), (20, 10), (40, 10)]);
        let all: Vec<u8> = (0..10).chain(20..30).chain(40..50).collect();
        for from in 0..=30 {
            for len in 0..=30 - from {
                let mut buffers = Buffers::new(&memory, &spans, from as u64, len as u64).unwrap();
                assert_eq!(written(&buffers), all[from..from + len]);
                for done in 0..=len {
                    assert_eq!(written(&buffers), all[from + done..from + len], "{from} {len} {done}");
                    buffers.advance(1);
                }
            }
            assert!(Buffers::new(&memory, &spans, from as u64, 31 - from as u64).is_none());
        }
        let mut buffers = Buffers::new(&memory, &spans, 1, 28).unwrap();
        buffers.advance(15);
        assert_eq!(written(&buffers), all[16..29]);
    }

    #[test]
    fn nothing_outside_of_memory_is_handed_out() {
        let memory = memory();
        let end = MEMORY as u64 - BUFFERS;
        for (at, len) in [(end, 1), (end - 1, 2), (u64::MAX - BUFFERS, 1), (0, u32::MAX)] {
            let spans = spans(&[(at, len)]);
            assert!(Buffers::new(&memory, &spans, 0, len.into()).is_none(), "{at:#x} {len}");
        }
        let many = spans(&[(0, 1)].repeat(IOVECS_LIMIT + 1));
        assert!(Buffers::new(&memory, &many[1..], 0, IOVECS_LIMIT as u64).is_some());
        assert!(Buffers::new(&memory, &many, 0, IOVECS_LIMIT as u64 + 1).is_none());
    }

    #[test]
    fn what_has_no_room_goes_to_the_overflow() {
        let memory = memory();
        let (near, far) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let mut buffers = Buffers::new(&memory, &spans(&[(0, 3), (8, 2)]), 0, 5).unwrap();
        let mut overflow = [0; 4];
        for frame in [&b"abcdefg"[..], b"xyz", b"0123456789"] {
            far.send(frame).unwrap();
            assert_eq!(buffers.read_from(near.as_raw_fd(), &mut overflow).unwrap(), frame.len().min(9));
        }
        let mut bytes = [0; 3];
        memory.read_slice(&mut bytes, GuestAddress(BUFFERS)).unwrap();
        assert_eq!((&bytes, &overflow), (b"012", b"5678"));
        assert_eq!(buffers.len(), 5, "the overflow is none of them");
    }
}
