//! Why a pod's network is not as it was asked for.
//! Knows words only.

use std::{io, path::PathBuf};

/// Why a pod's network is not as it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The namespace cannot be opened.
    #[error("cannot open the network namespace {}: {source}", path.display())]
    Open {
        /// Where it was looked for.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The host's own namespace.
    #[error(
        "{} is the network namespace of the host: its links cannot be given to a virtual machine", .0.display()
    )]
    Host(PathBuf),
    /// A tap that another machine holds.
    #[error("tap {0} is in use: another machine is in this network namespace")]
    Busy(String),
    /// A link that no network card can stand for.
    #[error("link {name} ({kind}) cannot be passed to a virtual machine: {reason}")]
    Link {
        /// The link.
        name: String,
        /// What it is, in the words of ip-link(8).
        kind: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// The system refused something else.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried, on what.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Adds what was tried to what the system said.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, NetError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, NetError> {
        self.map_err(|e| NetError::System { what: what(), source: e.into() })
    }
}
