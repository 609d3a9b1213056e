//! containerd shim v2 that runs each pod in a virtual machine, and the operator's command.

#[macro_use]
mod failpoint;

pub mod cgroup;
pub mod cli;
pub mod config;
pub mod entry;
pub mod error;
pub mod events;
pub mod guest;
pub mod guest_exec;
pub mod hooks;
pub mod ids;
pub mod kept;
pub mod ledger;
pub mod log;
pub mod logger;
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

/// Every place where a step can be made to fail: its name, what can happen there, and the ways of making a pod that
/// pass it.
#[cfg(feature = "failpoints")]
pub fn failpoints() -> String {
    failpoint::list()
}
