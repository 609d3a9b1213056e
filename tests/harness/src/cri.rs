//! What containerd needs so that its CRI makes pods: handlers, a network in the node's own namespace, a pause
//! image; and `crictl`. Knows CRI's configuration; not what a test does with a pod.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use crate::command::{Proc, Run};
use crate::context::Context;
use crate::image::IMAGE;
use crate::node::Node;
use crate::pty::Pty;

/// The image of pause containers, as tests/parts/pause-image names it.
const PAUSE: &str = "localhost/bulkhead/pause:latest";
/// A handler whose program is named by `runtime_path`, with a pause container.
pub const BY_PATH: &str = "by-path";
/// The same by the sandbox API; not with containerd 1.
pub const BY_PATH_AND_API: &str = "by-path-and-api";
/// A handler of the first kind with options of its own: each machine has [`OPTIONS_MEMORY_MIB`] for its containers.
pub const WITH_OPTIONS: &str = "with-options";
/// The same by the sandbox API; not with containerd 1.
pub const WITH_OPTIONS_AND_API: &str = "with-options-and-api";
/// What the options say, in MiB.
pub const OPTIONS_MEMORY_MIB: u64 = 400;
/// The node's bridge, in its own network namespace. Made before the first pod, and gone with the namespace.
const BRIDGE: &str = "cni0";

impl Node {
    /// The part of containerd's configuration that belongs to CRI.
    pub(crate) fn cri_config(&self) -> Result<String> {
        let dir = self.dir().display();
        let plugins = variable("BULKHEAD_TEST_CNI", "tests/parts/cni-plugins")?;
        let settings = self.settings();
        let old = settings.is_containerd_1();
        let section = if old { "io.containerd.grpc.v1.cri" } else { "io.containerd.cri.v1.runtime" };
        let mut text = if old {
            format!(
                "[plugins.\"{section}\"]\n  sandbox_image = \"{PAUSE}\"\n  restrict_oom_score_adj = true\n  \
                 netns_mounts_under_state_dir = true\n  stream_server_address = \"127.0.0.1\"\n  \
                 stream_server_port = \"0\"\n[plugins.\"{section}\".cni]\n  bin_dir = \"{plugins}\"\n  \
                 conf_dir = \"{dir}/cni\"\n",
                plugins = plugins.display()
            )
        } else {
            // A list since 2.1.
            let bin = if settings.version.starts_with("2.0.") {
                format!("bin_dir = \"{}\"", plugins.display())
            } else {
                format!("bin_dirs = [\"{}\"]", plugins.display())
            };
            format!(
                "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\n  sandbox = \"{PAUSE}\"\n\
                 [plugins.\"{section}\"]\n  restrict_oom_score_adj = true\n  \
                 netns_mounts_under_state_dir = true\n[plugins.\"{section}\".cni]\n  \
                 {bin}\n  conf_dir = \"{dir}/cni\"\n\
                 [plugins.\"io.containerd.grpc.v1.cri\"]\n  stream_server_address = \"127.0.0.1\"\n  \
                 stream_server_port = \"0\"\n"
            )
        };
        text += &format!("[plugins.\"{section}\".containerd]\n  default_runtime_name = \"runc\"\n");
        for (name, kind) in [
            ("runc", "io.containerd.runc.v2"),
            ("bulkhead", "io.containerd.bulkhead.v2"),
            ("bulkhead-podsandbox", "io.containerd.bulkhead.v2"),
        ] {
            text += &format!(
                "[plugins.\"{section}\".containerd.runtimes.{name}]\n  runtime_type = \"{kind}\"\n  \
                 pod_annotations = [\"io.bulkhead.*\"]\n  privileged_without_host_devices = true\n"
            );
            if name == "bulkhead" && !old {
                text += "  sandboxer = \"shim\"\n";
            }
        }
        // A type that is on nobody's PATH, and where its program is.
        if let Ok(program) = settings.program("containerd-shim-bulkhead-v2") {
            for (name, sandboxer) in [(BY_PATH, "podsandbox"), (BY_PATH_AND_API, "shim")] {
                if old && sandboxer == "shim" {
                    continue;
                }
                text += &format!(
                    "[plugins.\"{section}\".containerd.runtimes.{name}]\n  \
                     runtime_type = \"io.containerd.elsewhere.v2\"\n  runtime_path = \"{}\"\n",
                    program.display()
                );
                if !old {
                    text += &format!("  sandboxer = \"{sandboxer}\"\n");
                }
            }
        }
        for (name, sandboxer) in [(WITH_OPTIONS, "podsandbox"), (WITH_OPTIONS_AND_API, "shim")] {
            if old && sandboxer == "shim" {
                continue;
            }
            let handler = format!("[plugins.\"{section}\".containerd.runtimes.{name}");
            text += &format!(
                "{handler}]\n  runtime_type = \"io.containerd.bulkhead.v2\"\n  \
                 pod_annotations = [\"io.bulkhead.*\"]\n"
            );
            if !old {
                text += &format!("  sandboxer = \"{sandboxer}\"\n");
            }
            text += &format!("{handler}.options.sandbox]\n  memory_mib = {OPTIONS_MEMORY_MIB}\n");
        }
        Ok(text)
    }

    /// Makes the bridge and CNI's configuration for it.
    pub(crate) fn prepare_network(&self) -> Result<()> {
        for args in [vec!["link", "add", BRIDGE, "type", "bridge"], vec!["link", "set", BRIDGE, "up"]] {
            Run::new("ip").args(args).output()?.ok().context("make the bridge of the pods")?;
        }
        let conf = self.dir().join("cni");
        fs::create_dir_all(&conf).context("make the folder of CNI's configuration")?;
        let list = serde_json::json!({
            "cniVersion": "1.0.0",
            "name": self.mark(),
            "plugins": [{
                "type": "bridge", "bridge": BRIDGE, "isGateway": true,
                "ipam": {
                    "type": "host-local", "dataDir": self.dir().join("cni-state"),
                    "ranges": [[{"subnet": "10.88.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}],
                },
            }],
        });
        fs::write(conf.join("10-pods.conflist"), list.to_string()).context("write CNI's configuration")
    }

    /// Imports what CRI takes for its pause containers.
    pub(crate) fn import_pause(&self) -> Result<()> {
        let archive = variable("BULKHEAD_TEST_PAUSE", "tests/parts/pause-image")?;
        self.ctr().args(["image", "import"]).arg(archive).output()?.ok().context("import the pause image")?;
        Ok(())
    }

    /// A `crictl` command against this node.
    pub fn crictl(&self) -> Result<Run> {
        let (crictl, args) = self.crictl_parts()?;
        Ok(Run::new(crictl).args(args))
    }

    /// The program `crictl`, and what makes it speak with this node.
    fn crictl_parts(&self) -> Result<(PathBuf, Vec<String>)> {
        let endpoint = format!("unix://{}", self.address().display());
        let crictl = variable("BULKHEAD_TEST_CRI_TOOLS", "tests/parts/cri-tools")?.join("crictl");
        // No file of the machine's user may speak along.
        let config = self.dir().join("crictl.yaml");
        // Once: another crictl may be about to read it, and would find it empty.
        if !config.exists() {
            fs::write(&config, format!("timeout: {}\n", 120 * crate::pace::factor()))
                .context("write crictl.yaml")?;
        }
        let config = config.display().to_string();
        let options = ["--config", &config, "--runtime-endpoint", &endpoint, "--image-endpoint", &endpoint];
        Ok((crictl, options.map(str::to_owned).to_vec()))
    }
}

pub(crate) fn variable(name: &str, script: &str) -> Result<PathBuf> {
    match std::env::var_os(name).filter(|value| !value.is_empty()) {
        Some(value) => Ok(value.into()),
        None => bail!("{name} is not set: it is what {script} prints"),
    }
}

/// A pod that a test has made. Whoever makes it removes it.
pub struct Pod {
    /// Its id.
    pub id: String,
    /// Its configuration, which crictl wants again for each container.
    config: PathBuf,
}

impl Pod {
    /// One that [`Context::runp`] has made from `config`.
    pub fn made(id: String, config: PathBuf) -> Self {
        Self { id, config }
    }
}

impl Context<'_> {
    /// `crictl ARGS`, waited for, which must succeed; its standard output.
    pub fn crictl_ok(&self, args: &[&str]) -> Result<String> {
        Ok(self.crictl()?.args(args).output()?.ok()?.out())
    }

    /// Starts `crictl ARGS` on a new terminal.
    pub fn crictl_on_terminal(&mut self, args: &[&str], columns: u16, rows: u16) -> Result<(Pty, Proc)> {
        let (crictl, options) = self.node().crictl_parts()?;
        Pty::spawn(|setsid| setsid.arg(crictl).args(options).args(args), columns, rows)
    }

    /// The configuration of a pod called `name`; `change` alters the usual one.
    pub fn pod_config(
        &self,
        name: &str,
        change: impl FnOnce(&mut serde_json::Value),
    ) -> Result<serde_json::Value> {
        let mut config = serde_json::json!({
            "metadata": {"name": name, "namespace": "test", "uid": name, "attempt": 0},
            "hostname": name,
            "log_directory": self.dir().join("logs"),
            // The kubelet makes and removes the cgroup of a pod; here it is the node.
            "linux": {"cgroup_parent": format!("/{}", self.mark())},
        });
        change(&mut config);
        Ok(config)
    }

    /// `crictl runp` of such a pod, not yet started.
    pub fn runp(&self, name: &str, config: &serde_json::Value) -> Result<(Run, PathBuf)> {
        let path = self.write(&format!("{name}.json"), config.to_string())?;
        let handler = &self.settings().handler;
        Ok((self.crictl()?.args(["runp", "--runtime", handler]).arg(&path), path))
    }

    /// Makes a pod.
    pub fn pod(&self, name: &str, change: impl FnOnce(&mut serde_json::Value)) -> Result<Pod> {
        let config = self.pod_config(name, change)?;
        let (run, config) = self.runp(name, &config)?;
        Ok(Pod { id: run.output()?.ok()?.out(), config })
    }

    /// Creates a container of `pod` that runs a shell script, not yet started; `change` alters its configuration.
    pub fn create_in(
        &self,
        pod: &Pod,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut serde_json::Value),
    ) -> Result<String> {
        let mut config = serde_json::json!({
            "metadata": {"name": name},
            "image": {"image": IMAGE},
            "command": ["sh", "-c", script],
            "log_path": format!("{name}.log"),
            "linux": {},
        });
        change(&mut config);
        let path = self.write(&format!("{name}.container.json"), config.to_string())?;
        let create = self.crictl()?.args(["create", &pod.id]).arg(path).arg(&pod.config);
        Ok(create.output()?.ok()?.out())
    }

    /// The same, and starts it.
    pub fn run_in(&self, pod: &Pod, name: &str, script: &str) -> Result<String> {
        let id = self.create_in(pod, name, script, |_| {})?;
        self.crictl_ok(&["start", &id])?;
        Ok(id)
    }

    /// `crictl exec ID sh -c SCRIPT`, which must succeed; its standard output.
    pub fn exec_in(&self, id: &str, script: &str) -> Result<String> {
        self.crictl_ok(&["exec", id, "sh", "-c", script])
    }

    /// Stops and removes a pod with all that is in it.
    pub fn remove_pod(&self, pod: &Pod) -> Result<()> {
        self.crictl_ok(&["stopp", &pod.id])?;
        self.crictl_ok(&["rmp", &pod.id])?;
        Ok(())
    }
}
