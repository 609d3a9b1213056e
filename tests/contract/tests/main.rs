//! containerd's shim v2 contract, statement by statement, against the shim's binary: the test plays
//! containerd. Run it with `tests/run contract`.
//!
//! A test's name begins with the number of its statement in docs/containerd-contract.md (N: names, S: start, D: delete, I: info,
//! T: tasks, E: events, L: log, M: mounts); statements about
//! containerd's own side (N3-N5, S5, D3, T2, T5, L3 ...) have none, or are seen in the functional suite.

mod delete;
mod events;
mod fake;
mod logs;
mod start;
mod task;

use std::process::ExitCode;

fn main() -> ExitCode {
    let tests = [start::TESTS, delete::TESTS, task::TESTS, events::TESTS, logs::TESTS].concat();
    harness::run_suite_without_containerd("contract", &tests)
}
