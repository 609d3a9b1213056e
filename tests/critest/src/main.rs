//! Holds a report of a suite (critest, Kubernetes' e2e.test) on a runtime against that on runc and against the known
//! differences, prints a table, and fails where the three do not agree. Must not know how the suite is run.

mod document;
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
    /// ginkgo's JSON report on runc; several where the suite was run in parts
    #[arg(long, required = true, num_args = 1..)]
    runc: Vec<PathBuf>,
    /// Name of the handler that is held against runc; without it runc's report alone is judged
    #[arg(long, requires = "report")]
    handler: Option<String>,
    /// ginkgo's JSON report on that handler, or several
    #[arg(long, requires = "handler", num_args = 1..)]
    report: Vec<PathBuf>,
    /// The known differences and their reasons
    #[arg(long)]
    known: PathBuf,
    /// A document into which counts and differences are written, between its two markers
    #[arg(long, requires = "report")]
    document: Option<PathBuf>,
    /// What is said there of the run: when it was, and of what
    #[arg(long, default_value = "")]
    about: String,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bulkhead-critest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing was found that is not known.
fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let read =
        |path: &PathBuf| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let report = |paths: &[PathBuf]| {
        let mut specs = report::Specs::new();
        for path in paths {
            let part = report::parse(&read(path)?)
                .with_context(|| format!("{} is no report of ginkgo", path.display()))?;
            specs.extend(part);
        }
        anyhow::Ok(specs)
    };
    let known =
        known::parse(&read(&arguments.known)?).with_context(|| arguments.known.display().to_string())?;
    let runc = report(&arguments.runc)?;
    let other = match &arguments.handler {
        Some(handler) => Some((handler.as_str(), report(&arguments.report)?)),
        None => None,
    };
    let table = table::compare(&runc, other.as_ref().map(|(handler, specs)| (*handler, specs)), &known);
    print!("{table}");
    if let Some(path) = &arguments.document {
        let text = document::with_results(&read(path)?, &arguments.about, &table)
            .with_context(|| format!("{} cannot take the results", path.display()))?;
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(table.is_as_known())
}
