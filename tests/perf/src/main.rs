//! Measures times and memory of pods beside runc's. Asserts nothing: a missed target is a line of the table, not an
//! error.

mod cluster;
mod containers;
mod ctr;
mod files;
mod host;
mod memory;
mod pods;
mod report;
mod rounds;
mod stats;
mod timeline;

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

#[derive(Debug, Parser)]
#[command(about, disable_version_flag = true)]
enum What {
    /// Containers of ctr and pods of CRI, through one containerd
    Containers(containers::Arguments),
    /// Pods of a Kubernetes
    Cluster(cluster::Arguments),
}

fn main() -> ExitCode {
    let what = What::parse();
    let measured = async {
        match &what {
            What::Containers(arguments) => containers::run(arguments).await,
            What::Cluster(arguments) => cluster::run(arguments).await,
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.context("cannot start").and_then(|runtime| runtime.block_on(measured)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
