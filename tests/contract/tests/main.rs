//! containerd's shim v2 contract, statement by statement, against the shim's binary: the test plays
//! containerd. Run it with `tests/run contract`.
//!
//! A test's name begins with the number of its statement in docs/containerd-contract.md (N: names, S: start,
//! D: delete, I: info, T: tasks, E: events, L: log, M: mounts). What is containerd's own side (N2, N3, S5, D3) is seen
//! in the functional suite, N4 and T5 in that of pods.

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
