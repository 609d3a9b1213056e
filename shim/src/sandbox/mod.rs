//! One sandbox: the machine and the containers in it.
//! `state` decides, `driver` carries out; nothing else changes what a sandbox is.
//!
//! ```text
//!  task service ──Request──▶ ┌────────┐ ──Effect──▶ host   (jobs: machine, guest, files)
//!  host, stdio  ──Input────▶ │ driver │ ──Event───▶ events (one ordered queue)
//!                            └─state──┘ ──Reply───▶ task service
//! ```

pub mod driver;
mod forward;
pub mod host;
mod machine;
pub mod model;
mod network;
mod sockets;
mod stand_in;
pub mod state;
