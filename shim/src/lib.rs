//! containerd shim v2 that runs each pod in a virtual machine, and the operator's command.

pub mod cgroup;
pub mod cli;
pub mod config;
pub mod entry;
pub mod error;
pub mod events;
pub mod guest;
pub mod ids;
pub mod kept;
pub mod ledger;
pub mod log;
pub mod metrics;
pub mod plan;
pub mod process;
pub mod sandbox;
pub mod sandbox_api;
pub mod stats;
pub mod stdio;
pub mod storage;
pub mod task;
pub mod tasks;
pub mod trace;
