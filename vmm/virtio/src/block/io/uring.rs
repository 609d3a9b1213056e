//! Jobs through io_uring, and the ring's own restrictions.
//! One of the few files with unsafe code: what is submitted points into guest memory.
//!
//! The invariant: **what a submitted entry points at lives in `slots` until its completion was seen.** It
//! is upheld here alone: a job is moved into its slot before its entry is pushed, and only
//! [`Uring::next_done`] moves it out. [`Drop`] waits for what is in flight; if the kernel does not let it
//! wait, the slots are leaked, and with them the reference to the guest's memory.
#![allow(unsafe_code)]

use std::{fs::File, io, os::fd::AsRawFd};

use io_uring::{IoUring, opcode, register::Restriction, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::Job;

/// The file's number in the ring: the only one it knows.
const FILE: types::Fixed = types::Fixed(0);

/// A ring for one file.
pub(super) struct Uring<T> {
    ring: IoUring,
    /// What is in flight, by the number that its entry carries.
    slots: Vec<Option<(Job, T)>>,
    free: Vec<u16>,
}

impl<T> Uring<T> {
    pub(super) fn new(file: &File, depth: u16, event: &EventFd) -> io::Result<Self> {
        // Disabled until it is restricted. The completion queue has twice the entries, more than can be
        // in flight: it never overflows.
        let ring = IoUring::builder().dontfork().setup_r_disabled().build(u32::from(depth))?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_eventfd(event.as_raw_fd())?;
        let mut restrictions = [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
        ];
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        let slots = (0..depth).map(|_| None).collect();
        Ok(Self { ring, slots, free: (0..depth).collect() })
    }

    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Puts a job into the submission queue, or gives it back where there is no room.
    pub(super) fn start(&mut self, job: Job, token: T) -> Result<(), (Job, T)> {
        let Some(number) = self.free.pop() else { return Err((job, token)) };
        let slot = self.slots[usize::from(number)].insert((job, token));
        let entry = entry(&slot.0).user_data(u64::from(number));
        // SAFETY: the iovecs that `entry` points at, and the memory these point at, belong to the job in
        // the slot, where it stays unchanged until the completion of this entry (the invariant above).
        // Moving the job's Vec of iovecs does not move the iovecs.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            // Not pushed: the kernel never hears of it.
            self.free.push(number);
            return self.slots[usize::from(number)].take().map_or(Ok(()), Err);
        }
        Ok(())
    }

    /// `false`: the kernel lacks memory for now.
    pub(super) fn submit(&mut self) -> io::Result<bool> {
        if self.ring.submission().is_empty() {
            return Ok(true);
        }
        self.enter(0)
    }

    pub(super) fn wait(&mut self) -> io::Result<()> {
        while self.in_flight() > 0 && self.ring.completion().is_empty() {
            self.enter(1)?;
        }
        Ok(())
    }

    fn enter(&mut self, want: usize) -> io::Result<bool> {
        match self.ring.submit_and_wait(want) {
            Ok(_) => Ok(self.ring.submission().is_empty()),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(false),
                _ => Err(error),
            },
        }
    }

    pub(super) fn next_done(&mut self) -> Option<super::Done<T>> {
        let completion = self.ring.completion().next()?;
        let number = completion.user_data() as u16;
        let (job, token) = self.slots.get_mut(usize::from(number))?.take()?;
        self.free.push(number);
        let result = match usize::try_from(completion.result()) {
            Ok(n) => Ok(n),
            Err(_) => Err(io::Error::from_raw_os_error(-completion.result())),
        };
        Some(super::Done { token, job, result })
    }
}

impl<T> Drop for Uring<T> {
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            if self.wait().is_err() {
                // The kernel may still write to what the slots point at: that must stay for ever.
                return std::mem::forget(std::mem::take(&mut self.slots));
            }
            while self.next_done().is_some() {}
        }
    }
}

fn entry(job: &Job) -> squeue::Entry {
    match job {
        Job::Read { offset, buffers } => {
            let iovecs = buffers.iovecs();
            opcode::Readv::new(FILE, iovecs.as_ptr(), iovecs.len() as u32).offset(*offset).build()
        }
        Job::Write { offset, buffers } => {
            let iovecs = buffers.iovecs();
            opcode::Writev::new(FILE, iovecs.as_ptr(), iovecs.len() as u32).offset(*offset).build()
        }
        Job::Sync => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
        Job::Punch { offset, len } => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            opcode::Fallocate::new(FILE, *len).offset(*offset).mode(mode).build()
        }
        Job::Zero { offset, len } => {
            let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
            opcode::Fallocate::new(FILE, *len).offset(*offset).mode(mode).build()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_does_nothing_but_what_a_disk_needs() {
        let file = tempfile::tempfile().unwrap();
        let event = EventFd::new(0).unwrap();
        let mut uring: Uring<()> = Uring::new(&file, 4, &event).unwrap();
        let other = types::Fd(event.as_raw_fd());
        let forbidden = [
            opcode::Nop::new().build(),
            opcode::Fsync::new(other).build(),
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr()).build(),
        ];
        for entry in forbidden {
            // SAFETY: the one pointer is to a constant.
            unsafe { uring.ring.submission().push(&entry) }.unwrap();
            uring.ring.submit_and_wait(1).unwrap();
            let completion = uring.ring.completion().next().unwrap();
            assert_eq!(completion.result(), -libc::EACCES);
        }
        assert!(uring.ring.submitter().unregister_files().is_err());
    }
}
