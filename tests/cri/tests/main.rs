//! Pods, as a user of crictl sees them, through the CRI of a real containerd. Run it with `tests/run cri`.
//!
//! `BULKHEAD_TEST_HANDLER` chooses the runtime handler: `bulkhead` (pods by the sandbox API),
//! `bulkhead-podsandbox` (with a pause container), or `runc`, which proves the common tests.

mod disks;
mod ends;
mod exec;
mod figures;
mod life;
mod network;
mod pod;
mod refusals;
mod resize;
mod userns;
mod volumes;

use std::process::ExitCode;

fn main() -> ExitCode {
    let tests = [
        life::TESTS,
        pod::TESTS,
        userns::TESTS,
        network::TESTS,
        exec::TESTS,
        figures::TESTS,
        ends::TESTS,
        refusals::TESTS,
        resize::TESTS,
        volumes::TESTS,
        disks::TESTS,
    ]
    .concat();
    harness::run_suite_with_pods("cri", &tests)
}

/// Runs until it is told to end, and then ends well.
const SLEEPER: &str = "trap 'exit 0' TERM; sleep 1000 & wait";
