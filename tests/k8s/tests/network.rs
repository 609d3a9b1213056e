//! Pods behind a Service, and pods on both kinds of kernel beside each other.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Context, NODES, Test, stretched};

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
    for pod in ["machine", "process"] {
        let address = t.field(&format!("pod/{pod}"), "{.status.podIP}")?;
        let busybox = std::env::var("BULKHEAD_TEST_BUSYBOX")?;
        let page = format!("http://{address}/hostname");
        ensure!(
            t.on_node("node-1", &[&busybox, "wget", "-q", "-O", "-", &page])? == pod,
            "the node reaches {pod}"
        );
    }
    Ok(())
}

/// At a port of each node, whichever node the pods are on.
fn from_outside(t: &Context<'_>, names: &[&str]) -> Result<()> {
    t.kubectl_ok(&["expose", "deployment", "web", "--name=outside", "--type=NodePort", "--port=80"])?;
    let port: u16 = t.field("service/outside", "{.spec.ports[0].nodePort}")?.parse()?;
    for node in NODES {
        let address =
            t.field(&format!("node/{node}"), "{.status.addresses[?(@.type=='InternalIP')].address}")?;
        // It says so when it has made the rules of a Service.
        let made =
            [&["\"Adding new service port\" portName=\"default/outside"], &["SyncProxyRules complete"]];
        t.node_says(node, "proxy.log", &made.map(|words| &words[..]))?;
        let page = page(&address, port)?;
        ensure!(names.iter().any(|name| page.ends_with(&format!("{name}\n"))), "{node}: {page}");
    }
    t.kubectl_ok(&["delete", "service", "outside"])?;
    Ok(())
}

/// What the web server says there.
fn page(address: &str, port: u16) -> Result<String> {
    let stream = TcpStream::connect((address, port));
    let mut stream = stream.with_context(|| format!("connect to {address}:{port}"))?;
    stream.set_read_timeout(Some(stretched(Duration::from_secs(30))))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
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
        let script = "for i in $(seq 30); do wget -q -O - http://web || exit 1; done | sort -u";
        let seen = t.in_pod(client, "main", script)?;
        let mut wanted = names.clone();
        wanted.sort_unstable();
        ensure!(seen.lines().collect::<Vec<_>>() == wanted, "{client} hears {seen:?} of {wanted:?}");
    }
    from_outside(t, &names)?;
    t.kubectl_ok(&["scale", "deployment/web", "--replicas=5"])?;
    t.wait("jsonpath={.status.readyReplicas}=5", &["deployment/web"])?;
    t.kubectl_ok(&["scale", "deployment/web", "--replicas=0"])?;
    t.wait("delete", &["pods", "-l", "app=web"])?;
    let answer = t.kubectl(&["exec", "caller-1", "--", "wget", "-q", "-O", "-", "http://web"]).output()?;
    answer.expect_failure()?;
    Ok(())
}
