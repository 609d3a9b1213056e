//! Small facts about processes and mounts of the host, read from /proc, and how to end a process for good.
//! Knows nothing of sandboxes.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::PathBuf,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};

/// How long a process that got SIGKILL may take to be gone, in milliseconds.
const END_DEADLINE_MS: u16 = 3_000;

/// When `pid` was started, in clock ticks since boot (proc(5), /proc/pid/stat field 22); None if there is
/// no such process.
pub fn start_time(pid: i32) -> io::Result<Option<u64>> {
    let text = match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    // The name in field 2 may hold blanks and brackets; the last ')' ends it.
    let after_name = text.rfind(')').map(|at| &text[at + 1..]).unwrap_or_default();
    Ok(after_name.split_ascii_whitespace().nth(19).and_then(|field| field.parse().ok()))
}

/// Ends the process `pid` if it is the one that began at `start_time`, and waits until it runs no more.
/// Succeeds if there is no such process. A zombie counts as ended: reaping is its parent's.
pub fn end(pid: i32, started: u64) -> io::Result<()> {
    let Some(pidfd) = pidfd_open(pid)? else { return Ok(()) };
    // Compared after the pidfd is held, so that the pid cannot change hands in between.
    if start_time(pid)? != Some(started) {
        return Ok(());
    }
    match pidfd_kill(&pidfd, Signal::SIGKILL) {
        Ok(()) => {}
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        Err(e) => return Err(e),
    }
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::from(END_DEADLINE_MS)) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "did not end after SIGKILL")),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Columns and rows of a terminal (TIOCGWINSZ, ioctl_tty(2)); None for anything else.
#[allow(unsafe_code)]
pub fn window_size(tty: BorrowedFd<'_>) -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize, which outlives the call; the descriptor is borrowed, hence open.
    let answer = unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (answer == 0).then_some((size.ws_col, size.ws_row))
}

/// Every mount point of this mount namespace, the newest last (proc(5), /proc/pid/mountinfo field 5).
pub fn mount_points() -> io::Result<Vec<PathBuf>> {
    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(text.lines().filter_map(|l| l.split(' ').nth(4)).map(|f| PathBuf::from(unescape(f))).collect())
}

/// A mount, as /proc/pid/mountinfo tells of it (proc(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// Major and minor number of the file system.
    pub device: (u32, u32),
    /// What of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// The kind of file system.
    pub kind: String,
}

/// Every mount of this mount namespace, the newest last.
pub fn mounts() -> io::Result<Vec<Mounted>> {
    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(text.lines().filter_map(mounted).collect())
}

fn mounted(line: &str) -> Option<Mounted> {
    let (fields, rest) = line.split_once(" - ")?;
    let mut fields = fields.split(' ').skip(2);
    let (major, minor) = fields.next()?.split_once(':')?;
    Some(Mounted {
        device: (major.parse().ok()?, minor.parse().ok()?),
        root: unescape(fields.next()?).into(),
        point: unescape(fields.next()?).into(),
        kind: rest.split(' ').next()?.to_owned(),
    })
}

/// Undoes the octal escapes of mountinfo (blank, tab, newline, backslash).
fn unescape(field: &str) -> String {
    let mut out = Vec::with_capacity(field.len());
    let bytes = field.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let octal = (bytes[at] == b'\\')
            .then(|| bytes.get(at + 1..at + 4))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[allow(unsafe_code)]
fn pidfd_open(pid: i32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: pidfd_open(2) takes two integers and returns a new descriptor, owned from here on.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ESRCH) { Ok(None) } else { Err(error) };
    }
    // SAFETY: checked above to be a descriptor that nobody else owns.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}

#[allow(unsafe_code)]
fn pidfd_kill(pidfd: &OwnedFd, signal: Signal) -> io::Result<()> {
    // SAFETY: pidfd_send_signal(2) with a descriptor that is open for the call and no siginfo.
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as i32,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_start_time_is_known_and_a_free_pid_has_none() {
        assert!(start_time(std::process::id() as i32).unwrap().is_some());
        assert_eq!(start_time(i32::MAX).unwrap(), None);
        end(i32::MAX, 1).unwrap();
    }

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape(r"/a\040b\134c\011"), "/a b\\c\t");
        assert_eq!(unescape(r"/trailing\04"), r"/trailing\04");
        assert!(mount_points().unwrap().contains(&PathBuf::from("/proc")));
    }
}
