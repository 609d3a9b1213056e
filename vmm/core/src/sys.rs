//! The few calls that no safe crate offers: descriptors that arrive, guest memory's mapping, signals.
//! Knows no machine.
#![allow(unsafe_code)]

use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::thread::JoinHandleExt,
    },
    thread::JoinHandle,
};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal};

/// Takes over a descriptor that this process was started with.
///
/// # Errors
/// It is not open.
pub(crate) fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: a number that is not a descriptor is told by the call below; one that is came from our
    // parent for this very use, and nothing else in this process owns it: it is taken over once, first of all.
    let owned = unsafe { BorrowedFd::borrow_raw(fd) };
    nix::fcntl::fcntl(owned, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    // SAFETY: as above; it is open, as was just seen.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes over descriptors that the kernel has just put into this process (SCM_RIGHTS).
pub(crate) fn received(fds: &[RawFd]) -> Vec<OwnedFd> {
    // SAFETY: recvmsg made each of them for us; the caller passes each list on once.
    fds.iter().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect()
}

/// Address space for guest memory: `size` bytes at a multiple of 2 MiB, so that huge pages fit, backed by
/// `file` from `offset` on (shared), or by private memory. It is never unmapped: it lives as long as the
/// process.
///
/// # Errors
/// There is no room, or the file cannot be mapped.
pub(crate) fn map_guest_memory(file: Option<(&OwnedFd, u64)>, size: usize) -> io::Result<*mut u8> {
    const ALIGN: usize = 2 << 20;
    const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;
    let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a mapping wherever there is room overlays nothing.
    let room = unsafe { libc::mmap(std::ptr::null_mut(), size + ALIGN, libc::PROT_NONE, reserve, -1, 0) };
    if room == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let at = (room as usize).next_multiple_of(ALIGN) as *mut libc::c_void;
    let (flags, fd, offset) = match file {
        Some((fd, offset)) => (libc::MAP_SHARED | libc::MAP_NORESERVE, fd.as_raw_fd(), offset),
        None => (reserve, -1, 0),
    };
    // SAFETY: `at..at + size` lies within the room that was reserved above and nobody knows of yet.
    let mapped = unsafe { libc::mmap(at, size, PROT, flags | libc::MAP_FIXED, fd, offset as libc::off_t) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // Where the host does not do huge pages it says so; small ones work too. Guest memory has no place in
    // a core dump.
    // SAFETY: advice about a mapping of ours; it changes no content.
    unsafe {
        libc::madvise(at, size, libc::MADV_HUGEPAGE);
        libc::madvise(at, size, libc::MADV_DONTDUMP);
    }
    Ok(at.cast())
}

/// Has the host give the pages behind a stretch of guest memory now. A hint: a host that cannot (before
/// Linux 5.14) or that is short of memory gives them when they are touched, or tells then.
pub(crate) fn populate(at: *mut u8, size: usize) {
    // SAFETY: the caller passes a stretch of guest memory, which is never unmapped; its content stays.
    unsafe { libc::madvise(at.cast(), size, libc::MADV_POPULATE_WRITE) };
}

/// Gives the host's pages behind private memory back; they read as zeros afterwards.
pub(crate) fn forget(at: *mut u8, size: usize) -> io::Result<()> {
    // SAFETY: the caller passes a stretch of guest memory, whose content the guest has given up; nothing in
    // this process holds references into guest memory, only volatile accesses go there.
    match unsafe { libc::madvise(at.cast(), size, libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has a write to a pipe or socket that nobody reads fail instead of ending the process.
pub(crate) fn ignore_broken_pipes() -> io::Result<()> {
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is installed.
    unsafe { nix::sys::signal::sigaction(Signal::SIGPIPE, &ignore) }?;
    Ok(())
}

/// Has all threads share two heaps. The C library gives a heap to each thread, and with the ninth it asks for the
/// number of processors, which the filters of system calls forbid; few threads here allocate, and little.
pub(crate) fn share_heaps() {
    // SAFETY: sets a number in the C library, before there is a second thread.
    let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
    debug_assert_eq!(set, 1, "M_ARENA_MAX is known to the C library we are linked with");
}

/// The signal that makes a processor's thread leave KVM_RUN.
pub(crate) const KICK: i32 = libc::SIGUSR1;

/// Makes [`KICK`] have a processor's thread leave KVM_RUN, and interrupt any other thread's call.
///
/// A signal alone is not enough: one that arrives between the last look at the wish and KVM_RUN would be
/// spent before. The byte stays set until the thread has seen it.
pub(crate) fn prepare_kick() -> io::Result<()> {
    extern "C" fn leave(_: libc::c_int) {
        let byte = IMMEDIATE_EXIT.get();
        if !byte.is_null() {
            // SAFETY: it points into the kvm_run of the processor that this thread owns until it ends
            // (kick_leaves); a byte is written whole.
            unsafe { byte.write_volatile(1) };
        }
    }
    let action = SigAction::new(SigHandler::Handler(leave), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler reads a thread-local without a destructor or lazy initialiser, and writes a byte.
    unsafe { nix::sys::signal::sigaction(Signal::SIGUSR1, &action) }?;
    Ok(())
}

/// Interrupts the system call of a thread.
pub(crate) fn kick<T>(thread: &JoinHandle<T>) {
    // SAFETY: the thread is not joined yet, for its handle is here, so its id names it.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), KICK) };
}

/// Has the kernel call `handler` on a system call that a filter forbids.
pub(crate) fn on_forbidden_call(
    handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void),
) -> io::Result<()> {
    let action = SigAction::new(SigHandler::SigAction(handler), SaFlags::SA_SIGINFO, SigSet::empty());
    // SAFETY: the handler keeps to async-signal-safe calls (see seccomp.rs).
    unsafe { nix::sys::signal::sigaction(Signal::SIGSYS, &action) }?;
    Ok(())
}

/// The number of the system call that a SIGSYS is about.
pub(crate) fn forbidden_call(info: *const libc::siginfo_t) -> i32 {
    // The layout of siginfo_t for SIGSYS (asm-generic/siginfo.h): three ints and, aligned to 8, the
    // address of the call, its number, the architecture.
    #[repr(C)]
    struct Sigsys {
        signo: i32,
        errno: i32,
        code: i32,
        call_address: *const libc::c_void,
        call: i32,
        arch: u32,
    }
    // SAFETY: the kernel hands a valid siginfo_t to a handler with SA_SIGINFO, and for SIGSYS it has this layout.
    unsafe { (*info.cast::<Sigsys>()).call }
}

/// Writes to standard error and leaves at once; for signal handlers.
pub(crate) fn last_words(text: &[u8], status: i32) -> ! {
    // SAFETY: write and _exit are async-signal-safe; the slice is valid for its length.
    unsafe {
        libc::write(2, text.as_ptr().cast(), text.len());
        libc::_exit(status)
    }
}

/// Fills a buffer with random bytes of the kernel's, without waiting.
pub(crate) fn random(out: &mut [u8]) -> io::Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    // SAFETY: the kernel writes at most `out.len()` bytes to `out`.
    let n = unsafe { libc::getrandom(out.as_mut_ptr().cast(), out.len(), libc::GRND_NONBLOCK) };
    // Up to 256 bytes it never answers fewer; beyond, a signal may cut it short (getrandom(2)).
    if n == out.len() as isize { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Drops every capability from all sets of the calling thread; the process has no other.
pub(crate) fn drop_capabilities() -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    let header: [u32; 2] = [VERSION_3, 0];
    let none = [0u32; 6];
    // SAFETY: both arrays have the layout of linux/capability.h for version 3 and outlive the call.
    match unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A prctl with one integer argument.
pub(crate) fn prctl(option: i32, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used here take integers only.
    match unsafe { libc::prctl(option, argument, 0, 0, 0) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

thread_local! {
    /// The byte by which the kernel is told to leave KVM_RUN at once, of the processor on this thread.
    static IMMEDIATE_EXIT: std::cell::Cell<*mut u8> = const { std::cell::Cell::new(std::ptr::null_mut()) };
}

/// Has [`kick`] make this thread's processor leave KVM_RUN, also when it is just about to enter it. `None`
/// must follow before the processor is given up.
pub(crate) fn kick_leaves(run: Option<&mut kvm_bindings::kvm_run>) {
    IMMEDIATE_EXIT.set(run.map_or(std::ptr::null_mut(), |run| &mut run.immediate_exit));
}

/// Standard output, which from now on never blocks: a reader that is slow must not hold the guest.
pub(crate) fn standard_output() -> io::Result<std::fs::File> {
    use std::os::fd::AsFd;
    let out = io::stdout().as_fd().try_clone_to_owned()?;
    let flags = nix::fcntl::OFlag::from_bits_retain(nix::fcntl::fcntl(&out, nix::fcntl::FcntlArg::F_GETFL)?);
    nix::fcntl::fcntl(&out, nix::fcntl::FcntlArg::F_SETFL(flags | nix::fcntl::OFlag::O_NONBLOCK))?;
    Ok(out.into())
}
