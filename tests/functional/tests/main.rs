//! What a user of ctr sees, through a real containerd. Run it with `tests/run functional`.
//!
//! A test is *common* unless its table says `Test::bulkhead` and why: common tests are proven on runc
//! (`BULKHEAD_TEST_RUNTIME=io.containerd.runc.v2`), so that a failure on bulkhead is bulkhead's.

mod badinput;
mod contract;
mod ends;
mod events;
mod exec;
mod io;
mod limits;
mod network;
mod observe;
mod run;
mod security;
mod sockets;
mod task;
mod terminal;
mod userns;

use std::process::ExitCode;

fn main() -> ExitCode {
    let tests = [
        run::TESTS,
        io::TESTS,
        security::TESTS,
        sockets::TESTS,
        limits::TESTS,
        network::TESTS,
        task::TESTS,
        terminal::TESTS,
        userns::TESTS,
        events::TESTS,
        badinput::TESTS,
        ends::TESTS,
        observe::TESTS,
        exec::TESTS,
        contract::TESTS,
    ]
    .concat();
    harness::run_suite("functional", &tests)
}
