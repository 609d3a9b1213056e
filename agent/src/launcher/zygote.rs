//! The process that is forked before the agent has a runtime, and that forks a worker for each request.
//! Knows fork and descriptors; what a worker does is its own affair.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process,
};

use nix::unistd::ForkResult;

use super::{wire, worker};

/// Serves until the agent closes its end.
pub(super) fn serve(agent: OwnedFd) -> ! {
    crate::sys::set_name(c"bulkhead-zygote");
    // Without the launcher no container can be ended in order, so memory is to be found elsewhere.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    // The workers' answers come by their sockets; nobody asks for their exit statuses.
    crate::sys::ignore_children();
    loop {
        match wire::recv_fds(agent.as_fd()) {
            Ok(Some(fds)) => hand_over(fds),
            Ok(None) => process::exit(0),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => {
                tracing::error!("launcher: receive a request: {e}");
                process::exit(1)
            }
        }
    }
}

/// Forks a worker for the socket in `fds`. If that fails, the agent sees the socket close.
fn hand_over(fds: Vec<OwnedFd>) {
    let mut fds = fds.into_iter();
    let Some(socket) = fds.next() else { return };
    match crate::sys::fork_single_threaded() {
        Ok(ForkResult::Parent { .. }) => {}
        Ok(ForkResult::Child) => {
            crate::sys::reset_signals();
            crate::sys::set_name(c"bulkhead-worker");
            let _ = std::fs::write("/proc/self/oom_score_adj", "0");
            worker::serve(UnixStream::from(socket), fds.collect());
            process::exit(0)
        }
        Err(e) => tracing::error!("launcher: fork a worker: {e}"),
    }
}
