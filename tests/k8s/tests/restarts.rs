//! Daemons of a node that are started anew under pods that run.

use anyhow::{Result, ensure};
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::common("restarts::kubelet_and_containerd", restarts),
    Test::common("restarts::a_node_without_its_kubelet", outage),
];

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

/// Until the control plane knows that the node is lost, and back again.
fn outage(t: &mut Context<'_>) -> Result<()> {
    t.example("side-by-side.yaml")?;
    t.ready(&["machine", "process"])?;
    let ids = |t: &Context<'_>| t.field("pods", "{.items[*].status.containerStatuses[*].containerID}");
    let (before, address) = (ids(t)?, t.field("pod/machine", "{.status.podIP}")?);
    t.in_pod("machine", "main", "echo here >/mark")?;
    t.on_node("node-1", &["stop", "kubelet", "KILL"])?;
    let seen = unready(t, &address);
    // Also when it was not seen: other tests need the node.
    t.on_node("node-1", &["restart", "kubelet"])?;
    seen?;
    t.wait("condition=Ready", &["node/node-1"])?;
    t.ready(&["machine", "process"])?;
    ensure!(t.in_pod("machine", "main", "cat /mark")? == "here");
    ensure!(ids(t)? == before, "{} after {before}", ids(t)?);
    let restarts = t.field("pods", "{.items[*].status.containerStatuses[*].restartCount}")?;
    ensure!(restarts == "0 0", "{restarts}");
    Ok(())
}

/// Without the kubelet no kubectl reaches into the pod; whoever knows its address still does.
fn unready(t: &Context<'_>, address: &str) -> Result<()> {
    t.wait("condition=Ready=Unknown", &["node/node-1"])?;
    t.wait("condition=Ready=False", &["pod/machine"])?;
    t.kubectl(&["exec", "machine", "--", "true"]).output()?.expect_failure()?;
    let busybox = std::env::var("BULKHEAD_TEST_BUSYBOX")?;
    // From the other node: pods' routes are not the kubelet's.
    let page =
        t.on_node("node-2", &[&busybox, "wget", "-q", "-O", "-", &format!("http://{address}/hostname")])?;
    ensure!(page == "machine", "{page}");
    let processes = t.on_node("node-1", &["crictl", "ps", "--state", "Running", "-q"])?;
    ensure!(processes.lines().count() >= 2, "{processes}");
    Ok(())
}
