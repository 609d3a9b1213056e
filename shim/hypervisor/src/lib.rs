//! Starts, watches and ends virtual machines through one of several backends.

pub mod probe;
