//! A Kubernetes of two nodes, as `make k8s` brings it up, in a folder of the test's own; `kubectl`, and what a test
//! left on a node. Knows the scripts and the files they lay down; not what a test applies.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::command::Run;
use crate::context::Context;
use crate::leak;
use crate::node::Node;
use crate::pace::stretched;
use crate::watch;

/// The nodes, by name.
pub const NODES: [&str; 2] = ["node-1", "node-2"];

/// How long a pod may take for anything that it does by itself.
const PATIENCE: u64 = 120;

impl Node {
    pub(crate) fn cluster_dir(&self) -> PathBuf {
        self.dir().join("k8s")
    }

    fn script(&self, name: &str) -> Run {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let top = top.canonicalize().unwrap_or(top);
        Run::new(top.join("scripts").join(name)).env("BULKHEAD_K8S_DIR", self.cluster_dir()).deadline(300)
    }

    /// Brings the cluster up, by what `make k8s` runs.
    pub(crate) fn start_cluster(&self) -> Result<()> {
        let owner = std::process::id().to_string();
        self.script("k8s").args(["--owner", &owner]).output()?.ok().context("bring the cluster up")?;
        Ok(())
    }

    /// Ends it, by what `make k8s-down` runs.
    pub(crate) fn end_cluster(&self) -> Result<()> {
        if self.cluster_dir().exists() {
            self.script("k8s-down").output()?.ok().context("end the cluster")?;
        }
        Ok(())
    }

    /// A command in a node, with its network and mounts.
    pub fn on(&self, node: &str, command: &[&str]) -> Run {
        self.script("k8s-enter").arg(node).args(command)
    }

    /// `kubectl` as administrator, in the namespace `default`.
    pub fn kubectl(&self) -> Run {
        let dir = self.cluster_dir();
        Run::new(dir.join("bin/kubectl")).env("KUBECONFIG", dir.join("kubeconfig")).env("HOME", self.dir())
    }

    /// Whether `program` is a daemon of a node, which a test may start anew.
    pub(crate) fn is_cluster_daemon(&self, program: &str) -> bool {
        let Ok(name) = Path::new(program).strip_prefix(self.cluster_dir().join("bin")) else { return false };
        ["containerd", "kubelet", "kube-proxy"].iter().any(|daemon| name.as_os_str() == *daemon)
    }

    /// The nodes' tables of mounts, which tell of a change.
    pub(crate) fn cluster_mounts(&self) -> Vec<fs::File> {
        let table = |node: &&str| fs::File::open(format!("/proc/{}/mountinfo", self.holder(node).ok()?)).ok();
        NODES.iter().filter_map(table).collect()
    }

    fn holder(&self, node: &str) -> Result<u32> {
        let text = fs::read_to_string(self.cluster_dir().join(node).join("holder.pid"));
        let text = text.with_context(|| format!("read the pid of {node}"))?;
        text.split(' ')
            .next()
            .and_then(|pid| pid.parse().ok())
            .with_context(|| format!("no pid of {node}: {text}"))
    }

    /// What of the nodes shows in a snapshot beside processes. Nothing, where there is no cluster.
    pub(crate) fn in_cluster(&self) -> Result<BTreeSet<String>> {
        let mut found = BTreeSet::new();
        if !self.cluster_dir().exists() {
            return Ok(found);
        }
        for node in NODES {
            let proc = PathBuf::from(format!("/proc/{}", self.holder(node)?));
            let mounts = fs::read_to_string(proc.join("mountinfo")).context("read a node's mountinfo")?;
            found.extend(mounts.lines().filter_map(leak::mount_line).map(|m| format!("mount of {node} {m}")));
            let links = fs::read_to_string(proc.join("net/dev")).context("read a node's links")?;
            let names = links.lines().skip(2).filter_map(|l| l.split_once(':'));
            // The bridge comes with the first pod and stays, as the kubelet's own levels of cgroups do.
            let names = names.map(|(name, _)| name.trim()).filter(|name| *name != "cni0");
            found.extend(names.map(|name| format!("link of {node} {name}")));
            let root = proc.join("root");
            for dir in [
                "run/bulkhead",
                "run/netns",
                "run/containerd/s",
                "run/containerd/io.containerd.runtime.v2.task/k8s.io",
                "run/containerd/io.containerd.sandbox.controller.v1.shim/k8s.io",
                "var/lib/kubelet/pods",
                "var/lib/cni/networks/pods",
            ] {
                for entry in fs::read_dir(root.join(dir)).into_iter().flatten().flatten() {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    // Host-local's own books.
                    if !(dir.ends_with("networks/pods")
                        && (name == "lock" || name.starts_with("last_reserved_ip")))
                    {
                        found.insert(format!("file {}", entry.path().display()));
                    }
                }
            }
            let cgroup = self.cluster_file(node, "cgroup")?;
            let levels = ["kubepods", "besteffort", "burstable"];
            let groups = leak::cgroups_of(&cgroup);
            let pods = groups.iter().filter(|dir| !levels.iter().any(|level| dir.ends_with(level)));
            found.extend(pods.map(|dir| format!("cgroup {}", dir.display())));
        }
        Ok(found)
    }

    /// The last complaints in the logs of the nodes' daemons, for who reads of a failure.
    pub(crate) fn cluster_complaints(&self) -> String {
        let mut text = String::new();
        for node in NODES {
            for (log, marks) in
                [("containerd.log", &["level=error", "level=warning"][..]), ("kubelet.log", &["E1", "E0"])]
            {
                let Ok(lines) = fs::read_to_string(self.cluster_dir().join(node).join(log)) else { continue };
                let of_note = |line: &&str| {
                    let startup = ["Configuration migrated", "fsverity", "not registered yet", "not found"];
                    marks.iter().any(|mark| line.starts_with(mark) || line.contains(&format!(" {mark} ")))
                        && !startup.iter().any(|words| line.contains(words))
                };
                let lines: Vec<&str> = lines.lines().filter(of_note).collect();
                for line in &lines[lines.len().saturating_sub(8)..] {
                    text += &format!("{node} {log}: {}\n", line.chars().take(600).collect::<String>());
                }
            }
        }
        text
    }

    fn cluster_file(&self, node: &str, name: &str) -> Result<String> {
        let text = fs::read_to_string(self.cluster_dir().join(node).join(name));
        Ok(text.with_context(|| format!("read {name} of {node}"))?.trim().to_owned())
    }

    /// The nodes' namespaces of mounts and the names of their cgroups, by which their processes are known.
    pub(crate) fn cluster_marks(&self) -> (Vec<String>, Vec<String>) {
        let read = |name| NODES.iter().filter_map(|node| self.cluster_file(node, name).ok()).collect();
        (read("mounts"), read("cgroup"))
    }
}

impl Context<'_> {
    /// A `kubectl` command; see [`Node::kubectl`].
    pub fn kubectl(&self, args: &[&str]) -> Run {
        self.node_ref().kubectl().args(args)
    }

    /// `kubectl ARGS`, waited for, which must succeed; its standard output.
    pub fn kubectl_ok(&self, args: &[&str]) -> Result<String> {
        Ok(self.kubectl(args).output()?.ok()?.out())
    }

    /// A command in a node, which must succeed; its standard output.
    pub fn on_node(&self, node: &str, command: &[&str]) -> Result<String> {
        Ok(self.node_ref().on(node, command).output()?.ok()?.out())
    }

    /// Where the files of a node's daemons are.
    pub fn node_files(&self, node: &str) -> PathBuf {
        self.node_ref().cluster_dir().join(node)
    }

    /// Applies docs/examples/`name`, its pods with the runtime under test, and takes it back at the test's end.
    pub fn example(&mut self, name: &str) -> Result<()> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/examples").join(name);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        self.apply(name, &text)
    }

    /// The same with a manifest of the test's own.
    pub fn apply(&mut self, name: &str, text: &str) -> Result<()> {
        let handler = self.settings().handler.clone();
        let text = text.replace("runtimeClassName: bulkhead\n", &format!("runtimeClassName: {handler}\n"));
        let path = self.write(name, text)?;
        self.applied().push(path.clone());
        self.kubectl(&["apply", "-f"]).arg(&path).output()?.ok()?;
        Ok(())
    }

    /// Deletes what a test has applied, and waits until it is gone.
    pub(crate) fn delete_applied(&mut self) -> Result<()> {
        let applied = std::mem::take(self.applied());
        if applied.is_empty() {
            return Ok(());
        }
        let mut delete = self.kubectl(&["delete", "--ignore-not-found", "--wait", "--timeout=120s"]);
        for path in applied {
            delete = delete.arg("-f").arg(path);
        }
        delete.output()?.ok().context("delete what the test applied")?;
        // What a controller has made goes after its owner.
        self.kubectl_ok(&["wait", "--for=delete", "pods", "--all", "--timeout=120s"])?;
        self.forget_dead_pods()?;
        Ok(())
    }

    /// The kubelet takes dead pods out of containerd's books once a minute; not to wait for it, here it is done now.
    pub fn forget_dead_pods(&self) -> Result<()> {
        for node in NODES {
            let dead = self.on_node(node, &["crictl", "pods", "--state", "NotReady", "-q"])?;
            for id in dead.lines() {
                // It may be quicker.
                self.node_ref().on(node, &["crictl", "rmp", id]).output()?;
            }
        }
        Ok(())
    }

    /// `kubectl wait --for=CONDITION OBJECTS`; what is waited for and why it did not come is in the error.
    pub fn wait(&self, condition: &str, objects: &[&str]) -> Result<()> {
        let seconds = stretched(Duration::from_secs(PATIENCE)).as_secs();
        let wait = self.kubectl(&["wait", &format!("--for={condition}"), &format!("--timeout={seconds}s")]);
        let output = wait.args(objects).deadline(PATIENCE + 30).output()?;
        if let Err(error) = output.ok() {
            let pods = self.kubectl(&["describe", "pods"]).output()?.out();
            bail!("{error}\npods:\n{pods}");
        }
        Ok(())
    }

    /// Waits until the pods are Ready.
    pub fn ready(&self, pods: &[&str]) -> Result<()> {
        let pods: Vec<String> = pods.iter().map(|pod| format!("pod/{pod}")).collect();
        self.wait("condition=Ready", &pods.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// An object as the API server has it.
    pub fn object(&self, name: &str) -> Result<Value> {
        let output = self.kubectl(&["get", name, "-o", "json"]).output()?.ok()?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("parse {name}"))
    }

    /// A field of an object, by kubectl's JSONPath.
    pub fn field(&self, name: &str, path: &str) -> Result<String> {
        self.kubectl_ok(&["get", name, "-o", &format!("jsonpath={path}")])
    }

    /// `kubectl exec POD -c CONTAINER -- sh -c SCRIPT`, which must succeed; its standard output.
    pub fn in_pod(&self, pod: &str, container: &str, script: &str) -> Result<String> {
        self.kubectl_ok(&["exec", pod, "-c", container, "--", "sh", "-c", script])
    }

    /// Waits for an event of the object whose message has `words` in it; the message.
    pub fn event(&self, object: &str, words: &[&str]) -> Result<String> {
        let selector = format!("involvedObject.name={object}");
        let line = "-o=jsonpath={.reason}: {.message}{\"\\n\"}";
        let watch = ["get", "events", "--watch", "--field-selector", &selector, line];
        let watch = self.kubectl(&watch).deadline(PATIENCE).spawn()?;
        // Whole lines only: the last one may still be coming.
        let fits = |line: &&str| line.ends_with('\n') && words.iter().all(|word| line.contains(word));
        let found = |said: &str| said.split_inclusive('\n').find(fits).map(|line| line.trim_end().to_owned());
        watch.wait_until(&format!("an event of {object} with all of {words:?}"), |said| {
            found(said).is_some()
        })?;
        found(&String::from_utf8_lossy(&watch.stdout_so_far())).context("the event is gone again")
    }

    /// Waits until the log of a node's daemon has lines with these words, in this order.
    pub fn node_says(&self, node: &str, log: &str, lines: &[&[&str]]) -> Result<()> {
        // From its first line: what was said before we looked counts.
        watch::log_says(&self.node_ref().cluster_dir().join(node).join(log), 0, lines, PATIENCE)
    }
}
