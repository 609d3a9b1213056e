//! What lives in the machine, as the host sees it.
//! Knows the protocol with the guest; does not know how the machine runs.

mod agent;

pub use agent::{Agent, Files, GuestError, GuestEvents, listen};
