//! What a virtual machine cannot give: refused when the pod is made, with the reason, and nothing left.

use anyhow::{Result, ensure};
use harness::{Context, Test};
use serde_json::{Value, json};

const WHY: &str = "runc shares the host's kernel";

pub(crate) const TESTS: &[Test] = &[
    Test::bulkhead("refusals::the_hosts_network_is_refused", WHY, network),
    Test::bulkhead("refusals::the_hosts_processes_are_refused", WHY, processes),
    Test::bulkhead("refusals::the_hosts_ipc_is_refused", WHY, ipc),
    Test::bulkhead("refusals::an_unknown_annotation_is_named", "it is ours", annotation),
];

/// A pod whose NamespaceOption is `options` (2 is NODE) is refused for what Kubernetes calls `name`.
fn refused(t: &mut Context<'_>, options: Value, name: &str) -> Result<()> {
    let config = t.pod_config("p", |p| {
        p["linux"]["security_context"] = json!({"namespace_options": options});
    })?;
    t.runp("p", &config)?.0.output()?.expect_failure()?.expect_stderr(&[name, "virtual machine"])?;
    ensure!(t.crictl_ok(&["pods", "-q"])?.is_empty(), "it is not there");
    Ok(())
}

fn network(t: &mut Context<'_>) -> Result<()> {
    refused(t, json!({"network": 2}), "hostNetwork")
}

fn processes(t: &mut Context<'_>) -> Result<()> {
    refused(t, json!({"pid": 2}), "hostPID")
}

fn ipc(t: &mut Context<'_>) -> Result<()> {
    refused(t, json!({"ipc": 2}), "hostIPC")
}

fn annotation(t: &mut Context<'_>) -> Result<()> {
    let config = t.pod_config("p", |p| p["annotations"] = json!({"io.bulkhead.sandbox.vcpu": "2"}))?;
    let refused = t.runp("p", &config)?.0.output()?.expect_failure()?;
    refused.expect_stderr(&["io.bulkhead.sandbox.vcpu", "did you mean `io.bulkhead.sandbox.vcpus`"])?;
    Ok(())
}
