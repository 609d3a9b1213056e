//! One sandbox: the machine and the containers in it.
//! `state` decides, `driver` carries out; nothing else changes what a sandbox is.

pub mod model;
pub mod state;
