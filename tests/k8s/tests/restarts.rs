//! Daemons of a node that are started anew under pods that run.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use harness::{Context, Test, stretched};

pub(crate) const TESTS: &[Test] = &[Test::common("restarts::kubelet_and_containerd", restarts)];

/// What the test has left in the machine. A kubelet that is new does not know its pods until the API server has told
/// it, which nothing tells but an answer.
fn mark(t: &Context<'_>) -> Result<String> {
    let until = Instant::now() + stretched(Duration::from_secs(30));
    loop {
        let exec = t.kubectl(&["exec", "machine", "--", "cat", "/mark"]).output()?;
        if !exec.err().contains("pod does not exist") || Instant::now() > until {
            return Ok(exec.ok()?.out());
        }
    }
}

fn restarts(t: &mut Context<'_>) -> Result<()> {
    t.example("side-by-side.yaml")?;
    t.ready(&["machine", "process"])?;
    t.in_pod("machine", "main", "echo here >/mark")?;
    for (daemon, signal) in [("kubelet", "KILL"), ("containerd", "TERM"), ("containerd", "KILL")] {
        t.on_node("node-1", &["restart", daemon, signal])?;
        // Still the same container, with which everything can be done.
        ensure!(mark(t)? == "here", "after the restart of {daemon}");
        t.wait("condition=Ready", &["node/node-1"])?;
        ensure!(!t.kubectl_ok(&["logs", "machine"])?.is_empty());
    }
    let restarts = t.field("pods", "{.items[*].status.containerStatuses[*].restartCount}")?;
    ensure!(restarts == "0 0", "{restarts}");
    // And the end of one is seen by the daemons that were not there at its start.
    t.in_pod("machine", "main", "kill -9 -1; exit 0").ok();
    t.kubectl_ok(&["delete", "pod", "machine", "--wait", "--timeout=120s"])?;
    Ok(())
}
