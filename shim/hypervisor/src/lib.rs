//! Starts, watches and ends virtual machines through one of several backends.
//! Knows programs, sockets and processes of the host; knows nothing of containers or containerd.
//!
//! # Design
//! A machine is a small family of processes: the VMM itself and the helper programs behind its
//! devices. Every member is a [`child::Child`]: it dies with the shim (`PR_SET_PDEATHSIG`), its
//! output is kept as lines, its death is an event on a pidfd, and nobody else reaps it.
//!
//! ```text
//!            launch                         first death of any part
//! (nothing) ────────▶ Machine (running) ───────────────────────────▶ MachineEnd
//!      │                    │ kill                                       │ kill
//!      ▼ LaunchError        ▼                                            ▼
//!   every part ended and reaped; the sockets that the parts made are gone
//! ```
//!
//! * [`Hypervisor::launch`] answers when the VMM runs, not when the guest does: the guest says so
//!   itself by dialling the host. A caller waits for that dial **and** for [`Machine::ended`].
//! * An early death is an error that names the program, how it ended and its last words.
//! * Each process is told to the [`Journal`] before anything depends on it, so that a later process
//!   can end what this one left behind. Should the shim die between making a process and recording
//!   it, the kernel ends the process.
//! * Nothing here polls or sleeps: waits are on pidfds, sockets and inotify, with deadlines.
//!
//! # What the caller must uphold
//! * `PR_SET_PDEATHSIG` is bound to the *thread* that makes the child. Launch from a thread that
//!   lives as long as the process: the main thread of a `current_thread` runtime.
//! * Nothing else in the process may reap unknown children (`waitpid(-1)`), or the exit status of a
//!   part is lost (it is then reported as [`Exit::Unknown`], never as success).
//! * `Drop` of a machine or a child ends it with SIGKILL; [`Machine::kill`] is the orderly form.

pub mod builtin;
pub mod child;
mod error;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
mod family;
mod helper;
mod machine;
mod network;
pub mod probe;
pub mod qemu;
pub mod share;
mod socket;
mod sys;
#[cfg(test)]
mod testing;
mod words;

pub use child::Exit;
pub use error::LaunchError;
pub use machine::{
    Ask, Counts, Drive, Drives, Growth, Hypervisor, Journal, Machine, MachineEnd, Meter, Processors,
};
