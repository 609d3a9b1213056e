//! Daemons of a node that are started anew under pods that run.

use anyhow::{Result, ensure};
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] = &[Test::common("restarts::kubelet_and_containerd", restarts)];

fn restarts(t: &mut Context<'_>) -> Result<()> {
    t.example("side-by-side.yaml")?;
    t.ready(&["machine", "process"])?;
    t.in_pod("machine", "main", "echo here >/mark")?;
    for (daemon, signal) in [("kubelet", "KILL"), ("containerd", "TERM"), ("containerd", "KILL")] {
        t.on_node("node-1", &["restart", daemon, signal])?;
        // A kubelet that is new does not know its pods until the API server has told it.
        t.node_says("node-1", "kubelet.log", &[&["\"SyncLoop ADD\" source=\"api\"", "default/machine"]])?;
        // Still the same container, with which everything can be done.
        let mark = t.kubectl_ok(&["exec", "machine", "--", "cat", "/mark"])?;
        ensure!(mark == "here", "after the restart of {daemon}");
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
