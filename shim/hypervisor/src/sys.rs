//! The few calls that no safe crate offers: pidfds, what a child does before exec, a descriptor
//! as a source of events, and the time stamp counter. Knows no program.
#![allow(unsafe_code)]

use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::child::Network;

/// Registers a descriptor with the runtime as a source of "can be read".
pub(crate) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor stays open, and stays the same, for as long as it is owned, and
    // AsyncFd gives nobody the means to take it out without being deregistered first.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(Into::into)
}

/// Registers a descriptor with the runtime as a source of "can be read" and "can be written".
pub(crate) fn read_write(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: as in `readable`.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE | Interest::WRITABLE) }
        .map_err(Into::into)
}

/// Opens a descriptor for a child that is not reaped yet; it becomes readable when the child ends.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers and touches no memory of ours.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, libc::PIDFD_NONBLOCK) })?;
    // SAFETY: the kernel has just made this descriptor for us, and close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sends a signal to the very process behind a pidfd, also when its pid is in use by another.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo means "as kill(2) would"; no memory of ours is touched.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })?;
    Ok(())
}

/// Makes the child a leader of its own session, have it die with the thread that makes it, and
/// inherit no descriptor but 0, 1, 2 and `keep` (which keep their numbers). It starts in `network`, which must
/// stay open until then. With `own_pids` it is the first of a pid namespace (see [`in_new_pids`]).
pub(crate) fn prepare(command: &mut Command, keep: Vec<RawFd>, network: &Network, own_pids: bool) {
    // Out of a pid namespace the parent shows as 0, dead or alive: such a child must notice our death by
    // other means too (a socket that closes).
    let parent = if own_pids { 0 } else { std::process::id() as i32 };
    let network = match network {
        Network::Inherited => None,
        Network::Own => Some(None),
        Network::Of(fd) => Some(Some(fd.as_raw_fd())),
    };
    let prepare = move || {
        // SAFETY (all calls): between fork and exec only async-signal-safe calls are allowed. These
        // are plain system calls on integers; `keep` was filled before the fork and is only read.
        unsafe {
            check(libc::setsid().into())?;
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong).into())?;
            // The parent may have died before the line above: then nobody would ever end us.
            if libc::getppid() != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            match network {
                None => {}
                Some(None) => drop(check(libc::unshare(libc::CLONE_NEWNET).into())?),
                Some(Some(fd)) => drop(check(libc::setns(fd, libc::CLONE_NEWNET).into())?),
            }
            // Marked, not closed: std reports a failed exec through a descriptor of its own.
            check(libc::syscall(
                libc::SYS_close_range,
                3 as libc::c_uint,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            ))?;
            for &fd in &keep {
                check(libc::fcntl(fd, libc::F_SETFD, 0).into())?;
            }
        }
        Ok(())
    };
    // SAFETY: the closure keeps to async-signal-safe calls, see above; it allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// Makes a child as the first process of a new pid namespace. Only what `spawn` makes goes there.
pub(crate) fn in_new_pids<T>(spawn: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let ours = std::fs::File::open("/proc/thread-self/ns/pid")?;
    // Concerns only the children of this thread that are made from now on, until it is taken back.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWPID)?;
    let spawned = spawn();
    nix::sched::setns(&ours, nix::sched::CloneFlags::CLONE_NEWPID)?;
    spawned
}

/// The processor's time stamp counter.
pub(crate) fn time_stamp_counter() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets programs use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn check(answer: libc::c_long) -> io::Result<libc::c_long> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}
