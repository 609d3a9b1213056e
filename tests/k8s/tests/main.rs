//! Pods of a Kubernetes, as a user of kubectl sees them, by the manifests of docs/examples. Run it with `tests/run k8s`.
//!
//! `BULKHEAD_TEST_HANDLER=runc` proves the common tests.

mod configuration;
mod installer;
mod life;
mod network;
mod policies;
mod reach;
mod refusals;
mod resources;
mod restarts;
mod security;
mod volumes;
mod work;

use std::process::ExitCode;

fn main() -> ExitCode {
    let tests = [
        network::TESTS,
        reach::TESTS,
        life::TESTS,
        work::TESTS,
        configuration::TESTS,
        volumes::TESTS,
        security::TESTS,
        resources::TESTS,
        policies::TESTS,
        restarts::TESTS,
        refusals::TESTS,
        installer::TESTS,
    ]
    .concat();
    harness::run_suite_with_cluster("k8s", &tests)
}

/// The kernel of the machine on which the nodes are.
fn host_kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}
