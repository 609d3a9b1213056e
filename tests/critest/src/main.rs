//! Holds a report of critest on a runtime against that on runc and against the known differences, prints a
//! table, and fails where the three do not agree. Must not know how critest is run.

mod known;
mod report;
mod table;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

#[derive(Debug, Parser)]
#[command(about, disable_version_flag = true)]
struct Arguments {
    /// ginkgo's JSON report on runc
    #[arg(long)]
    runc: PathBuf,
    /// Name of the handler that is held against runc; without it runc's report alone is judged
    #[arg(long, requires = "report")]
    handler: Option<String>,
    /// ginkgo's JSON report on that handler
    #[arg(long, requires = "handler")]
    report: Option<PathBuf>,
    /// The known differences and their reasons
    #[arg(long)]
    known: PathBuf,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("critest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing was found that is not known.
fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let read =
        |path: &PathBuf| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let report = |path: &PathBuf| {
        report::parse(&read(path)?).with_context(|| format!("{} is no report of ginkgo", path.display()))
    };
    let known =
        known::parse(&read(&arguments.known)?).with_context(|| arguments.known.display().to_string())?;
    let runc = report(&arguments.runc)?;
    let other = match (&arguments.handler, &arguments.report) {
        (Some(handler), Some(path)) => Some((handler.as_str(), report(path)?)),
        _ => None,
    };
    let table = table::compare(&runc, other.as_ref().map(|(handler, specs)| (*handler, specs)), &known);
    print!("{table}");
    Ok(table.is_as_known())
}
