//! What an administrator rules: quotas, defaults, what is admitted and where.

use anyhow::{Context as _, Result, ensure};
use harness::{Context, NODES, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::common("policies::quotas_defaults_and_admission", namespace),
    Test::common("policies::taints_budgets_and_a_drained_node", drained),
];

fn namespace(t: &mut Context<'_>) -> Result<()> {
    t.example("policies.yaml")?;
    t.kubectl_ok(&["-n", "ruled", "wait", "--for=condition=Ready", "pod/modest", "--timeout=120s"])?;
    // It states nothing; the default is the limit of its cgroup.
    let script =
        "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";
    let limit = t.kubectl_ok(&["-n", "ruled", "exec", "modest", "--", "sh", "-c", script])?;
    ensure!(limit == (96 << 20).to_string(), "{limit}");
    let used = "jsonpath={.status.used.requests\\.memory}";
    let used = t.kubectl_ok(&["-n", "ruled", "get", "resourcequota", "all", "-o", used])?;
    ensure!(used == if t.settings().is_bulkhead() { "320Mi" } else { "96Mi" }, "{used}");
    // A second one: of runc it fits, as a machine it does not.
    let modest = ["-n", "ruled", "get", "pod", "modest", "-o"];
    let mut second: serde_json::Value =
        serde_json::from_str(&t.kubectl_ok(&[&modest[..], &["json"]].concat())?)?;
    second["metadata"] = serde_json::json!({"name": "second", "namespace": "ruled"});
    second["spec"].as_object_mut().context("no spec")?.remove("nodeName");
    let apply = t.kubectl(&["create", "-f", "-"]).stdin_bytes(second.to_string()).output()?;
    if t.settings().is_bulkhead() {
        apply.expect_failure()?.expect_stderr(&["exceeded quota: all, requested: requests.memory=320Mi"])?;
    } else {
        apply.ok()?;
    }
    second["metadata"]["name"] = "strong".into();
    second["spec"]["containers"][0]["securityContext"] = serde_json::json!({"privileged": true});
    let apply = t.kubectl(&["create", "-f", "-"]).stdin_bytes(second.to_string()).output()?;
    apply.expect_failure()?.expect_stderr(&["violates PodSecurity \"restricted:latest\": privileged"])?;
    Ok(())
}

fn drained(t: &mut Context<'_>) -> Result<()> {
    t.kubectl_ok(&["taint", "nodes", "--all", "machines=only:NoSchedule"])?;
    let seen = from_node_to_node(t);
    let class = format!("runtimeclass/{}", t.settings().handler);
    t.kubectl_ok(&["patch", &class, "-p", r#"{"scheduling": {"tolerations": null}}"#])?;
    t.kubectl_ok(&["taint", "nodes", "--all", "machines-"])?;
    for node in NODES {
        t.kubectl_ok(&["uncordon", node])?;
    }
    seen
}

fn from_node_to_node(t: &mut Context<'_>) -> Result<()> {
    t.example("drained.yaml")?;
    t.event("intolerant", &["FailedScheduling", "had untolerated taint"])?;
    // A RuntimeClass tolerates for its pods, from when they are made.
    let class = format!("runtimeclass/{}", t.settings().handler);
    let tolerations = r#"{"scheduling": {"tolerations": [{"key": "machines", "operator": "Exists"}]}}"#;
    t.kubectl_ok(&["patch", &class, "-p", tolerations])?;
    t.kubectl_ok(&["delete", "pod", "intolerant", "--wait", "--timeout=120s"])?;
    t.example("drained.yaml")?;
    t.ready(&["intolerant"])?;
    t.wait("jsonpath={.status.readyReplicas}=1", &["deployment/steady"])?;
    let one = || t.field("pods", "{.items[?(@.metadata.labels.app=='steady')].metadata.name}");
    let (first, place) = (one()?, "{.spec.nodeName}");
    let node = t.field(&format!("pod/{first}"), place)?;
    // Nobody may take the only one.
    t.wait("jsonpath={.status.currentHealthy}=1", &["pdb/steady"])?;
    let eviction = format!(
        r#"{{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {{"name": "{first}", "namespace": "default"}}}}"#
    );
    let path = format!("/api/v1/namespaces/default/pods/{first}/eviction");
    let evict = t.kubectl(&["create", "--raw", &path, "-f", "-"]).stdin_bytes(eviction).output()?;
    evict.expect_failure()?.expect_stderr(&["would violate the pod's disruption budget"])?;
    t.kubectl_ok(&["patch", "pdb", "steady", "-p", r#"{"spec": {"minAvailable": 0}}"#])?;
    t.wait("jsonpath={.status.disruptionsAllowed}=1", &["pdb/steady"])?;
    t.kubectl_ok(&["drain", &node, "--pod-selector=app=steady", "--timeout=120s"])?;
    t.wait("jsonpath={.status.readyReplicas}=1", &["deployment/steady"])?;
    t.wait("condition=Ready", &["pods", "-l", "app=steady"])?;
    let second = one()?;
    let now = t.field(&format!("pod/{second}"), place)?;
    ensure!(
        second != first && now != node && NODES.contains(&now.as_str()),
        "{second} on {now} after {first} on {node}"
    );
    Ok(())
}
