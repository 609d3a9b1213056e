//! Runs a private containerd for a test, drives it with `ctr`, and finds what a test left behind.
//! Knows containerd and the host; of bulkhead only the names of its programs, its state directory and what it
//! tells of itself.
//!
//! Each worker thread of a suite has a mount namespace, a network namespace, a `/run` and a containerd of
//! its own ([`Node`]), so two tests can run at once and each leak is the fault of exactly one of them.

mod cluster;
mod command;
mod context;
mod cri;
mod events;
mod failpoint;
mod figures;
mod image;
mod isolate;
mod leak;
mod nerdctl;
mod node;
mod pace;
mod parts;
mod pty;
mod runner;
mod settings;
mod spec;
mod watch;

pub use cluster::NODES;
pub use command::{Exit, Output, Proc, Run, signal_process, wait_for_exit};
pub use context::Context;
pub use cri::{BY_PATH, BY_PATH_AND_API, OPTIONS_MEMORY_MIB, Pod, WITH_OPTIONS, WITH_OPTIONS_AND_API};
pub use events::{Event, Events};
pub use figures::Figures;
pub use image::IMAGE;
pub use leak::{ProcessInfo, Snapshot};
pub use node::Node;
pub use pace::stretched;
pub use parts::Part;
pub use pty::Pty;
pub use runner::{
    Scope, Test, run_suite, run_suite_with_cluster, run_suite_with_nerdctl, run_suite_with_pods,
    run_suite_without_containerd,
};
pub use settings::{Runtime, Settings};
/// The shim's configuration.
pub use toml::Table as TomlTable;
/// A value of the shim's configuration.
pub use toml::Value as Toml;
pub use watch::Watcher;
