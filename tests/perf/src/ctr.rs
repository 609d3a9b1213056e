//! Runs `ctr` against the private containerd with a deadline, and stops the clock at its output or end.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// Longer than anything that is measured here takes, on a busy machine too.
const DEADLINE: Duration = Duration::from_secs(120);

/// A runtime that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runtime {
    Runc,
    Bulkhead,
}

impl Runtime {
    pub(crate) const ALL: [Self; 2] = [Self::Runc, Self::Bulkhead];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Bulkhead => "bulkhead",
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::Runc => "io.containerd.runc.v2",
            Self::Bulkhead => "io.containerd.bulkhead.v2",
        }
    }
}

/// What one command took and said.
#[derive(Debug)]
pub(crate) struct Run {
    /// Just before the process was made.
    pub(crate) began: std::time::SystemTime,
    /// Until the first byte on stdout, if any came.
    pub(crate) first_byte: Option<Duration>,
    /// Until the process had ended.
    pub(crate) total: Duration,
    pub(crate) stdout: String,
}

/// The client of one containerd.
pub(crate) struct Ctr {
    pub(crate) program: PathBuf,
    pub(crate) address: PathBuf,
    pub(crate) namespace: String,
    pub(crate) image: String,
}

impl Ctr {
    /// Runs a container to its end and removes it.
    pub(crate) async fn run(&self, runtime: Runtime, id: &str, command: &[&str]) -> anyhow::Result<Run> {
        self.start(runtime, &["--rm"], id, command).await
    }

    /// Starts a container that stays.
    pub(crate) async fn run_detached(
        &self,
        runtime: Runtime,
        id: &str,
        command: &[&str],
    ) -> anyhow::Result<Run> {
        self.start(runtime, &["--detach"], id, command).await
    }

    /// Starts a container that idles, with a folder of the host.
    pub(crate) async fn run_with_folder(
        &self,
        runtime: Runtime,
        id: &str,
        folder: &Path,
        at: &str,
    ) -> anyhow::Result<()> {
        let mount = format!("type=bind,src={},dst={at},options=rbind:rw", folder.display());
        let flags = ["--detach", "--mount", &mount];
        self.start(runtime, &flags, id, &["sleep", "100000"]).await.map(drop)
    }

    async fn start(
        &self,
        runtime: Runtime,
        flags: &[&str],
        id: &str,
        command: &[&str],
    ) -> anyhow::Result<Run> {
        let mut arguments = vec!["run", "--runtime", runtime.kind()];
        arguments.extend(flags);
        arguments.extend([self.image.as_str(), id]);
        arguments.extend(command);
        self.call(&arguments).await
    }

    /// Runs one more process in a container.
    pub(crate) async fn exec(&self, id: &str, exec_id: &str, command: &[&str]) -> anyhow::Result<Run> {
        let mut arguments = vec!["task", "exec", "--exec-id", exec_id, id];
        arguments.extend(command);
        self.call(&arguments).await
    }

    /// Kills and removes a container that stays.
    pub(crate) async fn remove(&self, id: &str) -> anyhow::Result<()> {
        self.call(&["task", "delete", "--force", id]).await?;
        self.call(&["container", "delete", id]).await.map(drop)
    }

    async fn call(&self, arguments: &[&str]) -> anyhow::Result<Run> {
        let mut command = Command::new(&self.program);
        command.args(["--address", path(&self.address)?, "--namespace", &self.namespace]);
        // Deprecations of the host are not ours to mend here.
        command.env("CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS", "1");
        call(command, "ctr", arguments).await
    }
}

/// Runs a client, called `name` in errors, with these further arguments; it must succeed.
pub(crate) async fn call(mut command: Command, name: &str, arguments: &[&str]) -> anyhow::Result<Run> {
    command.args(arguments);
    let shown = format!("{name} {}", arguments.join(" "));
    match tokio::time::timeout(DEADLINE, timed(command)).await {
        Err(_) => bail!("`{shown}` did not end within {} s", DEADLINE.as_secs()),
        Ok(run) => run.with_context(|| format!("`{shown}` failed")),
    }
}

fn path(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| format!("the path {} is not UTF-8", path.display()))
}

async fn timed(mut command: Command) -> anyhow::Result<Run> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let (began, clock) = (std::time::SystemTime::now(), Instant::now());
    let mut child = command.spawn()?;
    let (mut out, mut err) = (child.stdout.take().context("stdout")?, child.stderr.take().context("stderr")?);
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let read_out = async {
        let mut first = None;
        while out.read_buf(&mut stdout).await? > 0 {
            first.get_or_insert_with(|| clock.elapsed());
        }
        anyhow::Ok(first)
    };
    let (first_byte, said, status) = tokio::join!(read_out, err.read_to_end(&mut stderr), child.wait());
    let total = clock.elapsed();
    said?;
    let status = status?;
    ensure!(status.success(), "{status}: {}", String::from_utf8_lossy(&stderr).trim_end());
    Ok(Run { began, first_byte: first_byte?, total, stdout: String::from_utf8_lossy(&stdout).into_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str) -> anyhow::Result<Run> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(timed(command))
    }

    #[test]
    fn the_clock_stops_at_the_first_byte_and_at_the_end() {
        let run = run("echo first; sleep 0.2; echo second").unwrap();
        let first = run.first_byte.unwrap();
        assert!(first + Duration::from_millis(150) < run.total, "{run:?}");
        assert_eq!(run.stdout, "first\nsecond\n");
    }

    #[test]
    fn a_failure_carries_what_was_said() {
        let error = run("echo why >&2; exit 3").unwrap_err();
        assert_eq!(error.to_string(), "exit status: 3: why");
        assert_eq!(run("true").unwrap().first_byte, None);
    }
}
