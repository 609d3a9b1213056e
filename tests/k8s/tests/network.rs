//! Pods behind a Service, and pods on both kinds of kernel beside each other.

use anyhow::{Result, ensure};
use harness::{Context, Test};

use crate::host_kernel;

pub(crate) const TESTS: &[Test] = &[
    Test::common("network::machines_and_processes_side_by_side", side_by_side),
    Test::common("network::three_pods_behind_a_service", web),
];

/// The kernel that a pod under test should have.
pub(crate) fn right_kernel(t: &Context<'_>, kernel: &str) -> bool {
    (kernel != host_kernel()) == t.settings().is_bulkhead()
}

fn side_by_side(t: &mut Context<'_>) -> Result<()> {
    t.example("side-by-side.yaml")?;
    t.ready(&["machine", "process"])?;
    let kernel = t.in_pod("machine", "main", "uname -r")?;
    ensure!(right_kernel(t, &kernel), "{kernel}");
    ensure!(t.kubectl_ok(&["logs", "machine"])? == kernel);
    ensure!(t.in_pod("process", "main", "uname -r")? == host_kernel());
    for (from, to) in [("machine", "process"), ("process", "machine")] {
        let address = t.field(&format!("pod/{to}"), "{.status.podIP}")?;
        let name = t.in_pod(from, "main", &format!("wget -q -O - http://{address}/hostname"))?;
        ensure!(name == to, "{from} hears {name} of {to}");
    }
    // The addresses that Kubernetes tells are the pods' own, and the node reaches them.
    let address = t.field("pod/machine", "{.status.podIP}")?;
    ensure!(
        t.in_pod("machine", "main", "ip -4 address show dev eth0")?.contains(&format!("inet {address}/24 "))
    );
    let name = t.on_node("node-1", &["wget", "-q", "-O", "-", &format!("http://{address}/hostname")]);
    if let Ok(name) = name {
        ensure!(name == "machine", "{name}");
    }
    Ok(())
}

fn web(t: &mut Context<'_>) -> Result<()> {
    t.example("web.yaml")?;
    t.wait("jsonpath={.status.readyReplicas}=3", &["deployment/web"])?;
    let kernels = t.kubectl_ok(&["exec", "deploy/web", "--", "uname", "-r"])?;
    ensure!(right_kernel(t, &kernels), "{kernels}");
    let nodes = t.field("pods", "{.items[*].spec.nodeName}")?;
    ensure!(nodes.contains("node-1") && nodes.contains("node-2"), "they are on both nodes: {nodes}");
    // By name, from a machine and from a process, until each pod has answered: on its own node and on the other.
    for (client, node, runtime) in [
        ("caller-1", "node-1", "runtimeClassName: bulkhead\n"),
        ("caller-2", "node-2", "runtimeClassName: runc\n"),
    ] {
        let manifest = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {client}}}\nspec:\n  nodeName: {node}\n  {runtime}  \
             terminationGracePeriodSeconds: 1\n  containers:\n  - name: main\n    image: busybox:1.37\n    \
             command: [sh, -c, 'exec sleep 1000']\n"
        );
        t.apply(&format!("{client}.yaml"), &manifest)?;
    }
    t.ready(&["caller-1", "caller-2"])?;
    let names = t.field("pods", "{.items[*].metadata.name}")?;
    let names: Vec<&str> = names.split(' ').filter(|name| name.starts_with("web-")).collect();
    for client in ["caller-1", "caller-2"] {
        let resolver = t.in_pod(client, "main", "cat /etc/resolv.conf")?;
        ensure!(
            resolver.contains("nameserver 10.32.0.10") && resolver.contains("default.svc.cluster.local"),
            "{resolver}"
        );
        let script = "for i in $(seq 60); do wget -q -O - http://web || exit 1; done | sort -u";
        let seen = t.in_pod(client, "main", script)?;
        let mut wanted = names.clone();
        wanted.sort_unstable();
        ensure!(seen.lines().collect::<Vec<_>>() == wanted, "{client} hears {seen:?} of {wanted:?}");
    }
    t.kubectl_ok(&["scale", "deployment/web", "--replicas=5"])?;
    t.wait("jsonpath={.status.readyReplicas}=5", &["deployment/web"])?;
    t.kubectl_ok(&["scale", "deployment/web", "--replicas=0"])?;
    t.wait("delete", &["pods", "-l", "app=web"])?;
    let answer = t.kubectl(&["exec", "caller-1", "--", "wget", "-q", "-O", "-", "http://web"]).output()?;
    answer.expect_failure()?;
    Ok(())
}
