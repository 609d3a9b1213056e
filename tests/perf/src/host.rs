//! On what was measured: without it no figure means anything.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use bulkhead_hypervisor::probe;
use serde::Serialize;
use serde_json::Value;

/// The machine and the programs of a measurement.
#[derive(Debug, Serialize)]
pub(crate) struct Host {
    pub(crate) kernel: String,
    pub(crate) processor: String,
    pub(crate) processors: usize,
    pub(crate) memory_kib: u64,
    /// Load over the last minute before the measurement began.
    pub(crate) load_before: f64,
    /// What executes the guests, and how that was found out.
    pub(crate) acceleration: String,
    /// KVM_CREATE_VM, where there is a KVM.
    pub(crate) kvm_create_vm_seconds: Option<f64>,
    /// What `bulkhead check` says of this machine.
    pub(crate) check: Value,
    /// What `bulkhead version` says.
    pub(crate) versions: Value,
    /// The commit that was measured.
    pub(crate) commit: String,
}

impl Host {
    /// Looks at this machine, with the operator's command under test.
    pub(crate) fn look(operator: &Operator, commit: &str) -> anyhow::Result<Self> {
        let cpuinfo = read("/proc/cpuinfo");
        let acceleration = match probe::acceleration() {
            probe::Acceleration::Hardware { how } => format!("hardware: {how}"),
            probe::Acceleration::Emulated { why } => format!("emulation: {why}"),
        };
        Ok(Self {
            kernel: read("/proc/sys/kernel/osrelease").trim_end().to_owned(),
            processor: value(&cpuinfo, "model name", ':').unwrap_or_default(),
            processors: cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
            memory_kib: value(&read("/proc/meminfo"), "MemTotal", ':')
                .and_then(|text| text.split(' ').next()?.parse().ok())
                .unwrap_or(0),
            load_before: load(),
            acceleration,
            kvm_create_vm_seconds: probe::probe(Path::new(probe::DEVICE))
                .ok()
                .map(|probe| probe.create_vm.as_secs_f64()),
            check: operator.ask("check")?,
            versions: operator.ask("version")?,
            commit: commit.to_owned(),
        })
    }
}

/// The operator's command, `bulkhead`, and how it is run.
#[derive(Debug)]
pub(crate) struct Operator {
    pub(crate) program: PathBuf,
    /// Arguments before its own, where the program is one that runs it elsewhere.
    pub(crate) before: Vec<&'static str>,
    pub(crate) environment: Vec<(&'static str, PathBuf)>,
}

impl Operator {
    /// What it answers to one of its subcommands.
    ///
    /// # Errors
    /// It cannot be started, or answers nothing that can be read.
    pub(crate) fn ask(&self, name: &str) -> anyhow::Result<Value> {
        let mut command = Command::new(&self.program);
        command.args(&self.before).args([name, "--output", "json"]);
        for (name, value) in &self.environment {
            command.env(name, value);
        }
        let output = command.output().with_context(|| format!("cannot start {}", self.program.display()))?;
        // A failed fact is an exit status of 1 with an answer all the same.
        ensure!(!output.stdout.is_empty(), "bulkhead {name}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).with_context(|| format!("bulkhead {name} --output json"))
    }
}

/// The load over the last minute.
pub(crate) fn load() -> f64 {
    read("/proc/loadavg").split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(f64::NAN)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn value(text: &str, key: &str, separator: char) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(separator)?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_behind_their_separator() {
        assert_eq!(value("a : 1\nmodel name\t: Some CPU\n", "model name", ':').as_deref(), Some("Some CPU"));
        assert_eq!(value("a : 1", "b", ':'), None);
    }

    #[test]
    fn the_load_is_a_number() {
        assert!(load() >= 0.0);
    }
}
