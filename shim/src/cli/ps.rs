//! `bulkhead ps`: the pods of this machine, from what their shims have written into the state directory.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::output::{self, Format};
use super::{Report, process};
use crate::config::Config;

/// What a shim writes into its sandbox's directory. Keys that a newer shim adds are not for us.
#[derive(Debug, Deserialize)]
struct State {
    namespace: String,
    id: String,
    shim_pid: u32,
    /// Absent, with the three below it, until the machine runs.
    vmm_pid: Option<u32>,
    backend: Option<String>,
    memory_mib: Option<u64>,
    vcpus: Option<u32>,
    created_unix_nanos: u64,
    bundle: PathBuf,
    #[serde(default)]
    containers: Vec<Container>,
}

/// A container of a pod.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Container {
    id: String,
    pid: i32,
    status: String,
}

/// A pod as `bulkhead ps` reports it.
#[derive(Debug, Serialize)]
struct Pod {
    namespace: String,
    id: String,
    /// `starting` until the machine runs, `running`, or `dead` for what a killed shim has left behind.
    status: &'static str,
    backend: Option<String>,
    vcpus: Option<u32>,
    /// The machine's size.
    memory_mib: Option<u64>,
    /// What the pod's processes on the host really use, shared pages in proportion.
    memory_used_bytes: u64,
    shim_pid: u32,
    vmm_pid: Option<u32>,
    created_unix_nanos: u64,
    age_seconds: u64,
    bundle: PathBuf,
    state_dir: PathBuf,
    containers: Vec<Container>,
}

pub(super) fn run(report: Report, config: Option<&Path>, out: &mut dyn Write) -> anyhow::Result<()> {
    let state_dir = Config::load(config)?.state_dir;
    let (pods, unread) = pods(&state_dir)?;
    match report.output {
        Format::Json => output::json(out, &pods)?,
        Format::Table => table(out, &pods)?,
    }
    for complaint in unread {
        eprintln!("bulkhead: {complaint}");
    }
    Ok(())
}

/// The pods in order of their age, oldest first, and what is wrong with those that cannot be read.
fn pods(state_dir: &Path) -> anyhow::Result<(Vec<Pod>, Vec<String>)> {
    let entries = match std::fs::read_dir(state_dir) {
        // No pod has ever run here.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok((Vec::new(), Vec::new())),
        other => other.with_context(|| format!("cannot read the state directory {}", state_dir.display()))?,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    let (mut pods, mut unread) = (Vec::new(), Vec::new());
    for entry in entries.flatten() {
        let file = entry.path().join("state.json");
        match std::fs::read(&file) {
            Ok(text) => match serde_json::from_slice(&text) {
                Ok(state) => pods.push(pod(state, entry.path(), now)),
                Err(error) => unread.push(format!("{} is not a state: {error}", file.display())),
            },
            // A pod that is being made or taken apart, or a file that is not a pod's.
            Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => {}
            Err(error) => unread.push(format!("cannot read {}: {error}", file.display())),
        }
    }
    pods.sort_by(|a, b| (a.created_unix_nanos, &a.id).cmp(&(b.created_unix_nanos, &b.id)));
    Ok((pods, unread))
}

fn pod(state: State, state_dir: PathBuf, now: u64) -> Pod {
    // A pid alone may belong to another process by now. The kernel cuts names at 15 bytes.
    let alive = process::name(state.shim_pid).is_some_and(|name| name.starts_with("containerd-shim"));
    let family = if alive { process::family(state.shim_pid) } else { Vec::new() };
    Pod {
        namespace: state.namespace,
        id: state.id,
        status: match (alive, state.vmm_pid) {
            (false, _) => "dead",
            (true, None) => "starting",
            (true, Some(_)) => "running",
        },
        backend: state.backend,
        vcpus: state.vcpus,
        memory_mib: state.memory_mib,
        memory_used_bytes: family.into_iter().filter_map(process::memory).sum(),
        shim_pid: state.shim_pid,
        vmm_pid: state.vmm_pid,
        created_unix_nanos: state.created_unix_nanos,
        age_seconds: now.saturating_sub(state.created_unix_nanos) / 1_000_000_000,
        bundle: state.bundle,
        state_dir,
        containers: state.containers,
    }
}

fn table(out: &mut dyn Write, pods: &[Pod]) -> anyhow::Result<()> {
    let heads =
        ["NAMESPACE", "POD", "STATUS", "BACKEND", "VCPUS", "MEMORY", "SHIM", "VMM", "AGE", "CONTAINERS"];
    let mut rows = vec![heads.map(str::to_owned)];
    rows.extend(pods.iter().map(|pod| {
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        let used = output::mib(pod.memory_used_bytes);
        let containers = pod.containers.iter().map(|c| format!("{} ({}, pid {})", c.id, c.status, c.pid));
        [
            pod.namespace.clone(),
            pod.id.clone(),
            pod.status.to_owned(),
            or_dash(pod.backend.clone()),
            or_dash(pod.vcpus.map(|vcpus| vcpus.to_string())),
            pod.memory_mib.map_or_else(|| used.clone(), |size| format!("{used} of {size} MiB")),
            pod.shim_pid.to_string(),
            or_dash(pod.vmm_pid.map(|pid| pid.to_string())),
            output::age(pod.age_seconds),
            containers.collect::<Vec<_>>().join(", "),
        ]
    }));
    Ok(output::columns(out, &rows)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(id: &str, shim_pid: u32, created: u64) -> String {
        format!(
            r#"{{"namespace":"default","id":"{id}","shim_pid":{shim_pid},"vmm_pid":7,"backend":"emulation",
            "memory_mib":2176,"vcpus":1,"created_unix_nanos":{created},"bundle":"/b","of_tomorrow":true,
            "containers":[{{"id":"{id}","pid":42,"status":"running"}}]}}"#
        )
    }

    fn written(states: &[(&str, String)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in states {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            std::fs::write(folder.path().join(name).join("state.json"), text).unwrap();
        }
        folder
    }

    #[test]
    fn no_directory_means_no_pods() {
        let (pods, unread) = pods(Path::new("/nonexistent/state")).unwrap();
        assert!(pods.is_empty() && unread.is_empty());
        let mut out = Vec::new();
        table(&mut out, &pods).unwrap();
        assert!(out.starts_with(b"NAMESPACE  POD  STATUS"));
    }

    #[test]
    fn pods_are_listed_oldest_first_and_a_lost_shim_is_dead() {
        let folder =
            written(&[("a", state("young", u32::MAX, 2)), ("b", state("old", std::process::id(), 1))]);
        std::fs::create_dir(folder.path().join("being-made")).unwrap();
        std::fs::write(folder.path().join("stray"), "").unwrap();
        let (pods, unread) = pods(folder.path()).unwrap();
        assert!(unread.is_empty(), "{unread:?}");
        assert_eq!(pods.iter().map(|pod| pod.id.as_str()).collect::<Vec<_>>(), ["old", "young"]);
        // This test is a living process, but no shim: its pid was used again.
        assert!(pods.iter().all(|pod| pod.status == "dead" && pod.memory_used_bytes == 0));
        let mut out = Vec::new();
        table(&mut out, &pods).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.lines().nth(2).unwrap().contains("young  dead    emulation  1      0.0 MiB of 2176 MiB"),
            "{text}"
        );
        assert!(text.ends_with("young (running, pid 42)\n"), "{text}");
    }

    #[test]
    fn a_pod_without_a_machine_yet_is_listed_too() {
        let text = r#"{"namespace":"n","id":"i","shim_pid":4294967295,"created_unix_nanos":1,"bundle":"/b"}"#;
        let folder = written(&[("a", text.to_owned())]);
        let (pods, unread) = pods(folder.path()).unwrap();
        assert!(unread.is_empty(), "{unread:?}");
        let mut out = Vec::new();
        table(&mut out, &pods).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("i    dead    -        -      0.0 MiB  4294967295  -"), "{text}");
    }

    #[test]
    fn a_broken_state_is_named_and_hides_no_other() {
        let folder = written(&[("a", "{}".to_owned()), ("b", state("good", 1, 1))]);
        let (pods, unread) = pods(folder.path()).unwrap();
        assert_eq!(pods.len(), 1);
        assert!(unread[0].contains("/a/state.json is not a state: missing field"), "{unread:?}");
    }
}
