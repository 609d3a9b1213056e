//! How containers begin, are asked how they are, and end.

use anyhow::{Result, ensure};
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::common("life::init_containers_and_sidecars", sidecar),
    Test::common("life::probes_of_every_kind", probes),
    Test::common("life::a_probe_by_grpc", grpc),
    Test::common("life::hooks_and_a_graceful_end", lifecycle),
    Test::common("life::ends_that_are_told", ends),
];

fn sidecar(t: &mut Context<'_>) -> Result<()> {
    t.example("sidecar.yaml")?;
    t.wait("jsonpath={.status.phase}=Succeeded", &["pod/sidecar"])?;
    let seen = t.kubectl_ok(&["logs", "sidecar", "-c", "main"])?;
    ensure!(seen == "prepared\nprepared", "{seen}");
    let seen = t.kubectl_ok(&["logs", "sidecar", "-c", "proxy"])?;
    ensure!(seen == "proxy ends last", "{seen}");
    let code = t.field("pod/sidecar", "{.status.initContainerStatuses[*].state.terminated.exitCode}")?;
    ensure!(code == "0 0", "{code}");
    Ok(())
}

fn probes(t: &mut Context<'_>) -> Result<()> {
    t.example("probes.yaml")?;
    t.ready(&["probes"])?;
    // The sick one is killed by the kubelet and well the second time.
    t.wait("jsonpath={.status.containerStatuses[3].restartCount}=1", &["pod/probes"])?;
    t.event("probes", &["Liveness probe failed", "/tmp/well"])?;
    // One that is not ready is none of the pod's.
    t.in_pod("probes", "by-command", "rm /tmp/well")?;
    t.wait("condition=Ready=false", &["pod/probes"])?;
    let ready = t.field("pod/probes", "{.status.containerStatuses[*].ready}")?;
    ensure!(ready == "false true true true", "{ready}");
    t.in_pod("probes", "by-command", "touch /tmp/well")?;
    t.ready(&["probes"])?;
    let restarts = t.field("pod/probes", "{.status.containerStatuses[*].restartCount}")?;
    ensure!(restarts == "0 0 0 1", "{restarts}");
    Ok(())
}

fn grpc(t: &mut Context<'_>) -> Result<()> {
    t.example("grpc.yaml")?;
    // An answer, and not the one that it wants: without one it says so in other words.
    t.event("grpc", &["Readiness probe failed", "NOT_SERVING"])?;
    t.in_pod("grpc", "main", "touch /tmp/well")?;
    t.ready(&["grpc"])
}

fn lifecycle(t: &mut Context<'_>) -> Result<()> {
    t.on_node("node-1", &["rm", "-rf", "/var/lib/diary"])?;
    t.example("lifecycle.yaml")?;
    t.ready(&["lifecycle"])?;
    let begun = std::time::Instant::now();
    t.kubectl_ok(&["delete", "pod", "lifecycle", "--wait", "--timeout=120s"])?;
    let page = t.on_node("node-1", &["cat", "/var/lib/diary/page"])?;
    ensure!(page == "started\nstopping\nended", "{page}");
    ensure!(
        begun.elapsed() < harness::stretched(std::time::Duration::from_secs(19)),
        "it was not waited for"
    );
    t.on_node("node-1", &["rm", "-rf", "/var/lib/diary"])?;
    Ok(())
}

fn ends(t: &mut Context<'_>) -> Result<()> {
    t.example("ends.yaml")?;
    let state = |t: &Context<'_>, pod: &str, field: &str| {
        t.field(&format!("pod/{pod}"), &format!("{{.status.containerStatuses[0].{field}}}"))
    };
    for pod in ["code", "memory"] {
        t.wait("jsonpath={.status.phase}=Failed", &[&format!("pod/{pod}")])?;
    }
    ensure!(state(t, "code", "state.terminated.exitCode")? == "42");
    ensure!(state(t, "code", "state.terminated.reason")? == "Error");
    ensure!(state(t, "code", "state.terminated.message")? == "the disk is full");
    let (code, reason) =
        (state(t, "memory", "state.terminated.exitCode")?, state(t, "memory", "state.terminated.reason")?);
    ensure!(code == "137" && reason == "OOMKilled", "{code} {reason}");
    t.wait("jsonpath={.status.containerStatuses[0].restartCount}=2", &["pod/loop"])?;
    // Between two tries: then the last one is the one whose log is kept.
    t.wait("jsonpath={.status.containerStatuses[0].state.waiting.reason}=CrashLoopBackOff", &["pod/loop"])?;
    ensure!(state(t, "loop", "lastState.terminated.exitCode")? == "1");
    let seen = t.kubectl_ok(&["logs", "loop", "--previous"])?;
    ensure!(seen == "once more", "{seen}");
    Ok(())
}
