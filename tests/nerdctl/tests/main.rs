//! Containers, as a user of nerdctl sees them, through a real containerd. Run it with `tests/run nerdctl`.
//!
//! `BULKHEAD_TEST_RUNTIME=io.containerd.runc.v2` proves the common tests.

mod files;
mod life;
mod network;
mod refusals;
mod run;

use std::process::ExitCode;

fn main() -> ExitCode {
    let tests = [run::TESTS, life::TESTS, files::TESTS, network::TESTS, refusals::TESTS].concat();
    harness::run_suite_with_nerdctl("nerdctl", &tests)
}

/// Runs until it is told to end, and then ends well.
const SLEEPER: &str = "trap 'exit 0' TERM; sleep 1000 & wait";
