//! The few system calls that no crate wraps safely, or not exactly enough.
//! Knows raw descriptors and kernel structures; must not know why a caller wants them.

#![allow(unsafe_code)]

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::unistd::{ForkResult, fork};
use tokio::io::{Interest, unix::AsyncFd};

/// Forks a process that has one thread.
///
/// # Panics
/// If the process has more than one thread: the child could inherit a lock that nobody releases.
pub(crate) fn fork_single_threaded() -> io::Result<ForkResult> {
    let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count).unwrap_or(1);
    assert_eq!(threads, 1, "fork of a process with {threads} threads");
    // SAFETY: there is one thread, so the child owns a consistent copy of everything; checked above.
    unsafe { fork() }.map_err(io::Error::from)
}

/// Takes one ended child, if there is one, with its raw wait status.
///
/// nix turns the status into an enum without the real-time signals, and loses the child that died of one.
pub(crate) fn wait_any() -> Option<(i32, i32)> {
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call.
        match unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) } {
            0 => return None,
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return None,
            pid => return Some((pid, status)),
        }
    }
}

/// Exit status as the shell counts it: the code, or 128 + the signal.
pub(crate) fn exit_status(wait_status: i32) -> u32 {
    if libc::WIFSIGNALED(wait_status) {
        128 + libc::WTERMSIG(wait_status) as u32
    } else {
        libc::WEXITSTATUS(wait_status) as u32
    }
}

/// Writes what fits at once, to a descriptor that the caller knows to be open in this process.
pub(crate) fn write_raw(fd: RawFd, bytes: &[u8]) {
    // SAFETY: the pointer and the length are those of one slice. A descriptor that is not open is EBADF.
    let _ = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
}

/// Sends `signal` to a process; real-time signals included.
pub(crate) fn kill(pid: i32, signal: u32) -> io::Result<()> {
    // SAFETY: takes plain numbers.
    check(unsafe { libc::kill(pid, signal as libc::c_int) })
}

/// Gives every signal its default action and unblocks all, as a program expects to find them.
///
/// Rust ignores SIGPIPE from its start, and an ignored signal survives execve.
pub(crate) fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL runs no code of ours; numbers that are not to be set are refused with EINVAL.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an all-zero sigset_t is the empty set on Linux, and it outlives the call.
    unsafe {
        let empty: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &empty, std::ptr::null_mut());
    }
}

/// Lets the kernel reap the children of this process by itself.
pub(crate) fn ignore_children() {
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Registers a descriptor, already non-blocking, with the runtime.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd stays open, with the same number, for as long as the AsyncFd owns it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// Sets how long a connect of a vsock socket may take.
pub(crate) fn set_connect_timeout(socket: &OwnedFd, limit: std::time::Duration) -> io::Result<()> {
    // linux/vm_sockets.h: SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD, which takes a struct timeval.
    const CONNECT_TIMEOUT: libc::c_int = 6;
    let limit = libc::timeval { tv_sec: limit.as_secs() as libc::time_t, tv_usec: 0 };
    let size = size_of_val(&limit) as libc::socklen_t;
    // SAFETY: the kernel reads one timeval, which outlives the call.
    check(unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::AF_VSOCK, CONNECT_TIMEOUT, (&raw const limit).cast(), size)
    })
}

/// Names this process for people who look at the guest.
pub(crate) fn set_name(name: &CStr) {
    // SAFETY: reads a C string, which outlives the call.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Closes every descriptor of this process.
pub(crate) fn close_all() {
    // SAFETY: takes plain numbers. The caller is a process of one thread that uses no descriptor any more.
    unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };
}

/// Lets nobody look into this process who may not look into every one (PR_SET_DUMPABLE, ptrace(2)).
pub(crate) fn forbid_tracing() {
    // SAFETY: takes plain numbers.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) };
}

/// Size of a terminal in characters.
pub(crate) fn set_winsize(tty: BorrowedFd<'_>, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCSWINSZ, &size) })
}

/// A descriptor of a process, by which its namespaces are entered.
pub(crate) fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes plain numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    check(fd as libc::c_int)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Opens the other end of a terminal, whatever lies at its path.
pub(crate) fn peer_of(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes flags by value.
    let fd = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    check(fd)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a terminal that of the session which this process leads.
pub(crate) fn make_controlling(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes a plain number.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) })
}

/// `struct sched_attr`, linux/sched/types.h, as of its first version.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct SchedAttr {
    /// Of this structure; set by [`set_scheduler`].
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    /// Nanoseconds, as the next two.
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

/// Sets how the calling thread is scheduled.
pub(crate) fn set_scheduler(attributes: &SchedAttr) -> io::Result<()> {
    let attributes = SchedAttr { size: size_of::<SchedAttr>() as u32, ..*attributes };
    // SAFETY: the kernel reads as many bytes as the structure says that it has, and it outlives the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } as libc::c_int)
}

/// Has the calling process see a 32-bit machine (personality(2), PER_LINUX32).
pub(crate) fn see_32_bits() -> io::Result<()> {
    const PER_LINUX32: libc::c_ulong = 0x0008;
    // SAFETY: takes a plain number.
    check(unsafe { libc::personality(PER_LINUX32) })
}

/// Mixes `seed` into the kernel's pool and credits it in full.
pub(crate) fn add_entropy(random: BorrowedFd<'_>, seed: &[u8]) -> io::Result<()> {
    /// `_IOW('R', 3, int[2])`, linux/random.h.
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    // struct rand_pool_info: bits, length in bytes, then the bytes.
    let mut info = Vec::with_capacity(8 + seed.len());
    info.extend((seed.len() as i32 * 8).to_ne_bytes());
    info.extend((seed.len() as i32).to_ne_bytes());
    info.extend(seed);
    // SAFETY: the buffer is laid out as rand_pool_info with its true length, and outlives the call.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, info.as_ptr()) })
}

/// Sets the interface `lo` up in the network namespace of the calling thread.
pub(crate) fn loopback_up() -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: an all-zero ifreq is valid: a name, and a union of plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    // SAFETY: both calls take one ifreq, which outlives them; the first fills in the flags that are read.
    unsafe {
        check(libc::ioctl(fd.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request))?;
        request.ifr_ifru.ifru_flags |= (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        check(libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS, &request))
    }
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_counts_signals_from_128() {
        assert_eq!(exit_status(0), 0);
        assert_eq!(exit_status(7 << 8), 7);
        assert_eq!(exit_status(255 << 8), 255);
        assert_eq!(exit_status(libc::SIGKILL), 137);
        // With a core dump, and for a real-time signal.
        assert_eq!(exit_status(libc::SIGSEGV | 0x80), 139);
        assert_eq!(exit_status(40), 168);
    }
}
