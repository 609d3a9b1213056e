//! containerd shim v2 that runs each pod in a virtual machine, and the operator's command.

pub mod cli;
pub mod config;
