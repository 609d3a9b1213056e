//! `bulkhead check`: whether this machine can run pods, as facts with a verdict and what to do.
//! Changes nothing on the machine.

mod containerd;
mod host;
mod parts;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bulkhead_hypervisor::probe;
use clap::Args;
use serde::Serialize;

use super::Report;
use super::output::{self, Colour, Format};
use crate::config::{Config, ConfigError, Source};

pub(super) use host::release as host_kernel;
pub(super) use parts::{kernel_release, version_of};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    report: Report,
    #[command(flatten)]
    containerd: Containerd,
}

/// Which containerd is meant.
#[derive(Debug, Args)]
pub(super) struct Containerd {
    /// Socket of the containerd to look at
    #[arg(
        short,
        long,
        value_name = "SOCKET",
        env = "CONTAINERD_ADDRESS",
        hide_env_values = true,
        default_value = "/run/containerd/containerd.sock"
    )]
    address: PathBuf,
}

/// The verdict on a fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    /// Pods run, but not as well as they could, or not for everyone.
    Warning,
    /// No pod runs.
    Failure,
}

impl Status {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failure => "failure",
        }
    }
}

/// Something about this machine.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Fact {
    name: &'static str,
    status: Status,
    detail: String,
    /// What to do about it, where there is something to do.
    remedy: Option<String>,
}

impl Fact {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, detail: detail.into(), remedy: None }
    }

    fn warning(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Warning, detail: detail.into(), remedy: Some(remedy.into()) }
    }

    fn failure(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Failure, detail: detail.into(), remedy: Some(remedy.into()) }
    }

    /// A part that the configuration names and that cannot be used.
    fn misconfigured(name: &'static str, error: &ConfigError) -> Self {
        match error {
            ConfigError::Program { program, key, reason, advice } => {
                Self::failure(name, format!("{program} (key `{key}`) {reason}"), advice)
            }
            ConfigError::GuestFile { path, key, reason, advice } => {
                Self::failure(name, format!("{} (key `{key}`) {reason}", path.display()), advice)
            }
            other => Self { name, status: Status::Failure, detail: other.to_string(), remedy: None },
        }
    }
}

#[derive(Serialize)]
pub(super) struct Answer {
    status: Status,
    facts: Vec<Fact>,
}

impl Containerd {
    /// Its socket, as it was named.
    pub(super) fn address(&self) -> &Path {
        &self.address
    }

    /// All facts, and the worst verdict among them.
    pub(super) fn answer(&self, source: &Source) -> Answer {
        let facts = facts(source, &self.address);
        let status = facts.iter().map(|fact| fact.status).max().unwrap_or(Status::Ok);
        Answer { status, facts }
    }
}

pub(super) fn run(
    arguments: &Arguments,
    config: Option<&Path>,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let answer = arguments.containerd.answer(&Source::find(config));
    match arguments.report.output {
        Format::Json => output::json(out, &answer)?,
        Format::Table => table(out, &answer.facts)?,
    }
    Ok(if answer.status == Status::Failure { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn facts(source: &Source, address: &Path) -> Vec<Fact> {
    let (fact, config) = configuration(source);
    let acceleration = probe::acceleration();
    let mut facts = vec![fact, host::privileges(), host::processor(), host::kvm(&acceleration)];
    facts.push(host::backend(config.hypervisor.backend, &acceleration));
    facts.extend(parts::facts(&config));
    facts.extend(containerd::facts(address));
    facts.push(host::cgroups());
    facts.push(host::kernel());
    facts.push(host::memory(&config));
    facts.push(host::huge_pages());
    facts.push(host::state_dir(&config.state_dir));
    facts
}

/// The configuration; where it cannot be read, the other facts are found out with the defaults.
fn configuration(source: &Source) -> (Fact, Config) {
    const NAME: &str = "configuration";
    let detail = match source {
        Source::BuiltIn => "built-in defaults (no file names others)".to_owned(),
        Source::Explicit(path) | Source::Environment(path) | Source::Default(path) => {
            path.display().to_string()
        }
    };
    match Config::load_from(source) {
        Ok(config) => (Fact::ok(NAME, detail), config),
        Err(error) => {
            let mut detail = error.to_string();
            if let Some(cause) = std::error::Error::source(&error) {
                detail.push_str(&format!(": {cause}"));
            }
            let remedy = "correct it; what follows is found out with the defaults";
            (Fact::failure(NAME, detail, remedy), Config::default())
        }
    }
}

fn table(out: &mut dyn Write, facts: &[Fact]) -> std::io::Result<()> {
    let width = facts.iter().map(|fact| fact.name.len()).max().unwrap_or(0);
    for fact in facts {
        let colour = match fact.status {
            Status::Ok => Colour::Green,
            Status::Warning => Colour::Yellow,
            Status::Failure => Colour::Red,
        };
        let status = output::coloured(&format!("{:7}", fact.status.as_str()), colour);
        let remedy = fact.remedy.as_ref().map(|remedy| format!(" -> {remedy}")).unwrap_or_default();
        writeln!(out, "{status}  {:width$}  {}{remedy}", fact.name, fact.detail)?;
    }
    let count = |status| facts.iter().filter(|fact| fact.status == status).count();
    let (warnings, failures) = (count(Status::Warning), count(Status::Failure));
    let verdict = if failures == 0 { "pods can run here" } else { "pods cannot run here yet" };
    writeln!(out, "\n{verdict}: {} ok, {warnings} to consider, {failures} to correct", count(Status::Ok))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_line_for_each_fact_and_a_verdict() {
        let facts = [Fact::ok("a", "fine"), Fact::warning("longer", "so so", "do this")];
        let mut out = Vec::new();
        table(&mut out, &facts).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "ok       a       fine\nwarning  longer  so so -> do this\n\n\
             pods can run here: 1 ok, 1 to consider, 0 to correct\n"
        );
    }

    #[test]
    fn a_failure_outweighs_a_warning() {
        assert!(Status::Failure > Status::Warning && Status::Warning > Status::Ok);
    }

    #[test]
    fn a_broken_configuration_is_a_fact_and_the_rest_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("c.toml");
        std::fs::write(&file, "sandbox.vcpuz = 1").unwrap();
        let (fact, config) = configuration(&Source::Explicit(file));
        assert_eq!((fact.status, config), (Status::Failure, Config::default()));
        assert!(fact.detail.contains("did you mean `sandbox.vcpus`?"), "{}", fact.detail);
        let (fact, _) = configuration(&Source::Explicit("/nonexistent".into()));
        assert!(
            fact.detail.ends_with("(named by the caller): No such file or directory (os error 2)"),
            "{}",
            fact.detail
        );
    }

    #[test]
    fn a_misconfigured_part_is_split_into_detail_and_remedy() {
        let mut config = Config::default();
        config.hypervisor.kernel = "/nonexistent".into();
        let fact = Fact::misconfigured("guest-kernel", &config.resolve_kernel().unwrap_err());
        assert_eq!(fact.detail, "/nonexistent (key `hypervisor.kernel`) does not exist");
        assert!(fact.remedy.unwrap().starts_with("`make kernel`"));
    }

    #[test]
    fn every_fact_has_its_own_name() {
        let facts = facts(&Source::BuiltIn, Path::new("/nonexistent/containerd.sock"));
        let names: std::collections::BTreeSet<_> = facts.iter().map(|fact| fact.name).collect();
        assert_eq!(names.len(), facts.len());
        assert!(names.is_superset(&["kvm", "qemu", "containerd", "cgroups", "state-directory"].into()));
    }
}
