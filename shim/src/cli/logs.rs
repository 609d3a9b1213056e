//! `bulkhead logs`: the last lines of a pod's shim and of its guest's console, as the shim has kept them.
//! Reads files; a pod whose shim was killed still has them until it is taken back.

use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::Context;
use clap::{Args, ValueEnum};

use super::pods;
use crate::config::Config;
use crate::kept::{self, CAPACITY, CONSOLE_LOG, SHIM_LOG};

/// Whose lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Part {
    /// What the shim has said
    Shim,
    /// What the guest's kernel and agent have written to the console
    Console,
}

impl Part {
    pub(super) const ALL: [Part; 2] = [Part::Shim, Part::Console];

    pub(super) fn file(self) -> &'static str {
        match self {
            Part::Shim => SHIM_LOG,
            Part::Console => CONSOLE_LOG,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Part::Shim => "shim",
            Part::Console => "console of the guest",
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The pod: its id, NAMESPACE/ID, or the beginning of an id
    pod: String,
    /// These lines alone, without a heading [default: all]
    #[arg(short, long, value_enum)]
    part: Option<Part>,
}

pub(super) fn run(arguments: &Arguments, config: Option<&Path>, out: &mut dyn Write) -> anyhow::Result<()> {
    let (pods, _) = pods::find(&Config::load(config)?.state_dir)?;
    let pod = pods::choose(pods, &arguments.pod)?;
    if let Some(part) = arguments.part {
        return Ok(out.write_all(lines(&pod.dir, part)?.0.as_bytes())?);
    }
    for part in Part::ALL {
        let (lines, cut) = lines(&pod.dir, part)?;
        let bound = if cut { format!(" (the last {} KiB)", CAPACITY >> 10) } else { String::new() };
        writeln!(out, "== {}{bound}", part.title())?;
        out.write_all(lines.as_bytes())?;
    }
    Ok(())
}

/// What is kept, and whether older lines have gone. A log that does not exist yet is empty.
pub(super) fn lines(dir: &Path, part: Part) -> anyhow::Result<(String, bool)> {
    let path = dir.join(part.file());
    match kept::read(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound && dir.exists() => Ok(Default::default()),
        other => other.with_context(|| format!("cannot read {}", path.display())),
    }
}
