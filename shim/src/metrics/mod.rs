//! The figures of one pod as Prometheus reads them: what is counted, how it is written, where it is asked for.
//! Does not know how a figure comes about: that is its owner's.

pub mod counters;
pub mod families;
pub mod figures;
pub mod http;
pub mod text;

/// The socket in a sandbox's directory at which its figures are told.
pub const SOCKET: &str = "metrics.sock";
