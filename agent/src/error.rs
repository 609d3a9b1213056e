//! Why a request of the host was not done, and the one place that maps the reasons to ttrpc codes.
//! Knows no request in particular.

use std::io;

use ttrpc::{Code, get_status};

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The named thing is not there (any more).
    #[error("{0}")]
    NotFound(String),
    /// The named thing is there already.
    #[error("{0}")]
    Exists(String),
    /// Not in this state.
    #[error("{0}")]
    State(String),
    /// The request asks for something that is malformed or that the guest cannot honour.
    #[error("{0}")]
    Invalid(String),
    /// libcontainer's or the container's own refusal, in full.
    #[error("{0}")]
    Launch(String),
    /// An operation of the guest failed.
    #[error("{verb}: {source}")]
    Io {
        /// What was tried, on what.
        verb: String,
        /// What the kernel said.
        source: io::Error,
    },
}

pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn no_container(id: &str) -> Self {
        Self::NotFound(format!("container {id} is not in this sandbox"))
    }

    pub(crate) fn no_process(id: &str, exec: &str) -> Self {
        match exec {
            "" => Self::NotFound(format!("container {id}: its process has ended")),
            exec => Self::NotFound(format!("container {id}: process {exec} is not running")),
        }
    }
}

/// Adds what was tried to what the kernel said.
pub(crate) trait Doing<T> {
    fn doing(self, verb: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, verb: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::Io { verb: verb(), source: e.into() })
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::Exists(_) => Code::ALREADY_EXISTS,
            Error::State(_) => Code::FAILED_PRECONDITION,
            Error::Invalid(_) => Code::INVALID_ARGUMENT,
            Error::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut => Code::DEADLINE_EXCEEDED,
            Error::Launch(_) | Error::Io { .. } => Code::INTERNAL,
        };
        Self::RpcStatus(get_status(code, error))
    }
}
