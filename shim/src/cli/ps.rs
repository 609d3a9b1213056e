//! `bulkhead ps`: the pods of this machine, from what their shims have written into the state directory.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::output::{self, Format};
use super::pods::{self, Container, Found, Status};
use super::{Report, process};
use crate::config::Config;

/// A pod as `bulkhead ps` reports it.
#[derive(Debug, Serialize)]
pub(super) struct Pod {
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
    let (pods, unread) = pods(&Config::load(config)?.state_dir)?;
    match report.output {
        Format::Json => output::json(out, &pods)?,
        Format::Table => table(out, &pods)?,
    }
    for complaint in unread {
        eprintln!("bulkhead: {complaint}");
    }
    Ok(())
}

/// The pods, oldest first, with the memory that they use, and what is wrong with those that cannot be read.
pub(super) fn pods(state_dir: &Path) -> anyhow::Result<(Vec<Pod>, Vec<String>)> {
    let (found, unread) = pods::find(state_dir)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    Ok((found.into_iter().map(|found| pod(found, now)).collect(), unread))
}

fn pod(found: Found, now: u64) -> Pod {
    let status = found.status();
    let Found { state, dir, .. } = found;
    let family = if status == Status::Dead { Vec::new() } else { process::family(state.shim_pid) };
    Pod {
        namespace: state.namespace,
        id: state.id,
        status: status.as_str(),
        backend: state.backend,
        vcpus: state.vcpus,
        memory_mib: state.memory_mib,
        memory_used_bytes: family.into_iter().filter_map(process::memory).sum(),
        shim_pid: state.shim_pid,
        vmm_pid: state.vmm_pid,
        created_unix_nanos: state.created_unix_nanos,
        age_seconds: now.saturating_sub(state.created_unix_nanos) / 1_000_000_000,
        bundle: state.bundle,
        state_dir: dir,
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
