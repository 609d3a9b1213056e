//! A pod's life through `crictl`, whatever happens on the way; then it is removed by force.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Exit, IMAGE, Output, Proc, wait_for_exit};
use serde_json::{Value, json};

use crate::{COMMAND, PATIENCE, STATUS, Told, case, directory};

const SHIM: &str = "containerd-shim-bulkhead-v2";
/// How often a user tries to remove a pod.
const ATTEMPTS: u32 = 5;

pub(crate) fn life(t: &mut Context<'_>) -> Result<()> {
    let (place, action) = case(t)?;
    let mut told = Told::default();
    t.arm(place, action)?;
    // Of a shim that has gone containerd learns in its own time, and tells its subscribers when it has.
    let line = "{{.containerEventType}} {{.containerId}}";
    let events = t.crictl()?.args(["events", "--output", "go-template", "--template", line]).spawn()?;
    let config = t.pod_config("p", |_| {})?;
    let (run, config) = t.runp("p", &config)?;
    if let Some(pod) = told.answer(run.deadline(PATIENCE).output()?) {
        in_pod(t, &pod, &config, &events, &mut told)?;
    }
    t.reached(place)?;
    if action == "error" {
        told.names(place)?;
    }
    // One that was not made at all is not listed.
    for pod in t.crictl_ok(&["pods", "-q"])?.lines() {
        remove(t, pod)?;
    }
    let left = t.crictl_ok(&["ps", "-a", "-q"])?;
    ensure!(left.is_empty(), "containers without a pod: {left}");
    Ok(())
}

/// As a user does who tries again: while containerd runs `delete` for a dead shim, it has no answer for its pod.
fn remove(t: &Context<'_>, pod: &str) -> Result<()> {
    for _ in 1..ATTEMPTS {
        if force(t, pod)?.exit == Exit::Code(0) {
            return Ok(());
        }
        for delete in t.processes().iter().filter(|p| p.name == SHIM && p.args.iter().any(|a| a == "delete"))
        {
            // Not there any more is as good.
            if let Ok(ended) = delete.pidfd() {
                wait_for_exit(&ended, Duration::from_secs(PATIENCE))?;
            }
        }
    }
    force(t, pod)?.ok().map(drop)
}

fn force(t: &Context<'_>, pod: &str) -> Result<Output> {
    t.crictl()?.args(["rmp", "--force", pod]).deadline(PATIENCE).output()
}

/// A command of a user.
fn answer(t: &Context<'_>, told: &mut Told, args: &[&str]) -> Result<Option<String>> {
    Ok(told.answer(t.crictl()?.args(args).deadline(PATIENCE).output()?))
}

fn in_pod(t: &Context<'_>, pod: &str, pod_config: &Path, events: &Proc, told: &mut Told) -> Result<()> {
    let container = json!({
        "metadata": {"name": "a"},
        "image": {"image": IMAGE},
        "command": ["sh", "-c", COMMAND],
        "log_path": "a.log",
        "mounts": [{"container_path": "/mnt", "host_path": directory(t)?}],
        "linux": {},
    });
    let config = t.write("container.json", container.to_string())?.display().to_string();
    let pod_config = pod_config.display().to_string();
    if let Some(id) = answer(t, told, &["create", pod, &config, &pod_config])? {
        if answer(t, told, &["start", &id])?.is_some() {
            events.wait_for_text(&format!("CONTAINER_STARTED_EVENT {id}"))?;
            in_container(t, &id, events, told)?;
        }
        answer(t, told, &["rm", &id])?;
    }
    answer(t, told, &["stopp", pod])?;
    answer(t, told, &["rmp", pod])?;
    Ok(())
}

/// Limits that make the machine larger than it boots, by a block of memory, and smaller again: bytes, and a quota.
const UPDATES: [(u64, u32); 2] = [(1100 << 20, 200_000), (64 << 20, 50_000)];

/// New limits are those of the container if the user was told so. If not, the old ones are.
fn update(t: &Context<'_>, told: &mut Told, id: &str, memory: u64, quota: u32) -> Result<()> {
    let limits = ["exec", id, "cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max"];
    let before = answer(t, told, &limits)?;
    let (bytes, text) = (memory.to_string(), quota.to_string());
    let args = ["update", "--memory", &bytes, "--cpu-quota", &text, "--cpu-period", "100000", id];
    let updated = answer(t, told, &args)?;
    if let (Some(before), Some(after)) = (before, answer(t, told, &limits)?) {
        let wanted = if updated.is_some() { format!("{memory}\n{quota} 100000") } else { before };
        ensure!(after == wanted, "the limits are {after:?}, not {wanted:?}");
    }
    Ok(())
}

fn in_container(t: &Context<'_>, id: &str, events: &Proc, told: &mut Told) -> Result<()> {
    if let Some(said) = answer(t, told, &["exec", id, "cat", "/mnt/file"])? {
        ensure!(said == "42", "an exec succeeded and said {said:?}");
    }
    for (memory, quota) in UPDATES {
        update(t, told, id, memory, quota)?;
    }
    let stopped = answer(t, told, &["stop", "--timeout", "30", id])?;
    if stopped.is_some() || case(t)?.1 == "kill" && t.process(SHIM).is_err() {
        events.wait_for_text(&format!("CONTAINER_STOPPED_EVENT {id}"))?;
    }
    let Some(status) = answer(t, told, &["inspect", id])? else { return Ok(()) };
    let status: Value = serde_json::from_str(&status).context("parse what crictl inspect says")?;
    let status = &status["status"];
    if status["state"] == "CONTAINER_EXITED" {
        // It may have been told to end before it knew how.
        let exit = status["exitCode"].as_i64();
        ensure!(exit.is_some_and(|code| [STATUS.into(), 128 + 15, 137, 255].contains(&code)), "{status}");
    } else {
        ensure!(stopped.is_none(), "it was stopped and is not: {status}");
    }
    Ok(())
}
