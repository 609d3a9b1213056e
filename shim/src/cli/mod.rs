//! The operator's command `bulkhead`: its arguments, and one module for each of its subcommands.
//! Re-implements nothing: it reads what the shims have written down and asks the programs themselves.

mod check;
mod collect;
mod containerd;
mod exec;
mod generate;
mod install;
mod logs;
mod metrics;
mod output;
mod pods;
mod process;
mod ps;
mod version;

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::config::PATH_VARIABLE;
use output::Format;

/// Runs each pod of containerd in its own virtual machine: the operator's command
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version, disable_help_subcommand = true)]
struct Cli {
    /// Configuration file [default: /etc/bulkhead/config.toml, or built-in defaults]
    #[arg(short, long, global = true, value_name = "FILE", env = PATH_VARIABLE, hide_env_values = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say whether this machine can run pods, one fact a line; exits with 1 if anything failed
    Check(check::Arguments),
    /// List the pods that run on this machine
    Ps(Report),
    /// Print the figures of the pods on this machine, for Prometheus
    Metrics(metrics::Arguments),
    /// Print the last lines of a pod's shim and of its guest's console
    Logs(logs::Arguments),
    /// Run a program in the guest of a pod itself, where the configuration allows it
    Exec(exec::Arguments),
    /// Put all that a report of a fault needs into one archive
    Collect(collect::Arguments),
    /// Put bulkhead into place on this node and register it with containerd
    Install(install::Install),
    /// Take back what `bulkhead install` did on this node
    Uninstall(install::Uninstall),
    /// Print the versions of bulkhead and of what it works with
    Version(Report),
    /// Print a completion script for a shell
    Completions {
        /// The shell that will read the script
        shell: Shell,
    },
    /// Write the manual pages
    Man {
        /// Directory to write them to; it is made if it does not exist
        directory: PathBuf,
    },
}

/// The options of every subcommand that reports.
#[derive(Clone, Copy, Debug, Args)]
struct Report {
    /// How to print the answer
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t)]
    output: Format,
}

/// Runs the command with the arguments of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.run() {
        Ok(code) => code,
        // Whoever read us has seen enough, as `bulkhead ps | head -1` does.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
    })
}

impl Cli {
    fn run(self) -> anyhow::Result<ExitCode> {
        let out = &mut io::stdout().lock();
        match self.command {
            Command::Check(arguments) => return check::run(&arguments, self.config.as_deref(), out),
            Command::Ps(report) => ps::run(report, self.config.as_deref(), out)?,
            Command::Metrics(arguments) => metrics::run(&arguments, self.config.as_deref(), out)?,
            Command::Logs(arguments) => logs::run(&arguments, self.config.as_deref(), out)?,
            Command::Exec(arguments) => return Ok(exec::run(&arguments, self.config.as_deref())),
            Command::Collect(arguments) => collect::run(&arguments, self.config.as_deref(), out)?,
            Command::Install(arguments) => install::install(&arguments, self.config.as_deref(), out)?,
            Command::Uninstall(arguments) => install::uninstall(&arguments, self.config.as_deref(), out)?,
            Command::Version(report) => version::run(report, self.config.as_deref(), out)?,
            Command::Completions { shell } => generate::completions(shell, Self::command(), out)?,
            Command::Man { directory } => generate::man(Self::command(), &directory)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_subcommand_that_reports_takes_a_format() {
        for name in ["check", "ps", "version"] {
            for format in ["table", "json"] {
                assert!(
                    Cli::try_parse_from(["bulkhead", name, "--output", format]).is_ok(),
                    "{name} {format}"
                );
            }
            assert!(Cli::try_parse_from(["bulkhead", name, "-o", "yaml"]).is_err());
        }
    }

    #[test]
    fn the_configuration_can_be_named_before_and_after_the_subcommand() {
        for arguments in [["bulkhead", "-c", "/a", "ps"], ["bulkhead", "ps", "--config", "/a"]] {
            assert_eq!(Cli::try_parse_from(arguments).unwrap().config, Some("/a".into()));
        }
    }
}
