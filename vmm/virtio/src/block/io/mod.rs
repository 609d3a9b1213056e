//! How jobs get to the file: through io_uring, or one by one where there is none.
//! Knows nothing of virtio: a job comes with a token of its owner's, and goes back with it.

mod uring;

use std::{fs::File, io};

use vmm_sys_util::{
    eventfd::EventFd,
    fallocate::{FallocateMode, fallocate},
};

use crate::buffers::Buffers;

/// Something to do on the file. Offsets and lengths are bytes.
#[derive(Debug)]
pub(super) enum Job {
    /// Fill the buffers from the file.
    Read { offset: u64, buffers: Buffers },
    /// Write the buffers to the file.
    Write { offset: u64, buffers: Buffers },
    /// Make durable what was written: fdatasync.
    Sync,
    /// Give the range back to the file system: it reads as zeros.
    Punch { offset: u64, len: u64 },
    /// Make the range zeros, without giving it back.
    Zero { offset: u64, len: u64 },
}

impl Job {
    /// Leaves `n` bytes behind that were moved. Answers how many are left to move.
    pub(super) fn advance(&mut self, n: usize) -> u64 {
        match self {
            Self::Read { offset, buffers } | Self::Write { offset, buffers } => {
                buffers.advance(n);
                *offset += n as u64;
                buffers.len()
            }
            Self::Sync | Self::Punch { .. } | Self::Zero { .. } => 0,
        }
    }
}

/// A job that was done: as far as it got, and what the kernel answered.
pub(super) struct Done<T> {
    pub(super) token: T,
    pub(super) job: Job,
    pub(super) result: io::Result<usize>,
}

/// Which way the jobs go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring where the host has it.
    #[default]
    Auto,
    /// One system call after another, without io_uring.
    Plain,
}

/// A file, and the way to it.
pub(super) struct Engine<T> {
    file: File,
    ring: Option<uring::Uring<T>>,
}

impl<T> Engine<T> {
    /// For `file`, with at most `depth` jobs in flight; `event` is written whenever one is done.
    pub(super) fn new(file: File, depth: u16, event: &EventFd, choice: EngineChoice) -> Self {
        let ring = match choice {
            // Whatever the reason of the refusal, the other way works everywhere.
            EngineChoice::Auto => uring::Uring::new(&file, depth, event).ok(),
            EngineChoice::Plain => None,
        };
        Self { file, ring }
    }

    /// The file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Whether several jobs are done at a time.
    pub(super) fn is_uring(&self) -> bool {
        self.ring.is_some()
    }

    /// Jobs that have been started and not been answered.
    pub(super) fn in_flight(&self) -> usize {
        self.ring.as_ref().map_or(0, uring::Uring::in_flight)
    }

    /// Whether one more can be started.
    pub(super) fn has_room(&self) -> bool {
        self.ring.as_ref().is_none_or(uring::Uring::has_room)
    }

    /// Begins a job; only if there is room. What is done at once comes back.
    pub(super) fn start(&mut self, job: Job, token: T) -> Option<Done<T>> {
        match &mut self.ring {
            Some(ring) => ring.start(job, token).err().map(|(job, token)| {
                let result = Err(io::ErrorKind::ResourceBusy.into());
                Done { token, job, result }
            }),
            None => {
                let result = perform(&self.file, &job);
                Some(Done { token, job, result })
            }
        }
    }

    /// Hands what was begun to the kernel. `false`: it could not take everything now; ask again.
    pub(super) fn submit(&mut self) -> io::Result<bool> {
        self.ring.as_mut().map_or(Ok(true), uring::Uring::submit)
    }

    /// The next job that is done.
    pub(super) fn next_done(&mut self) -> Option<Done<T>> {
        self.ring.as_mut()?.next_done()
    }

    /// Blocks until a job is done, if any is in flight. After an error nothing of what was in flight is
    /// ever answered, nor its memory freed, and the jobs to come go the plain way.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let result = ring.wait();
        if result.is_err() {
            self.ring = None;
        }
        result
    }
}

fn perform(file: &File, job: &Job) -> io::Result<usize> {
    match job {
        Job::Read { offset, buffers } => buffers.read_at(file, *offset),
        Job::Write { offset, buffers } => buffers.write_at(file, *offset),
        Job::Sync => file.sync_data().map(|()| 0),
        Job::Punch { offset, len } => punch(file, *offset, *len).map(|()| 0),
        Job::Zero { offset, len } => {
            fallocate(file, FallocateMode::ZeroRange, true, *offset, *len)?;
            Ok(0)
        }
    }
}

/// Gives a range of the file back.
fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, FallocateMode::PunchHole, true, offset, len).map_err(Into::into)
}

/// Whether ranges of the file can be given back. Asked beyond its end, where it changes nothing; a block
/// device has nothing there to ask for and refuses the range rather than the wish (blkdev_fallocate of
/// Linux), and may still refuse each request.
pub(super) fn can_punch(file: &File, size: u64) -> bool {
    match punch(file, size.next_multiple_of(1 << 20), 1 << 20) {
        Ok(()) => true,
        Err(error) => error.raw_os_error() == Some(libc::EINVAL),
    }
}
