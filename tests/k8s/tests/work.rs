//! What controllers make pods for.

use anyhow::{Result, ensure};
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::common("work::jobs", jobs),
    Test::common("work::stateful_sets_and_daemon_sets", sets),
    Test::bulkhead(
        "work::only_nodes_that_have_it_take_machines",
        "the RuntimeClass of runc names no nodes",
        nodes,
    ),
];

fn jobs(t: &mut Context<'_>) -> Result<()> {
    t.example("job.yaml")?;
    t.example("cronjob.yaml")?;
    t.kubectl_ok(&["create", "job", "now", "--from", "cronjob/clock"])?;
    t.wait("condition=Complete", &["job/sums", "job/now"])?;
    let mut sums: Vec<String> =
        t.kubectl_ok(&["logs", "-l", "job-name=sums", "--tail=-1"])?.lines().map(str::to_owned).collect();
    sums.sort_unstable();
    ensure!(sums == ["0", "14", "7"], "{sums:?}");
    ensure!(t.kubectl_ok(&["logs", "job/now"])? == "it is time");
    t.wait("condition=Failed", &["job/fails"])?;
    let reason = t.field("job/fails", "{.status.conditions[?(@.type=='Failed')].reason}")?;
    ensure!(reason == "BackoffLimitExceeded", "{reason}");
    ensure!(t.field("job/fails", "{.status.failed}")? == "2");
    t.kubectl_ok(&["delete", "job/now"])?;
    Ok(())
}

fn sets(t: &mut Context<'_>) -> Result<()> {
    t.example("statefulset.yaml")?;
    t.example("daemonset.yaml")?;
    t.wait("jsonpath={.status.readyReplicas}=2", &["statefulset/peer"])?;
    t.wait("jsonpath={.status.numberReady}=2", &["daemonset/watch"])?;
    let seen = t.in_pod("peer-0", "peer", "wget -q -O - http://peer-1.peers; hostname -f")?;
    ensure!(seen == "peer-1\npeer-0.peers.default.svc.cluster.local", "{seen}");
    let mut nodes: Vec<String> =
        t.kubectl_ok(&["logs", "-l", "app=watch"])?.lines().map(str::to_owned).collect();
    nodes.sort_unstable();
    ensure!(nodes == ["on node-1", "on node-2"], "{nodes:?}");
    // The same name comes again, with the same identity.
    let before = t.field("pod/peer-1", "{.metadata.uid}")?;
    t.kubectl_ok(&["delete", "pod", "peer-1", "--wait", "--timeout=120s"])?;
    t.wait("create", &["pod/peer-1"])?;
    t.ready(&["peer-1"])?;
    ensure!(t.field("pod/peer-1", "{.metadata.uid}")? != before);
    ensure!(t.in_pod("peer-1", "peer", "hostname")? == "peer-1");
    Ok(())
}

/// The RuntimeClass chooses the nodes, and says what a machine costs beside its workload.
fn nodes(t: &mut Context<'_>) -> Result<()> {
    t.kubectl_ok(&["label", "nodes", "--all", "io.bulkhead/runtime-"])?;
    t.example("shell.yaml")?;
    t.event("shell", &["FailedScheduling", "didn't match Pod's node affinity/selector"])?;
    t.kubectl_ok(&["label", "node", "node-2", "io.bulkhead/runtime=true"])?;
    t.ready(&["shell"])?;
    ensure!(t.field("pod/shell", "{.spec.nodeName}")? == "node-2");
    let class = format!("runtimeclass/{}", t.settings().handler);
    let stated = t.field(&class, "{.overhead.podFixed.memory}")?;
    let counted = t.field("pod/shell", "{.spec.overhead.memory}")?;
    ensure!(!stated.is_empty() && stated == counted, "{counted} of {stated}");
    t.kubectl_ok(&["label", "nodes", "--all", "--overwrite", "io.bulkhead/runtime=true"])?;
    Ok(())
}
