//! The containerd that is told of bulkhead: its version, what it is configured to, and its restart.
//! Writes no file.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use nix::unistd::{SysconfVar, sysconf};

use super::super::containerd::{self, DEFAULT_CONFIG};
use super::changes::Changes;
use super::{Place, service};

/// The containerd that is told.
pub(super) struct Told {
    /// Its pid, if it runs.
    pub(super) daemon: Option<u32>,
    pub(super) program: PathBuf,
    pub(super) main: PathBuf,
}

impl Told {
    /// The one that listens at the socket, or the one that would.
    pub(super) fn find(place: &Place) -> anyhow::Result<Self> {
        let daemon = containerd::listening(&containerd::plain(place.containerd.address())).ok();
        let main = || place.containerd_config.clone();
        if let Some(daemon) = daemon {
            return Ok(Self {
                daemon: Some(daemon.pid),
                program: daemon.program,
                main: main().unwrap_or(daemon.config),
            });
        }
        let search = std::env::var_os("PATH").unwrap_or_default();
        let program = containerd::on_path("containerd", &search).context(
            "there is no containerd: none answers at the socket (see --address), and none is on PATH; install \
             containerd 1.7 or later first",
        )?;
        Ok(Self { daemon: None, program, main: main().unwrap_or_else(|| DEFAULT_CONFIG.into()) })
    }

    pub(super) fn version(&self) -> anyhow::Result<(u32, u32)> {
        let said = containerd::version(&self.program)
            .map_err(|reason| anyhow::anyhow!("{} {reason}", self.program.display()))?;
        let number = containerd::number(&said).filter(|number| *number >= (1, 7));
        number.with_context(|| format!("containerd is {said}; bulkhead needs 1.7 or later"))
    }

    /// The whole configuration that it has with the files as they are.
    pub(super) fn configuration(&self) -> anyhow::Result<toml::Table> {
        let dump = containerd::dump(&self.program, &self.main)
            .map_err(|reason| anyhow::anyhow!("{} {reason}", self.program.display()))?;
        toml::from_str(&dump).context("`containerd config dump` is not TOML")
    }

    /// Whether the daemon has been running since before a file was written, and so does not know it.
    pub(super) fn older_than(&self, file: &Path) -> bool {
        let written = fs::metadata(file).and_then(|file| file.modified());
        let started = self.daemon.and_then(started);
        matches!((started, written), (Some(started), Ok(written)) if started < written)
    }

    /// Restarts the daemon if it runs, by the service that runs it; answers what is to be said of it.
    fn restart(&self, allowed: bool) -> anyhow::Result<[String; 2]> {
        let Some(pid) = self.daemon else {
            return Ok([
                "to start".into(),
                "containerd does not run; it finds bulkhead when it starts".into(),
            ]);
        };
        let unit = service::unit_of(pid);
        match unit {
            Some(unit) if allowed => {
                service::spares_pods(&unit)?;
                service::restart(&unit)?;
                Ok(["restarted".into(), format!("{unit}; its pods go on")])
            }
            unit => {
                let what = unit.map_or_else(
                    || format!("containerd (pid {pid}), which no service of systemd runs"),
                    |unit| format!("{unit}: systemctl restart {unit}"),
                );
                Ok(["to restart".into(), format!("{what}; until then it does not know the change")])
            }
        }
    }
}

/// When a process was started.
fn started(pid: u32) -> Option<SystemTime> {
    let ticks = crate::process::start_time(pid.try_into().ok()?).ok()??;
    let per_second = u64::try_from(sysconf(SysconfVar::CLK_TCK).ok()??).ok()?;
    // Both count from the boot, with the time that the machine slept (proc_pid_stat(5), proc_uptime(5)).
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let uptime = Duration::from_secs_f64(uptime.split_whitespace().next()?.parse().ok()?);
    let age = uptime.checked_sub(Duration::from_millis(ticks * 1000 / per_second))?;
    SystemTime::now().checked_sub(age)
}

/// Restarts containerd, and where that fails once more with the files as they were, so that the node serves again.
pub(super) fn restart(told: &Told, changes: &mut Changes, allowed: bool) -> anyhow::Result<[String; 2]> {
    told.restart(allowed).map_err(|error| {
        let left = changes.take_back();
        let left = left.iter().map(|left| format!("; not taken back: {left}")).collect::<String>();
        let again = told.restart(allowed).err();
        let again = again.map(|error| format!("; with the files as they were, too: {error:#}"));
        error.context(format!("containerd could not be restarted{left}{}", again.unwrap_or_default()))
    })
}
