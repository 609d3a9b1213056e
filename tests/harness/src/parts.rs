//! The processes that make a pod's machine, as the runtime itself tells of them: a test asks, and knows no
//! backend's names. Knows the words of `bulkhead ps`, the ledger, and the keys of the configuration.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::command::{signal_process, wait_for_exit};
use crate::context::Context;

/// Keys of `[hypervisor]` that name a program, and what each is when the configuration does not say it.
const PROGRAMS: [(&str, &str); 4] = [
    ("qemu", "qemu-system-x86_64"),
    ("vmm", "bulkhead-vmm"),
    ("virtiofsd", "virtiofsd"),
    ("vhost_device_vsock", "vhost-device-vsock"),
];

/// A process of a pod's machine: the VMM, or a helper behind one of its devices.
#[derive(Clone, Debug)]
pub struct Part {
    /// What the runtime calls it in the ledger, in its errors and in its log.
    pub name: String,
    /// File name of its program.
    pub program: String,
    /// Key of `[hypervisor]` that names its program.
    pub key: &'static str,
    /// Its process id.
    pub pid: u32,
}

impl Context<'_> {
    /// The pods that run, as the runtime lists them.
    fn pods(&self) -> Result<Vec<Value>> {
        let ps = self.bulkhead(&["ps", "--output", "json"])?.output()?.ok()?;
        serde_json::from_slice(&ps.stdout).with_context(|| format!("parse the list of pods\n{ps}"))
    }

    /// Where the shim of the pod `id` keeps what belongs to it.
    pub fn pod_dir(&self, id: &str) -> Result<PathBuf> {
        let pods = self.pods()?;
        let pod = pods.iter().find(|pod| pod["id"] == id);
        state_dir(pod.with_context(|| format!("no pod is {id}: {pods:#?}"))?)
    }

    /// The parts of the machine of the one pod that runs: the VMM first, then its helpers.
    pub fn parts(&mut self) -> Result<Vec<Part>> {
        let config = self.node().bulkhead_config();
        let pods = self.pods()?;
        let [pod] = pods.as_slice() else { bail!("one pod should run: {pods:#?}") };
        let (shim, vmm) = (number(pod, "shim_pid")?, number(pod, "vmm_pid")?);
        let ledger = fs::read_to_string(state_dir(pod)?.join("ledger")).context("read the pod's ledger")?;
        let running = self.processes();
        let mut parts = Vec::new();
        for line in ledger.lines() {
            let entry: Value = serde_json::from_str(line).with_context(|| format!("parse {line}"))?;
            // What belongs to a container only stands for it.
            if entry["kind"] != "process" || entry["pid"] == shim || entry["container"].is_string() {
                continue;
            }
            let (name, pid) = (entry["name"].as_str().unwrap_or_default(), number(&entry, "pid")?);
            let process = running.iter().find(|p| p.pid == pid && p.parent == shim);
            let process = process.with_context(|| format!("no child of the shim is {line}: {running:#?}"))?;
            let (program, key) = (process.name.clone(), key(&config, &process.name)?);
            parts.push(Part { name: name.into(), program, key, pid });
        }
        let place = parts.iter().position(|p| p.pid == vmm).context("the VMM is not in the ledger")?;
        parts[..=place].rotate_right(1);
        ensure!(parts.len() > 1, "a pod's files come from a helper, but there is none: {parts:?}");
        Ok(parts)
    }

    /// Kills a part with SIGKILL and waits until it is gone.
    pub fn kill_part(&self, part: &Part) -> Result<()> {
        let same = |pid| self.processes().iter().any(|p| p.pid == pid && p.name == part.program);
        wait_for_exit(&signal_process(part.pid, Signal::KILL, same)?, std::time::Duration::from_secs(10))
    }
}

fn state_dir(pod: &Value) -> Result<PathBuf> {
    pod["state_dir"].as_str().map(PathBuf::from).with_context(|| format!("the pod has no state_dir: {pod}"))
}

fn number(value: &Value, key: &str) -> Result<u32> {
    value[key].as_u64().and_then(|n| n.try_into().ok()).with_context(|| format!("no {key} in {value}"))
}

/// The key that names the program in the configuration at `path`.
fn key(path: &Path, program: &str) -> Result<&'static str> {
    let table: toml::Table = fs::read_to_string(path)?.parse().context("parse bulkhead.toml")?;
    let is_it = |&&(key, default): &&(&str, &str)| {
        let stated = table.get("hypervisor").and_then(|h| h.get(key)).and_then(toml::Value::as_str);
        Path::new(stated.unwrap_or(default)).file_name().is_some_and(|name| name == program)
    };
    let found = PROGRAMS.iter().find(is_it);
    found.map(|(key, _)| *key).with_context(|| format!("no key of [hypervisor] names {program}"))
}
