//! What nerdctl needs to work against a node: its configuration, its default network in the node's own namespace,
//! a place for CNI's books; and `nerdctl`. Knows nerdctl's settings; not what a test does with it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::mount::{MountFlags, mount};

use crate::command::{Proc, Run};
use crate::context::Context;
use crate::cri::variable;
use crate::image::IMAGE;
use crate::node::Node;
use crate::pty::Pty;

/// nerdctl's default bridge. Made before the first container, and gone with the node's network namespace.
const BRIDGE: &str = "nerdctl0";
/// Where CNI keeps addresses that were given and results that it may want again.
const BOOKS: &str = "/var/lib/cni";

impl Node {
    /// Makes the surroundings of nerdctl. The calling thread must be isolated already.
    pub(crate) fn prepare_nerdctl(&self) -> Result<()> {
        for args in [vec!["link", "add", BRIDGE, "type", "bridge"], vec!["link", "set", BRIDGE, "up"]] {
            Run::new("ip").args(args).output()?.ok().context("make nerdctl's bridge")?;
        }
        fs::create_dir_all(BOOKS).with_context(|| format!("create {BOOKS}"))?;
        mount("tmpfs", BOOKS, "tmpfs", MountFlags::empty(), c"mode=700")
            .context("mount private books of CNI")?;
        let (dir, plugins) =
            (self.dir().display(), variable("BULKHEAD_TEST_CNI", "tests/parts/cni-plugins")?);
        let text = format!(
            "address = \"{dir}/c.sock\"\nnamespace = \"{}\"\ndata_root = \"{dir}/n\"\n\
             cni_path = \"{}\"\ncni_netconfpath = \"{dir}/net.d\"\ncgroup_manager = \"cgroupfs\"\n\
             hosts_dir = [\"{dir}/hosts.d\"]\n",
            self.mark(),
            plugins.display()
        );
        fs::write(self.nerdctl_toml(), text).context("write nerdctl.toml")?;
        fs::create_dir_all(self.dir().join("net.d")).context("make the folder of networks")
    }

    fn nerdctl_toml(&self) -> PathBuf {
        self.dir().join("nerdctl.toml")
    }

    /// A `nerdctl` command against this node.
    pub fn nerdctl(&self) -> Result<Run> {
        let program = variable("BULKHEAD_TEST_NERDCTL", "tests/parts/nerdctl")?;
        Ok(self.for_nerdctl(Run::new(program)))
    }

    fn for_nerdctl(&self, run: Run) -> Run {
        run.env("NERDCTL_TOML", self.nerdctl_toml()).env("PATH", &self.settings().path)
    }
}

/// Files and folders below /run that nerdctl makes once, or for a container, and keeps.
pub(crate) fn is_nerdctls_own(path: &Path) -> bool {
    path.starts_with("/run/nerdctl") || path == Path::new("/run/xtables.lock")
}

impl Context<'_> {
    /// A `nerdctl` command.
    pub fn nerdctl(&self) -> Result<Run> {
        self.node_ref().nerdctl()
    }

    /// `nerdctl ARGS`, waited for, which must succeed; its standard output.
    pub fn nerdctl_ok(&self, args: &[&str]) -> Result<String> {
        Ok(self.nerdctl()?.args(args).output()?.ok()?.out())
    }

    /// `nerdctl run --runtime R FLAGS IMAGE COMMAND`, not yet started.
    pub fn nerdctl_run(&self, flags: &[&str], command: &[&str]) -> Result<Run> {
        Ok(self.nerdctl()?.args(self.nerdctl_run_args(flags, command)))
    }

    fn nerdctl_run_args<'a>(&'a self, flags: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
        let runtime = self.settings().runtime_name.as_str();
        ["run", "--pull", "never", "--runtime", runtime]
            .iter()
            .chain(flags)
            .chain(&[IMAGE])
            .chain(command)
            .copied()
            .collect()
    }

    /// The same by a nerdctl to whom /etc has the files of `etc` before its own, and with words before `run`.
    pub fn nerdctl_run_with_etc(
        &self,
        etc: &Path,
        before: &[&str],
        flags: &[&str],
        command: &[&str],
    ) -> Result<Run> {
        let program = variable("BULKHEAD_TEST_NERDCTL", "tests/parts/nerdctl")?;
        let script = "mount -n -t overlay -o lowerdir=\"$0\":/etc overlay /etc && exec \"$@\"";
        let run = Run::new("unshare").args(["--mount", "sh", "-c", script]).arg(etc).arg(program);
        Ok(self.node_ref().for_nerdctl(run).args(before).args(self.nerdctl_run_args(flags, command)))
    }

    /// Starts `nerdctl run -it …` on a new terminal.
    pub fn nerdctl_on_terminal(&self, flags: &[&str], command: &[&str]) -> Result<(Pty, Proc)> {
        let program = variable("BULKHEAD_TEST_NERDCTL", "tests/parts/nerdctl")?;
        let flags: Vec<&str> = ["-it"].iter().chain(flags).copied().collect();
        let args = self.nerdctl_run_args(&flags, command);
        Pty::spawn(|setsid| self.node_ref().for_nerdctl(setsid.arg(program).args(args)), 90, 20)
    }

    /// `nerdctl run -d --name NAME FLAGS IMAGE sh -c SCRIPT`; the container's id.
    pub fn nerdctl_start(&self, name: &str, flags: &[&str], script: &str) -> Result<String> {
        let flags: Vec<&str> = ["-d", "--name", name].iter().chain(flags).copied().collect();
        Ok(self.nerdctl_run(&flags, &["sh", "-c", script])?.output()?.ok()?.out())
    }

    /// `nerdctl exec NAME sh -c SCRIPT`, which must succeed; its standard output.
    pub fn nerdctl_exec(&self, name: &str, script: &str) -> Result<String> {
        self.nerdctl_ok(&["exec", name, "sh", "-c", script])
    }
}
