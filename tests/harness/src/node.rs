//! A private containerd: started, made ready, restarted, killed and stopped by a worker thread.
//! Knows nothing of the tests.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Signal, pidfd_send_signal};

use crate::command::{Run, open_pidfd, readable, timespec};
use crate::image::{self, IMAGE};
use crate::leak;
use crate::pace::{self, stretched};
use crate::settings::Settings;

/// How long containerd may take to become ready, and to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A private containerd with the test image.
pub struct Node {
    settings: Arc<Settings>,
    dir: PathBuf,
    mark: String,
    cri: bool,
    nerdctl: bool,
    program: PathBuf,
    daemon: Option<Daemon>,
}

struct Daemon {
    child: Child,
    pidfd: OwnedFd,
}

impl Node {
    /// Starts containerd below `dir` and imports the image. The calling thread must be isolated already.
    pub(crate) fn start(settings: Arc<Settings>, dir: PathBuf, mark: String) -> Result<Self> {
        Self::bare(settings, dir, mark)?.begin()
    }

    /// The same with containerd's CRI, for pods.
    pub(crate) fn with_cri(settings: Arc<Settings>, dir: PathBuf, mark: String) -> Result<Self> {
        let mut node = Self::bare(settings, dir, mark)?;
        node.cri = true;
        node.prepare_network()?;
        let node = node.begin()?;
        node.import_pause()?;
        Ok(node)
    }

    /// The same with what nerdctl needs.
    pub(crate) fn with_nerdctl(settings: Arc<Settings>, dir: PathBuf, mark: String) -> Result<Self> {
        let mut node = Self::bare(settings, dir, mark)?;
        node.nerdctl = true;
        node.prepare_nerdctl()?;
        node.begin()
    }

    /// The same with a Kubernetes, whose nodes have containerds of their own.
    pub(crate) fn with_cluster(settings: Arc<Settings>, dir: PathBuf, mark: String) -> Result<Self> {
        let node = Self::bare(settings, dir, mark)?;
        if let Err(error) = node.start_cluster() {
            node.end_cluster().ok();
            return Err(error);
        }
        Ok(node)
    }

    /// The same without a containerd: the test plays it.
    pub(crate) fn bare(settings: Arc<Settings>, dir: PathBuf, mark: String) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        fs::create_dir_all(dir.join("bin"))
            .with_context(|| format!("create a folder in {}", dir.display()))?;
        let program = settings.containerd_dir.join("containerd");
        let node = Self { settings, dir, mark, cri: false, nerdctl: false, program, daemon: None };
        node.reset_bulkhead_config()?;
        Ok(node)
    }

    fn begin(mut self) -> Result<Self> {
        self.write_config()?;
        self.launch()?;
        self.import_image()?;
        Ok(self)
    }

    /// What is under test.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Everything of this node lies below.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The containerd namespace of its containers. CRI has one of its own.
    pub fn namespace(&self) -> &str {
        if self.cri { "k8s.io" } else { &self.mark }
    }

    /// A name that is unique on the machine, and part of the path of each cgroup of this node's containers.
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// containerd's socket.
    pub fn address(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    /// The configuration that the shim reads.
    pub fn bulkhead_config(&self) -> PathBuf {
        self.dir.join("bulkhead.toml")
    }

    /// Where containerd keeps the bundles of this node's containers.
    pub fn bundles(&self) -> PathBuf {
        self.dir.join("r/io.containerd.runtime.v2.task").join(self.namespace())
    }

    /// Where this containerd looks first for programs.
    pub fn bin(&self) -> PathBuf {
        self.dir.join("bin")
    }

    /// containerd's process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(|d| d.child.id())
    }

    /// A `ctr` command against this node.
    pub fn ctr(&self) -> Run {
        Run::new(self.settings.containerd_dir.join("ctr"))
            .arg("--address")
            .arg(self.address())
            .arg("--namespace")
            .arg(self.namespace())
            .env("PATH", &self.settings.path)
            // The machine may have cgroup v1 only; ctr's standard error is the test's to read.
            .env("CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS", "1")
    }

    /// The same for a caller that must hold the child itself.
    pub(crate) fn raw_ctr(&self) -> Command {
        let mut ctr = Command::new(self.settings.containerd_dir.join("ctr"));
        ctr.arg("--address").arg(self.address()).arg("--namespace").arg(self.namespace());
        ctr
    }

    /// Ends containerd as an administrator would, and starts it again.
    pub fn restart(&mut self) -> Result<()> {
        self.end(Signal::TERM)?;
        self.launch()
    }

    /// The same with a copy of its program in the folder `dir`, or with the usual one.
    pub fn restart_from(&mut self, dir: Option<&Path>) -> Result<()> {
        self.end(Signal::TERM)?;
        let usual = self.settings.containerd_dir.join("containerd");
        self.program = match dir {
            Some(dir) => {
                let copy = dir.join("containerd");
                fs::copy(&usual, &copy).with_context(|| format!("copy {}", usual.display()))?;
                copy
            }
            None => usual,
        };
        self.launch()
    }

    /// Kills containerd with SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.end(Signal::KILL)
    }

    /// Starts a containerd that was killed.
    pub fn launch(&mut self) -> Result<()> {
        let ready = ReadySocket::bind(&self.dir.join("n"))?;
        let log = File::options().create(true).append(true).open(self.log_path())?;
        // setpriv: should this process be killed, containerd is told to end.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "--"])
            .arg(&self.program)
            .arg("--config")
            .arg(self.dir.join("containerd.toml"))
            .env("PATH", format!("{}:{}", self.bin().display(), self.settings.path))
            .env("NOTIFY_SOCKET", &ready.path)
            .env("BULKHEAD_CONFIG", self.bulkhead_config())
            .env("BULKHEAD_FAILPOINT", self.failpoint())
            .stdin(Stdio::null())
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log))
            .spawn()
            .context("start containerd through setpriv (package util-linux)")?;
        let pidfd = open_pidfd(child.id())?;
        let daemon = self.daemon.insert(Daemon { child, pidfd });
        let is_ready = ready.wait(&daemon.pidfd);
        is_ready.with_context(|| format!("containerd did not become ready:\n{}", self.log_since(0, 20)))
    }

    fn end(&mut self, signal: Signal) -> Result<()> {
        let Some(mut daemon) = self.daemon.take() else { return Ok(()) };
        pidfd_send_signal(&daemon.pidfd, signal).ok();
        let in_time = readable(daemon.pidfd.as_fd(), stretched(PATIENCE))?;
        if !in_time {
            pidfd_send_signal(&daemon.pidfd, Signal::KILL).ok();
        }
        daemon.child.wait().context("wait for containerd")?;
        if !in_time {
            bail!("containerd did not end within {:?} after {signal:?}", stretched(PATIENCE));
        }
        Ok(())
    }

    /// Ends containerd and everything that belongs to this node, by force where it must be, and removes its files.
    pub(crate) fn destroy(mut self) -> Result<()> {
        let ended = self.end(Signal::TERM).and(self.end_cluster());
        leak::kill_all(&self);
        leak::remove_cgroups(&self.mark);
        leak::unmount_below(&self.dir);
        drop(self.daemon.take());
        ended.and(fs::remove_dir_all(&self.dir).with_context(|| format!("remove {}", self.dir.display())))
    }

    fn write_config(&self) -> Result<()> {
        let dir = self.dir.display();
        let version = if self.settings.is_containerd_1() { 2 } else { 3 };
        // CRI only where it is tested; the rest costs time at each start and is not what is tested here.
        let cri = [
            "io.containerd.grpc.v1.cri",
            "io.containerd.cri.v1.images",
            "io.containerd.cri.v1.runtime",
            "io.containerd.podsandbox.controller.v1.podsandbox",
        ];
        let others = [
            "io.containerd.nri.v1.nri",
            "io.containerd.snapshotter.v1.devmapper",
            "io.containerd.snapshotter.v1.zfs",
        ];
        let disabled: Vec<&str> = cri.iter().filter(|_| !self.cri).chain(&others).copied().collect();
        let cri = if self.cri { self.cri_config()? } else { String::new() };
        // Else it looks for what is to be restarted every 10 s.
        let restart = if self.nerdctl {
            "[plugins.\"io.containerd.monitor.container.v1.restart\"]\n  interval = \"1s\"\n"
        } else {
            ""
        };
        let text = format!(
            r#"version = {version}
root = "{dir}/d"
state = "{dir}/r"
disabled_plugins = {disabled:?}
[grpc]
  address = "{dir}/c.sock"
[debug]
  address = "{dir}/debug.sock"
  level = "debug"
[plugins."io.containerd.internal.v1.opt"]
  path = "{dir}/opt"
{restart}{cri}{}"#,
            timeouts()
        );
        fs::write(self.dir.join("containerd.toml"), text).context("write containerd.toml")
    }

    /// Writes the configuration that the suite was given, or an empty one. A guest gets more time to boot
    /// and to answer than users grant it: the machine that tests is often busy, and that is not what is tested.
    pub(crate) fn reset_bulkhead_config(&self) -> Result<()> {
        let text = match &self.settings.config {
            Some(path) => fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?,
            None => String::new(),
        };
        let mut table: toml::Table = text.parse().context("parse the suite's configuration")?;
        for (section, key) in [("hypervisor", "boot_timeout_seconds"), ("agent", "request_timeout_seconds")] {
            let section = table.entry(section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            if let Some(section) = section.as_table_mut() {
                section.entry(key).or_insert(600.into());
            }
        }
        fs::write(self.bulkhead_config(), table.to_string()).context("write bulkhead.toml")
    }

    fn import_image(&self) -> Result<()> {
        let archive = self.dir.join("image.tar");
        image::write_archive(&image::busybox(), &archive)?;
        self.ctr().args(["image", "import"]).arg(&archive).output()?.ok().context("import the test image")?;
        fs::remove_file(&archive).context("remove the archive")?;
        let listed = self.ctr().args(["image", "ls", "-q"]).output()?.ok()?.out();
        if !listed.lines().any(|l| l == IMAGE) {
            bail!("the imported image is not {IMAGE} but {listed}");
        }
        Ok(())
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// The present length of containerd's log.
    pub fn log_position(&self) -> u64 {
        fs::metadata(self.log_path()).map_or(0, |m| m.len())
    }

    /// The log's text from `position` on.
    pub fn log_text(&self, position: u64) -> String {
        let mut text = Vec::new();
        if let Ok(mut file) = File::open(self.log_path())
            && file.seek(SeekFrom::Start(position)).is_ok()
        {
            file.read_to_end(&mut text).ok();
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The last `lines` lines of the log from `position` on, without the debug level.
    pub(crate) fn log_since(&self, position: u64, lines: usize) -> String {
        let text = self.log_text(position);
        let kept: Vec<&str> = text.lines().filter(|l| !l.contains("level=debug")).collect();
        kept[kept.len().saturating_sub(lines)..].join("\n")
    }
}

/// containerd's own deadlines, in seconds as it has them by default, as a table of its configuration.
fn timeouts() -> String {
    let defaults = [("shim.load", 5), ("shim.cleanup", 5), ("shim.shutdown", 3), ("task.state", 2)];
    let lines = defaults.map(|(name, seconds)| {
        format!("\"io.containerd.timeout.{name}\" = \"{}s\"\n", seconds * pace::factor())
    });
    format!("[timeouts]\n{}", lines.concat())
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.end(Signal::TERM));
    }
}

/// systemd's readiness protocol (sd_notify(3)), which containerd speaks: no need to knock at its socket.
struct ReadySocket {
    socket: UnixDatagram,
    path: PathBuf,
}

impl ReadySocket {
    fn bind(path: &Path) -> Result<Self> {
        fs::remove_file(path).ok();
        let socket = UnixDatagram::bind(path).with_context(|| format!("bind {}", path.display()))?;
        Ok(Self { socket, path: path.to_path_buf() })
    }

    fn wait(&self, pidfd: &OwnedFd) -> Result<()> {
        let mut buffer = [0; 256];
        loop {
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN), PollFd::new(pidfd, PollFlags::IN)];
            if poll(&mut fds, Some(&timespec(stretched(PATIENCE)))).context("poll")? == 0 {
                bail!("nothing heard for {:?}", stretched(PATIENCE));
            }
            let message = fds[0].revents().contains(PollFlags::IN);
            if message {
                let n = self.socket.recv(&mut buffer)?;
                if String::from_utf8_lossy(&buffer[..n]).lines().any(|l| l == "READY=1") {
                    return Ok(());
                }
            } else if !fds[1].revents().is_empty() {
                bail!("it has ended");
            }
        }
    }
}

impl Drop for ReadySocket {
    fn drop(&mut self) {
        fs::remove_file(&self.path).ok();
    }
}
