//! The one kind of error that leaves the shim, and its mapping to ttrpc codes.
//! Knows no module's own errors beyond that they can be printed with their causes.

use std::fmt;

use containerd_shim_protos::ttrpc;

/// What sort of failure a caller must tell apart; the names are those of gRPC's codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// There is no such container or process (any more).
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// Right request, wrong moment.
    FailedPrecondition,
    /// The request can never work as it is.
    InvalidArgument,
    /// Not offered.
    Unimplemented,
    /// The guest or the machine is gone.
    Unavailable,
    /// The guest did not answer in time.
    DeadlineExceeded,
    /// Anything else.
    Internal,
}

impl Kind {
    /// Its name in figures, as gRPC spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::NotFound => "not_found",
            Kind::AlreadyExists => "already_exists",
            Kind::FailedPrecondition => "failed_precondition",
            Kind::InvalidArgument => "invalid_argument",
            Kind::Unimplemented => "unimplemented",
            Kind::Unavailable => "unavailable",
            Kind::DeadlineExceeded => "deadline_exceeded",
            // What it is on the wire.
            Kind::Internal => "unknown",
        }
    }
}

/// A failure on its way to whoever asked: one line that says what failed, on what, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The sort of failure.
    pub kind: Kind,
    /// What is shown.
    pub message: String,
}

impl Fault {
    /// A fault with a message of its own.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The fault of `error`, its causes appended once each.
    pub fn of(kind: Kind, error: &(dyn std::error::Error + 'static)) -> Self {
        Self { kind, message: chain(error) }
    }

    /// An internal fault of `error`, preceded by what was being done.
    pub fn internal(doing: &str, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(Kind::Internal, format!("{doing}: {}", chain(error)))
    }

    /// The same fault, preceded by what was being done.
    pub fn while_doing(self, doing: &str) -> Self {
        Self { kind: self.kind, message: format!("{doing}: {}", self.message) }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

/// `error` and its causes on one line. A cause whose text the line already ends with is not repeated:
/// many libraries print their cause themselves.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let text = next.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = next.source();
    }
    line
}

impl From<Fault> for ttrpc::Error {
    fn from(fault: Fault) -> Self {
        let code = match fault.kind {
            Kind::NotFound => ttrpc::Code::NOT_FOUND,
            Kind::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
            Kind::FailedPrecondition => ttrpc::Code::FAILED_PRECONDITION,
            Kind::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
            Kind::Unimplemented => ttrpc::Code::UNIMPLEMENTED,
            Kind::Unavailable => ttrpc::Code::UNAVAILABLE,
            Kind::DeadlineExceeded => ttrpc::Code::DEADLINE_EXCEEDED,
            Kind::Internal => ttrpc::Code::UNKNOWN,
        };
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, fault.message))
    }
}

/// What ttrpc's client says when its own clock was the first to say that a call took too long.
const LATE: [&str; 3] = ["timeout", "timed out", "Request deadline elapsed"];

/// The fault behind an error of a ttrpc call to the agent: its own status, or that it is gone.
pub fn from_guest(error: ttrpc::Error) -> Fault {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            let kind = match status.code() {
                ttrpc::Code::NOT_FOUND => Kind::NotFound,
                ttrpc::Code::ALREADY_EXISTS => Kind::AlreadyExists,
                ttrpc::Code::FAILED_PRECONDITION => Kind::FailedPrecondition,
                ttrpc::Code::INVALID_ARGUMENT => Kind::InvalidArgument,
                ttrpc::Code::UNIMPLEMENTED => Kind::Unimplemented,
                ttrpc::Code::DEADLINE_EXCEEDED => Kind::DeadlineExceeded,
                _ => Kind::Internal,
            };
            Fault::new(kind, status.message)
        }
        // `context deadline` of the client itself arrives as a plain text.
        ttrpc::Error::Others(text) if LATE.iter().any(|words| text.contains(words)) => {
            Fault::new(Kind::DeadlineExceeded, "the guest did not answer in time")
        }
        other => Fault::new(Kind::Unavailable, format!("the guest cannot be reached: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] Inner);
    #[derive(Debug, thiserror::Error)]
    #[error("inner")]
    struct Inner;
    #[derive(Debug, thiserror::Error)]
    #[error("says inner")]
    struct Prints(#[source] Inner);

    #[test]
    fn a_call_that_took_too_long_is_told_as_that() {
        let late = ttrpc::Error::Others("Request deadline elapsed".into());
        assert_eq!(from_guest(late).kind, Kind::DeadlineExceeded);
        assert_eq!(from_guest(ttrpc::Error::Eof).kind, Kind::Unavailable);
    }

    #[test]
    fn a_cause_is_printed_once() {
        assert_eq!(chain(&Outer(Inner)), "outer: inner");
        assert_eq!(chain(&Prints(Inner)), "says inner");
    }
}
