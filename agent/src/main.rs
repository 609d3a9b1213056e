//! PID 1 of the guest: makes the machine a sandbox and runs the containers of one pod in it.
//! Knows the guest and the conversation of `bulkhead-proto`; must not know what a host is.
//!
//! ```text
//! kernel -> boot (mounts, cgroups, lo) -> fork launcher -> runtime -> dial host -> hello -> other devices -> serve
//! ```
//! The agent ends the machine when the host is gone. A panic outside of a task ends PID 1, which the kernel
//! reports on the console before it ends the machine: nothing ends silently.

mod boot;
mod cgroup;
mod configure;
mod devices;
mod disks;
mod error;
mod events;
mod forward;
mod host;
mod launcher;
mod limits;
mod log;
mod machine;
mod memory;
mod net;
mod netns;
mod podns;
mod reaper;
mod sandbox;
mod server;
mod sockets;
mod spec;
mod stats;
mod stdio;
mod sys;
mod users;
mod volumes;

use std::process::ExitCode;

use anyhow::Context;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("--version") {
        println!("bulkhead-agent {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    if std::process::id() != 1 {
        eprintln!("bulkhead-agent: runs as PID 1 of a guest only, here it has pid {}", std::process::id());
        return ExitCode::from(2);
    }
    if let Err(e) = run() {
        // The console is all there is; the host reads it.
        eprintln!("bulkhead-agent: {e:#}");
    }
    boot::end_machine()
}

/// Everything between the kernel's first instruction for us and the loss of the host.
fn run() -> anyhow::Result<()> {
    boot::prepare().context("prepare the guest")?;
    log::init(&boot::cmdline());
    // Before any thread or runtime: a fork of a process with threads may inherit a lock that nobody releases.
    let zygote = launcher::Zygote::fork().context("fork the launcher")?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(server::run(zygote))
}
