//! Why a machine could not be launched.
//! Knows words only: what failed, on what, and what to do.

use std::{io, path::PathBuf, time::Duration};

use bulkhead_vmm_spec::SizeMib;

use crate::Exit;

/// Why a machine could not be launched. Nothing of it is left then.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Less memory than a guest can boot with.
    #[error(
        "a machine needs at least {} MiB of memory to boot, {} MiB were asked for: raise the memory limit or the guest's reserve",
        minimum.0, asked.0
    )]
    MemoryTooSmall {
        /// What was asked for.
        asked: SizeMib,
        /// What the smallest guest needs.
        minimum: SizeMib,
    },
    /// A shape or bindings that the backend cannot make.
    #[error("{what} is not possible: {reason}")]
    Impossible {
        /// Which part of the request.
        what: String,
        /// Why, and what is possible.
        reason: String,
    },
    /// A file that the machine needs cannot be used.
    #[error("cannot open {what} {}: {source}", path.display())]
    File {
        /// Its role: "kernel", "initrd", "share", "block device".
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// /dev/kvm cannot be used.
    #[error("cannot open /dev/kvm: {source}{}", kvm_hint(source))]
    Kvm {
        /// What the system said.
        source: io::Error,
    },
    /// A program that does not start.
    #[error("cannot execute {name} at {}: {source}{}", path.display(), install_hint(source))]
    Program {
        /// What it is for the machine.
        name: String,
        /// Where it was looked for.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program that ended while the machine was being put together.
    #[error("{name} ({}) {exit} before {awaited}{}", path.display(), said(messages))]
    Ended {
        /// What it is for the machine.
        name: String,
        /// The program.
        path: PathBuf,
        /// Its exit status.
        exit: Exit,
        /// What it should have done first.
        awaited: String,
        /// Its last lines on standard error.
        messages: Vec<String>,
    },
    /// A program that did not do in time what it should.
    #[error("{name} ({}) did not get to {awaited} within {waited:?}{}", path.display(), said(messages))]
    Late {
        /// What it is for the machine.
        name: String,
        /// The program.
        path: PathBuf,
        /// What it should have done.
        awaited: String,
        /// For how long we waited.
        waited: Duration,
        /// Its last lines on standard error.
        messages: Vec<String>,
    },
    /// A program whose version cannot be told.
    #[error("{name} ({}) names no version we can read in {found:?}", path.display())]
    Version {
        /// What it is for the machine.
        name: String,
        /// The program.
        path: PathBuf,
        /// The first line that it printed.
        found: String,
    },
    /// The journal refused a process, which was ended for that.
    #[error("cannot record process {pid} of {name}: {source}")]
    Journal {
        /// What the process is for the machine.
        name: String,
        /// Its pid.
        pid: i32,
        /// What the journal said.
        source: io::Error,
    },
    /// The system refused something else.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried, with its object.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

impl LaunchError {
    pub(crate) fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { what: what.into(), source: source.into() }
    }
}

fn said(messages: &[String]) -> String {
    if messages.is_empty() { String::new() } else { format!("; it said: {}", messages.join(" | ")) }
}

fn kvm_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => {
            ": this host does not virtualise, or the module kvm_intel or kvm_amd is not loaded; \
             backend \"emulation\" works everywhere"
        }
        io::ErrorKind::PermissionDenied => {
            ": the shim must run as root, outside of a container that forbids it"
        }
        _ => "",
    }
}

fn install_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => ": install it, or name its path in the configuration",
        _ => "",
    }
}
