//! The pods of this machine, from what their shims have written into the state directory, and one of them by name.
//! Asks no shim.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::process;
use crate::config;

/// What a shim writes into its sandbox's directory. Keys that a newer shim adds are not for us.
#[derive(Debug, Deserialize)]
pub(super) struct State {
    pub(super) namespace: String,
    pub(super) id: String,
    pub(super) shim_pid: u32,
    /// Absent, with the three below it, until the machine runs.
    pub(super) vmm_pid: Option<u32>,
    pub(super) backend: Option<String>,
    pub(super) memory_mib: Option<u64>,
    pub(super) vcpus: Option<u32>,
    pub(super) created_unix_nanos: u64,
    pub(super) bundle: PathBuf,
    #[serde(default)]
    pub(super) containers: Vec<Container>,
}

/// A container of a pod.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Container {
    pub(super) id: String,
    pub(super) pid: i32,
    pub(super) status: String,
}

/// What is the matter with a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// Its machine does not run yet.
    Starting,
    Running,
    /// A killed shim has left it behind.
    Dead,
}

impl Status {
    pub(super) const ALL: [Status; 3] = [Status::Starting, Status::Running, Status::Dead];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Status::Starting => "starting",
            Status::Running => "running",
            Status::Dead => "dead",
        }
    }
}

/// A pod that was found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) state: State,
    /// Where its shim keeps what belongs to it.
    pub(super) dir: PathBuf,
    alive: bool,
}

impl Found {
    pub(super) fn status(&self) -> Status {
        match (self.alive, self.state.vmm_pid) {
            (false, _) => Status::Dead,
            (true, None) => Status::Starting,
            (true, Some(_)) => Status::Running,
        }
    }

    /// As `bulkhead` names it to people.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.state.namespace, self.state.id)
    }
}

/// The pods in order of their age, oldest first, and what is wrong with those that cannot be read.
pub(super) fn find(state_dir: &Path) -> anyhow::Result<(Vec<Found>, Vec<String>)> {
    let entries = match std::fs::read_dir(state_dir) {
        // No pod has ever run here.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok((Vec::new(), Vec::new())),
        other => other.with_context(|| format!("cannot read the state directory {}", state_dir.display()))?,
    };
    let (mut pods, mut unread) = (Vec::new(), Vec::new());
    for entry in entries.flatten() {
        let file = entry.path().join("state.json");
        match std::fs::read(&file) {
            Ok(text) => match serde_json::from_slice::<State>(&text) {
                Ok(state) => pods.push(Found { alive: is_shim(state.shim_pid), state, dir: entry.path() }),
                Err(error) => unread.push(format!("{} is not a state: {error}", file.display())),
            },
            // A pod that is being made or taken apart, or a file that is not a pod's.
            Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => {}
            Err(error) => unread.push(format!("cannot read {}: {error}", file.display())),
        }
    }
    pods.sort_by(|a, b| {
        (a.state.created_unix_nanos, &a.state.id).cmp(&(b.state.created_unix_nanos, &b.state.id))
    });
    Ok((pods, unread))
}

/// A pid alone may belong to another process by now. The kernel cuts names at 15 bytes.
fn is_shim(pid: u32) -> bool {
    process::name(pid).is_some_and(|name| name.starts_with("containerd-shim"))
}

/// The pod of that name: its id, `NAMESPACE/ID`, or the beginning of an id that only one has.
pub(super) fn choose(mut pods: Vec<Found>, name: &str) -> anyhow::Result<Found> {
    let exact: Vec<usize> = positions(&pods, |pod| pod.state.id == name || pod.name() == name);
    let begin = || positions(&pods, |pod| !name.is_empty() && pod.state.id.starts_with(name));
    let chosen = if exact.is_empty() { begin() } else { exact };
    match chosen[..] {
        [one] => Ok(pods.swap_remove(one)),
        [] => bail!("there is no pod `{name}`{}", advice(&pods, name)),
        _ => {
            let names: Vec<String> = chosen.iter().map(|at| format!("`{}`", pods[*at].name())).collect();
            bail!("`{name}` names more than one pod: {}", names.join(", "))
        }
    }
}

fn positions(pods: &[Found], fits: impl Fn(&Found) -> bool) -> Vec<usize> {
    pods.iter().enumerate().filter(|(_, pod)| fits(pod)).map(|(at, _)| at).collect()
}

fn advice(pods: &[Found], name: &str) -> String {
    let near = config::nearest(name, pods.iter().map(|pod| pod.state.id.as_str()));
    match near {
        Some(near) => format!("; did you mean `{near}`?"),
        None if pods.is_empty() => ": no pod is here".to_owned(),
        None => "; `bulkhead ps` lists those that are there".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(namespace: &str, id: &str) -> Found {
        let text = format!(
            r#"{{"namespace":"{namespace}","id":"{id}","shim_pid":4294967295,"created_unix_nanos":1,"bundle":"/b"}}"#
        );
        Found { state: serde_json::from_str(&text).unwrap(), dir: "/d".into(), alive: false }
    }

    fn chosen(name: &str) -> Result<String, String> {
        let pods = ["default/web", "k8s.io/web", "default/database", "k8s.io/0a1b2c", "k8s.io/0a9f"];
        let pods = pods.iter().map(|name| name.split_once('/').unwrap()).map(|(ns, id)| found(ns, id));
        choose(pods.collect(), name).map(|pod| pod.name()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_pod_is_known_by_its_id_and_by_the_beginning_of_it() {
        assert_eq!(chosen("database").unwrap(), "default/database");
        assert_eq!(chosen("data").unwrap(), "default/database");
        assert_eq!(chosen("k8s.io/web").unwrap(), "k8s.io/web");
        assert_eq!(chosen("0a1").unwrap(), "k8s.io/0a1b2c");
    }

    #[test]
    fn a_name_that_is_nobodys_or_not_one_pods_is_told() {
        assert_eq!(chosen("web").unwrap_err(), "`web` names more than one pod: `default/web`, `k8s.io/web`");
        assert_eq!(chosen("0a").unwrap_err(), "`0a` names more than one pod: `k8s.io/0a1b2c`, `k8s.io/0a9f`");
        assert_eq!(chosen("databse").unwrap_err(), "there is no pod `databse`; did you mean `database`?");
        assert_eq!(
            chosen("somebody").unwrap_err(),
            "there is no pod `somebody`; `bulkhead ps` lists those that are there"
        );
        assert!(chosen("").unwrap_err().starts_with("there is no pod ``"));
        let error = choose(Vec::new(), "web").unwrap_err().to_string();
        assert_eq!(error, "there is no pod `web`: no pod is here");
    }
}
