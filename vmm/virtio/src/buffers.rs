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
