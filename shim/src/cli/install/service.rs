//! The service of systemd that runs a daemon: which it is, whether a restart of it spares the pods, and the restart.
//! Does not know what the daemon reads.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};

use super::super::process;

/// A daemon with many images takes its time to be ready again.
const PATIENCE: Duration = Duration::from_secs(120);

const SYSTEMCTL: &str = "systemctl";

/// The unit to which a process belongs, such as `containerd.service`.
pub(super) fn unit_of(pid: u32) -> Option<String> {
    unit(&std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
}

/// From `/proc/<pid>/cgroup`: systemd names a group like its unit, in the one hierarchy of version 2 or in its own.
fn unit(groups: &str) -> Option<String> {
    let path = groups.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        rest.strip_prefix("name=systemd:").or_else(|| rest.strip_prefix(':'))
    })?;
    // The unit itself, not a slice above it or a scope of something that it started.
    path.split('/').find(|part| part.ends_with(".service")).map(str::to_owned)
}

/// Whether a restart of the unit leaves alone what its daemon has started; the reason if not.
pub(super) fn spares_pods(unit: &str) -> anyhow::Result<()> {
    let mode = systemctl(&["show", "--property", "KillMode", "--value", unit])?;
    match mode.trim() {
        // systemd.kill(5): only the main process is ended.
        "process" | "none" => Ok(()),
        mode => bail!(
            "a restart of {unit} would end every pod of the node, for its KillMode is {mode:?}; set \
             KillMode=process in it, or use --no-restart and restart it when no pod runs"
        ),
    }
}

/// Restarts the unit, and returns when systemd says that it is ready.
pub(super) fn restart(unit: &str) -> anyhow::Result<()> {
    systemctl(&["restart", unit]).map(drop)
}

fn systemctl(arguments: &[&str]) -> anyhow::Result<String> {
    process::answer_within(Path::new(SYSTEMCTL), arguments, PATIENCE)
        .map_err(anyhow::Error::msg)
        .context(SYSTEMCTL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_found_in_both_versions_of_cgroups() {
        let unified = "0::/system.slice/containerd.service\n";
        let classic = "4:memory:/system.slice/x.service\n1:name=systemd:/system.slice/k3s.service/a\n";
        assert_eq!(unit(unified).as_deref(), Some("containerd.service"));
        assert_eq!(unit(classic).as_deref(), Some("k3s.service"));
        for none in ["0::/\n", "0::/user.slice/session-1.scope\n", ""] {
            assert_eq!(unit(none), None, "{none}");
        }
    }
}
