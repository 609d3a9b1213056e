//! `bulkhead collect`: everything that a report of a fault needs, in one archive.
//! Reads what `bulkhead` itself and its shims have written, and facts of the host; never a container's files, its
//! output or its environment. What cannot be had is said in the archive and hides nothing else.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::Args;
use flate2::{Compression, write::GzEncoder};
use serde::Serialize;

use super::pods::{self, Found};
use super::{check, logs, metrics, process, ps, version};
use crate::config::{Config, Source};
use crate::ledger;

/// Files of the host that say what it is. None of them knows a pod.
const HOST_FILES: [&str; 8] = [
    "/etc/os-release",
    "/proc/version",
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/uptime",
    "/proc/cgroups",
    "/proc/sys/kernel/pid_max",
    "/proc/sys/fs/file-nr",
];

const README: &str = "\
What `bulkhead collect` has put together, for a report of a fault:

  version.json   what is installed
  check.json     what `bulkhead check` finds
  config.toml    the configuration file, if there is one
  ps.json        what `bulkhead ps` lists
  host/          the host's system, kernel, first processor, memory and load
  pods/<16 hex digits>/   for each pod what its shim keeps in its directory (which is which says ps.json):
      state.json     machine and containers: ids, pids, status
      ledger         what the pod holds on the host: processes, mounts, files, groups
      shim.log       the last lines of the shim's log
      console.log    the last lines of the guest's console: what its kernel, the agent and privileged
                     containers have written there
      metrics.txt    its figures
      processes.txt  name and state of each of its processes on the host
  errors.txt     what could not be had, and why

There is nothing here of containers' files, output, arguments or environment. There are names of pods and
containers and paths of their mounts. Bulkhead's configuration has no secrets; kernel parameters are the
administrator's.
Look through it before you hand it on.
";

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// File to make [default: bulkhead-report-SECONDS.tar.gz in this directory]
    #[arg(short, long, value_name = "FILE.tar.gz")]
    output: Option<PathBuf>,
    #[command(flatten)]
    containerd: check::Containerd,
}

pub(super) fn run(arguments: &Arguments, config: Option<&Path>, out: &mut dyn Write) -> anyhow::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let name = format!("bulkhead-report-{now}");
    let path = arguments.output.clone().unwrap_or_else(|| format!("{name}.tar.gz").into());
    // Never over something that is there.
    let file = File::options().write(true).create_new(true).mode(0o600).open(&path);
    let file = file.with_context(|| format!("cannot make {}", path.display()))?;
    let written = write(file, &name, now, config, &arguments.containerd);
    let errors = written.inspect_err(|_| drop(std::fs::remove_file(&path)));
    let errors = errors.with_context(|| format!("cannot write {}", path.display()))?;
    for error in errors {
        eprintln!("bulkhead: left out: {error}");
    }
    Ok(writeln!(out, "{}", path.display())?)
}

/// Writes the archive and answers what it lacks.
fn write(
    file: File,
    name: &str,
    now: u64,
    config: Option<&Path>,
    containerd: &check::Containerd,
) -> io::Result<Vec<String>> {
    let archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
    let mut report = Report { archive, root: name.into(), now, errors: Vec::new() };
    report.add("README.txt", README)?;
    let source = Source::find(config);
    if let Some(path) = source.path() {
        report.try_add("config.toml", std::fs::read(path).with_context(|| path.display().to_string()))?;
    }
    // As for `bulkhead check`: a configuration that cannot be read is a finding, and the defaults hold.
    let config = Config::load_from(&source).unwrap_or_else(|error| {
        report.errors.push(format!("the configuration, so the defaults are taken: {error}"));
        Config::default()
    });
    report.json("version.json", &version::versions(&config))?;
    report.json("check.json", &containerd.answer(&source))?;
    match ps::pods(&config.state_dir) {
        Ok((pods, unread)) => {
            report.errors.extend(unread);
            report.json("ps.json", &pods)?;
        }
        Err(error) => report.errors.push(format!("ps.json: {error:#}")),
    }
    for path in HOST_FILES.map(Path::new) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let content = std::fs::read(path).with_context(|| path.display().to_string());
        report.try_add(&format!("host/{name}"), content)?;
    }
    report.try_add("host/cpuinfo", first_processor().context("/proc/cpuinfo"))?;
    if let Ok((pods, _)) = pods::find(&config.state_dir) {
        report.pods(&pods)?;
    }
    report.finish()
}

/// The processors of a machine are alike; one is enough.
fn first_processor() -> io::Result<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo")?;
    let count = text.lines().filter(|line| line.starts_with("processor")).count();
    Ok(format!("{}\n\n({count} in all)\n", text.split("\n\n").next().unwrap_or_default()))
}

struct Report {
    archive: tar::Builder<GzEncoder<File>>,
    /// The directory in the archive.
    root: PathBuf,
    now: u64,
    errors: Vec<String>,
}

impl Report {
    fn add(&mut self, name: &str, content: impl AsRef<[u8]>) -> io::Result<()> {
        let content = content.as_ref();
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.now);
        self.archive.append_data(&mut header, self.root.join(name), content)
    }

    fn try_add(&mut self, name: &str, content: anyhow::Result<impl AsRef<[u8]>>) -> io::Result<()> {
        match content {
            Ok(content) => self.add(name, content),
            Err(error) => {
                self.errors.push(format!("{name}: {error:#}"));
                Ok(())
            }
        }
    }

    fn json(&mut self, name: &str, value: &impl Serialize) -> io::Result<()> {
        self.try_add(name, serde_json::to_vec_pretty(value).map_err(anyhow::Error::from))
    }

    fn pods(&mut self, pods: &[Found]) -> io::Result<()> {
        let scraped = metrics::scrape(pods);
        let pages = scraped.unwrap_or_else(|error| {
            self.errors.push(format!("metrics.txt of every pod: {error:#}"));
            Vec::new()
        });
        let mut pages = pages.into_iter();
        for pod in pods {
            let digits = pod.dir.file_name().unwrap_or_default().to_string_lossy();
            let place = |name: &str| format!("pods/{digits}/{name}");
            for name in ["state.json", ledger::FILE_NAME] {
                let content = std::fs::read(pod.dir.join(name)).map_err(anyhow::Error::from);
                self.try_add(&place(name), content)?;
            }
            for part in logs::Part::ALL {
                let lines = logs::lines(&pod.dir, part).map(|(lines, _)| lines);
                self.try_add(&place(part.file()), lines)?;
            }
            self.add(&place("processes.txt"), processes(pod))?;
            if let Some(page) = pages.next() {
                self.try_add(&place("metrics.txt"), page.map(|page| page.to_string()))?;
            }
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<Vec<String>> {
        let mut errors = self.errors.join("\n");
        errors.push('\n');
        self.add("errors.txt", errors)?;
        self.archive.into_inner()?.finish()?.sync_all()?;
        Ok(self.errors)
    }
}

/// Name and state of each process of a pod on the host. Not their arguments: a logging program's may be secret.
fn processes(pod: &Found) -> String {
    let family = match pod.status() {
        pods::Status::Dead => Vec::new(),
        _ => process::family(pod.state.shim_pid),
    };
    let line = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let state = status.lines().find_map(|line| line.strip_prefix("State:"))?.trim();
        Some(format!("{pid} {} {state}\n", process::name(pid)?))
    };
    family.into_iter().filter_map(line).collect()
}
