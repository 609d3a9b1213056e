//! What a test gets: its node, a directory of its own, and the few verbs that most tests need.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::command::{Output, Proc, Run};
use crate::events::Events;
use crate::image::IMAGE;
use crate::leak::{self, ProcessInfo, Snapshot};
use crate::node::Node;
use crate::pace::stretched;
use crate::pty::Pty;
use crate::settings::Settings;
use crate::spec;
use crate::watch;

/// One running test.
pub struct Context<'a> {
    node: &'a mut Node,
    name: &'static str,
    dir: PathBuf,
    before: Snapshot,
    log_start: u64,
    changed_config: bool,
    applied: Vec<PathBuf>,
}

/// How long what a test used may take to vanish after the test's last command.
const SETTLING: Duration = Duration::from_secs(15);

impl<'a> Context<'a> {
    pub(crate) fn begin(node: &'a mut Node, name: &'static str) -> Result<Self> {
        let dir = node.dir().join("t");
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let before = Snapshot::take(node)?;
        let log_start = node.log_position();
        Ok(Self { node, name, dir, before, log_start, changed_config: false, applied: Vec::new() })
    }

    /// Ends the test: puts everything back that the test changed in the node, and finds what was left.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.delete_applied()?;
        self.restore_config()?;
        self.node.disarm();
        let mut left = Vec::new();
        if self.node.pid().is_some() {
            self.left_in_containerd(&mut left)?;
        }
        left.extend(leak::settle(self.node, &self.before, stretched(SETTLING))?);
        fs::remove_dir_all(&self.dir).context("remove the test's directory")?;
        if !left.is_empty() {
            bail!("the test left something behind:\n    {}", left.join("\n    "));
        }
        Ok(())
    }

    fn left_in_containerd(&self, left: &mut Vec<String>) -> Result<()> {
        for (what, list) in [("task", ["task", "ls", "-q"]), ("container", ["container", "ls", "-q"])] {
            let out = self.ctr().args(list).output()?.ok()?.out();
            left.extend(out.lines().map(|id| format!("{what} {id} in containerd")));
        }
        let snapshots = self.ctr().args(["snapshot", "ls"]).output()?.ok()?.out();
        let active = snapshots.lines().filter(|l| l.trim_end().ends_with("Active"));
        left.extend(
            active.filter_map(|l| l.split_whitespace().next()).map(|k| format!("snapshot {k} in containerd")),
        );
        Ok(())
    }

    /// The name of the test.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What is under test.
    pub fn settings(&self) -> &Settings {
        self.node.settings()
    }

    /// The containerd.
    pub fn node(&mut self) -> &mut Node {
        self.node
    }

    /// Manifests that the test has applied to its cluster.
    pub(crate) fn applied(&mut self) -> &mut Vec<PathBuf> {
        &mut self.applied
    }

    pub(crate) fn node_ref(&self) -> &Node {
        self.node
    }

    /// A directory of this test, on a disk file system; removed at its end.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file in [`Context::dir`].
    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.dir.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// A `ctr` command.
    pub fn ctr(&self) -> Run {
        self.node.ctr()
    }

    /// A `bulkhead` command about this node's pods.
    pub fn bulkhead(&self, args: &[&str]) -> Result<Run> {
        let program = self.settings().program("bulkhead")?;
        let run = Run::new(program).env("BULKHEAD_CONFIG", self.node.bulkhead_config());
        Ok(run.env("CONTAINERD_ADDRESS", self.node.address()).args(args))
    }

    /// A `crictl` command.
    pub fn crictl(&self) -> Result<Run> {
        self.node.crictl()
    }

    /// See [`Node::mark`].
    pub(crate) fn mark(&self) -> &str {
        self.node.mark()
    }

    /// `ctr ARGS`, waited for, which must succeed; its standard output.
    pub fn ctr_ok(&self, args: &[&str]) -> Result<String> {
        Ok(self.ctr().args(args).output()?.ok()?.out())
    }

    /// `ctr run --runtime R FLAGS IMAGE ID COMMAND`, not yet started.
    pub fn run(&self, flags: &[&str], id: &str, command: &[&str]) -> Run {
        self.run_args(self.ctr(), flags, id, command)
    }

    fn run_args(&self, run: Run, flags: &[&str], id: &str, command: &[&str]) -> Run {
        run.arg("run")
            .arg("--runtime")
            .arg(&self.settings().runtime_name)
            .args(flags)
            .arg(IMAGE)
            .arg(id)
            .args(command)
    }

    /// `ctr run --rm …` of a command that must succeed; its standard output.
    pub fn run_ok(&self, flags: &[&str], command: &[&str]) -> Result<String> {
        Ok(self.run_rm(flags, command)?.ok()?.out())
    }

    /// `ctr run --rm …`, waited for.
    pub fn run_rm(&self, flags: &[&str], command: &[&str]) -> Result<Output> {
        let flags: Vec<&str> = ["--rm"].iter().chain(flags).copied().collect();
        self.run(&flags, "c", command).output()
    }

    /// `ctr run --rm … sh -c SCRIPT`, which must succeed; its standard output.
    pub fn sh(&self, flags: &[&str], script: &str) -> Result<String> {
        self.run_ok(flags, &["sh", "-c", script])
    }

    /// `ctr run -d`: starts a container that sleeps until it is ended.
    pub fn start_sleeper(&self, flags: &[&str], id: &str) -> Result<()> {
        self.start_detached(flags, id, &["sh", "-c", "trap 'exit 0' TERM; sleep 1000 & wait"])
    }

    /// `ctr run -d` of a command.
    pub fn start_detached(&self, flags: &[&str], id: &str, command: &[&str]) -> Result<()> {
        let flags: Vec<&str> = ["-d", "--null-io"].iter().chain(flags).copied().collect();
        self.run(&flags, id, command).output()?.ok()?;
        Ok(())
    }

    /// `ctr task exec --exec-id EXEC ID COMMAND`, not yet started.
    pub fn exec(&self, id: &str, exec: &str, command: &[&str]) -> Run {
        self.ctr().args(["task", "exec", "--exec-id", exec, id]).args(command)
    }

    /// `ctr task exec … sh -c SCRIPT`, which must succeed; its standard output.
    pub fn exec_ok(&self, id: &str, script: &str) -> Result<String> {
        Ok(self.exec(id, "e", &["sh", "-c", script]).output()?.ok()?.out())
    }

    /// Starts `ctr ARGS` on a new terminal.
    pub fn ctr_on_terminal(&self, args: &[&str], columns: u16, rows: u16) -> Result<(Pty, Proc)> {
        let settings = self.settings();
        let ctr = settings.containerd_dir.join("ctr");
        Pty::spawn(
            |setsid| {
                setsid
                    .arg(ctr)
                    .arg("--address")
                    .arg(self.node.address())
                    .args(["--namespace", self.node.namespace()])
                    .args(args)
            },
            columns,
            rows,
        )
    }

    /// Starts `ctr run -t …` on a new terminal.
    pub fn run_on_terminal(
        &self,
        flags: &[&str],
        id: &str,
        command: &[&str],
        (columns, rows): (u16, u16),
    ) -> Result<(Pty, Proc)> {
        let runtime = self.settings().runtime_name.clone();
        let args: Vec<&str> = ["run", "-t", "--runtime", &runtime]
            .iter()
            .chain(flags)
            .chain(&[IMAGE, id])
            .chain(command)
            .copied()
            .collect();
        self.ctr_on_terminal(&args, columns, rows)
    }

    /// The image's root file system as a plain directory of this test.
    pub fn rootfs(&self) -> Result<PathBuf> {
        let root = self.dir.join("rootfs");
        if !root.exists() {
            crate::image::unpack(&crate::image::busybox(), &root)?;
        }
        Ok(root)
    }

    /// A specification as containerd makes it, of a container in [`Context::rootfs`].
    pub fn spec(&self, id: &str, command: &[&str]) -> Result<Value> {
        Ok(spec::usual(&self.rootfs()?, &format!("/{}/{id}", self.node.namespace()), command))
    }

    /// Runs a container from a specification of the test's own: `change` alters containerd's usual one.
    pub fn run_spec(&self, id: &str, command: &[&str], change: impl FnOnce(&mut Value)) -> Result<Run> {
        let mut spec = self.spec(id, command)?;
        change(&mut spec);
        let path = self.write("config.json", serde_json::to_vec_pretty(&spec)?)?;
        let runtime = &self.settings().runtime_name;
        Ok(self.ctr().args(["run", "--rm", "--runtime", runtime, "--config"]).arg(path).arg(id))
    }

    /// Kills the task and removes the container: for what `ctr run -d` started.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.ctr().args(["task", "delete", "--force", id]).output()?.ok()?;
        self.ctr().args(["container", "delete", id]).output()?.ok()?;
        Ok(())
    }

    /// Subscribes to the events of this node's containers.
    pub fn events(&self) -> Result<Events> {
        let namespace = self.node.namespace().to_string();
        Events::subscribe(self.node.raw_ctr(), &namespace, |round| {
            let label = format!("mark={round}");
            self.ctr().args(["namespaces", "label", &namespace, &label]).output()?.ok()?;
            Ok(())
        })
    }

    /// Processes of the runtime that belong to this test: the shim, and what it started.
    pub fn processes(&self) -> Vec<ProcessInfo> {
        leak::processes(self.node).into_iter().collect()
    }

    /// The one process of the runtime whose program's name starts with `name`. Copies of itself that it has
    /// forked, to become other programs, do not count.
    pub fn process(&self, name: &str) -> Result<ProcessInfo> {
        let all = self.processes();
        let named = |p: &&ProcessInfo| p.name.starts_with(name);
        let forked = |p: &&ProcessInfo| all.iter().filter(named).any(|other| other.pid == p.parent);
        let mut found = all.iter().filter(named).filter(|p| !forked(p));
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one.clone()),
            (Some(_), Some(_)) => bail!("more than one process is a {name}: {all:#?}"),
            (None, _) => bail!("no process is a {name}: {all:#?}"),
        }
    }

    /// containerd's log since the test began.
    pub fn log(&self) -> String {
        self.node.log_text(self.log_start)
    }

    /// Waits until containerd's log, which has the shims' lines a little later than they are written, has a line of
    /// this test with all these words.
    pub fn log_says(&self, words: &[&str]) -> Result<()> {
        watch::log_says(&self.node.log_path(), self.log_start, &[words], 30)
    }

    pub(crate) fn log_tail(&self) -> String {
        if self.node.cluster_dir().exists() {
            return self.node.cluster_complaints();
        }
        self.node.log_since(self.log_start, 30)
    }

    /// Adds lines to the shim's configuration for the rest of this test: `section` may be empty.
    pub fn set_config(&mut self, section: &str, key: &str, value: toml::Value) -> Result<()> {
        self.changed_config = true;
        let path = self.node.bulkhead_config();
        let mut table: toml::Table = fs::read_to_string(&path)?.parse().context("parse bulkhead.toml")?;
        let mut target = &mut table;
        for part in section.split('.').filter(|p| !p.is_empty()) {
            let entry = target.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            target = entry.as_table_mut().with_context(|| format!("{part} is not a table"))?;
        }
        target.insert(key.into(), value);
        fs::write(&path, table.to_string()).context("write bulkhead.toml")
    }

    /// Replaces the shim's configuration by `text` for the rest of this test.
    pub fn write_config(&mut self, text: &str) -> Result<()> {
        self.changed_config = true;
        fs::write(self.node.bulkhead_config(), text).context("write bulkhead.toml")
    }

    /// Takes back what this test has changed in the shim's configuration.
    pub fn reset_config(&mut self) -> Result<()> {
        self.node.reset_bulkhead_config()
    }

    fn restore_config(&mut self) -> Result<()> {
        if self.changed_config { self.node.reset_bulkhead_config() } else { Ok(()) }
    }
}
