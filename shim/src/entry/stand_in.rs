//! The program of a stand-in: the process of the host that is a container's for everybody who has its pid.
//! Knows the two ends of its life and what it is sent; does not know what it stands for.
//!
//! Whoever has the pid of a container uses it in three ways, and each must lead to the container or nowhere:
//! as the way to its root (`/proc/<pid>/root`: `nerdctl cp` writes there), as the way to its network
//! (`/proc/<pid>/ns/net`), and as what is signalled. So this process is where it was started (the pod's network
//! namespace), makes the container's root its own, and tells the shim of every signal that it gets.

use std::{
    io::{self, Write},
    path::Path,
};

use nix::{
    sys::{
        prctl,
        signal::SigSet,
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::{chdir, chroot},
};

/// What it calls itself, by which the program knows that it is one.
pub(crate) const NAME: &str = "bulkhead-container";
/// The same for lists of processes by their short names (at most 15 bytes, prctl(2)).
const SHORT_NAME: &std::ffi::CStr = c"bulkhead-ctr";
/// Names the directory that it makes its root.
pub(crate) const ROOT_ENV: &str = "BULKHEAD_ROOT";
/// Its first line: it is where it should be.
pub(crate) const READY: &str = "ready";
/// What a line begins with that tells of a signal, by its number.
pub(crate) const SIGNAL: &str = "signal ";

/// Stands until it is killed, or until nobody listens.
pub(super) fn main() -> i32 {
    match stand() {
        Ok(never) => match never {},
        Err(why) => {
            let _ = writeln!(io::stderr(), "{why}");
            1
        }
    }
}

fn stand() -> Result<std::convert::Infallible, String> {
    let root = std::env::var_os(ROOT_ENV).ok_or_else(|| format!("{ROOT_ENV} is not set"))?;
    // Else it is the last word of the link by which it was started.
    let _ = prctl::set_name(SHORT_NAME);
    let signals = SigSet::all();
    signals.thread_block().map_err(|e| format!("block signals: {e}"))?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)
        .map_err(|e| format!("listen for signals: {e}"))?;
    enter(Path::new(&root)).map_err(|e| format!("enter {}: {e}", Path::new(&root).display()))?;
    let tell = |line: &str| writeln!(io::stdout(), "{line}").map_err(|e| format!("tell the shim: {e}"));
    tell(READY)?;
    loop {
        if let Some(signal) = signals.read_signal().map_err(|e| format!("wait for signals: {e}"))? {
            tell(&format!("{SIGNAL}{}", signal.ssi_signo))?;
        }
    }
}

fn enter(root: &Path) -> nix::Result<()> {
    chroot(root)?;
    chdir("/")
}
