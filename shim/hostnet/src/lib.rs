//! The host's side of a pod's network: its namespace, the links in it, taps, and what joins them.
//! Knows the host's kernel; knows nothing of machines, guests and containers. All of it blocks for a moment.
//!
//! ```text
//!   network namespace of the pod                                  machine
//!  ┌──────────────────────────────────────────────────┐
//!  │  eth0 ──ingress: mirred redirect──▶ lobhtap0 ────│──fd──▶ network card
//!  │   ▲                                   │          │
//!  │   └──────redirect mirred :ingress─────┘          │
//!  └──────────────────────────────────────────────────┘
//! ```
//! * A link stays what it is and keeps its addresses: whatever it is made of, frames go in and out by its own
//!   transmit and receive paths, and its counters stay true. Only what it receives no longer reaches the
//!   namespace's own stack.
//! * A tap belongs to the process that holds its descriptor, and goes with it. On the link stays a rule, and
//!   perhaps the queueing discipline that we made for it: an [`Undo`] says how to take them back.
//! * This crate is the only one that enters network namespaces: on a thread that does so and ends.

mod bpf;
mod error;
mod forward;
mod join;
mod netns;
mod scan;
mod sys;

pub use bpf::Attached;
pub use error::NetError;
pub use forward::Forwarder;
pub use join::{Undo, join, undo};
pub use netns::Netns;
pub use scan::{Link, Network};
pub use sys::open_tap;

/// What the names of our taps begin with, in the pod's network namespace. Those who look for a container's own
/// links there and add up what they have carried pass over names that begin with `lo` (nerdctl, cAdvisor): a tap
/// carries what its link has carried once more.
pub const TAP: &str = "lobhtap";
