//! The installer of configs/kubernetes: a node that knows nothing of bulkhead gets it, runs a machine, and loses it.

use std::env;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] = &[Test::bulkhead(
    "installer::a_node_gets_it_and_loses_it_again",
    "it is bulkhead that is installed",
    installer,
)];

const NODE: &str = "node-2";
const LABEL: &str = "{.metadata.labels.io\\.bulkhead/runtime}";

/// A machine on that node.
const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: guest}
spec:
  runtimeClassName: bulkhead
  nodeSelector: {kubernetes.io/hostname: node-2}
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: \"busybox:1.37\", command: [sleep, \"1000\"]}
";

fn installer(t: &mut Context<'_>) -> Result<()> {
    // Whatever the nodes have of bulkhead is taken from this one; the node is as before, or the cluster is made anew.
    t.on_node(NODE, &["bare"])?;
    t.kubectl_ok(&["label", "node", NODE, "io.bulkhead/runtime-"])?;
    t.wait("condition=Ready", &[&format!("node/{NODE}")])?;
    let archive = env::var("BULKHEAD_TEST_INSTALLER").context("BULKHEAD_TEST_INSTALLER")?;
    let image = t.on_node(NODE, &["ctr", "images", "import", &archive])?;
    let before = tree(t)?;

    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/kubernetes/installer.yaml");
    t.apply("installer.yaml", &fs::read_to_string(manifest)?)?;
    installed(t)?;
    t.apply("guest.yaml", POD)?;
    t.ready(&["guest"])?;
    let kernel = t.in_pod("guest", "main", "uname -r; echo here >/mark")?;
    ensure!(kernel != crate::host_kernel(), "{kernel}");
    let shim = t.process("containerd-shim-bulkhead-v2")?;
    let program = fs::read_link(format!("/proc/{}/exe", shim.pid))?;
    ensure!(program == Path::new("/opt/bulkhead/bin/containerd-shim-bulkhead-v2"), "{program:?}");
    // Not earlier: an API server heeds a new policy a moment after it has taken it, and tells nobody when.
    least(t)?;

    // The installer may go: what it did stays.
    t.kubectl_ok(&["-n", "bulkhead", "delete", "daemonset/installer", "--timeout=120s"])?;
    t.kubectl_ok(&[
        "-n",
        "bulkhead",
        "wait",
        "--for=delete",
        "pod",
        "-l",
        "app=installer",
        "--timeout=120s",
    ])?;
    ensure!(t.field(&format!("node/{NODE}"), LABEL)? == "true");
    ensure!(t.in_pod("guest", "main", "cat /mark")? == "here");

    removed(t)?;
    let after = tree(t)?;
    ensure!(after == before, "before:\n{before}\nafter:\n{after}");

    t.kubectl_ok(&["label", "node", NODE, "io.bulkhead/install-"])?;
    t.kubectl_ok(&["-n", "bulkhead", "wait", "--for=delete", "pod", "--all", "--timeout=120s"])?;
    let image = image.split_whitespace().find(|word| word.contains("installer:"));
    t.on_node(NODE, &["ctr", "images", "rm", image.context("no name of the image")?])?;
    t.on_node(NODE, &["equip"])?;
    t.kubectl_ok(&["label", "node", NODE, "io.bulkhead/runtime=true"])?;
    t.wait("condition=Ready", &[&format!("node/{NODE}")])
}

/// What is there where an installation goes.
fn tree(t: &Context<'_>) -> Result<String> {
    let script = "find /opt /usr/local/bin /etc/bulkhead \"$1/conf.d\" \"$1/containerd.toml\" -printf '%p %m %l\\n' 2>/dev/null | sort
                  sha256sum \"$1/containerd.toml\"";
    let place = t.node_files(NODE);
    t.on_node(NODE, &["sh", "-c", script, "sh", &place.to_string_lossy()])
}

/// The account that is given to the pods can set the one label of its own node.
fn least(t: &Context<'_>) -> Result<()> {
    let account = "--as=system:serviceaccount:bulkhead:installer";
    let may = |verb, what| t.kubectl(&["auth", "can-i", verb, what, account]).output().map(|said| said.out());
    for (verb, what, answer) in [
        ("get", "nodes", "yes"),
        ("patch", "nodes", "yes"),
        ("list", "nodes", "no"),
        ("delete", "nodes", "no"),
        ("update", "nodes", "no"),
        ("get", "pods", "no"),
        ("get", "secrets", "no"),
    ] {
        let said = may(verb, what)?;
        ensure!(said == answer, "{verb} {what}: {said}");
    }
    let own = "--as-user-extra=authentication.kubernetes.io/node-name=node-2";
    for (node, change, words) in [
        ("node-1", "io.bulkhead/runtime=false", "no node but its own"),
        (NODE, "other=label", "nothing of a node but its label"),
    ] {
        let label = t.kubectl(&["label", "node", node, "--overwrite", change, account, own]).output()?;
        label.expect_failure()?.expect_stderr(&[words])?;
    }
    Ok(())
}

/// Here no service of systemd runs containerd, so the restart is the administrator's, as the pod says.
fn installed(t: &Context<'_>) -> Result<()> {
    t.kubectl_ok(&["label", "node", NODE, "io.bulkhead/install=true"])?;
    let said = told(t, "installer", "containerd has to be restarted there by you")?;
    ensure!(said.starts_with("bulkhead is installed on node-2, but ") && said.len() < 300, "{said}");
    // Nobody is sent to a node that is not ready for it.
    ensure!(t.field(&format!("node/{NODE}"), LABEL)?.is_empty());
    t.on_node(NODE, &["restart", "containerd"])?;
    done(t, "installer")?;
    ensure!(t.field(&format!("node/{NODE}"), LABEL)? == "true");
    Ok(())
}

/// Not while a machine runs; but no further one comes.
fn removed(t: &Context<'_>) -> Result<()> {
    t.kubectl_ok(&["label", "node", NODE, "--overwrite", "io.bulkhead/install=false"])?;
    let said = told(t, "uninstaller", "remove them first")?;
    ensure!(said.starts_with("bulkhead stays on node-2: nothing is removed: pods run here"), "{said}");
    ensure!(t.field(&format!("node/{NODE}"), LABEL)?.is_empty());
    ensure!(t.in_pod("guest", "main", "cat /mark")? == "here");
    t.kubectl_ok(&["delete", "pod", "guest", "--wait", "--timeout=120s"])?;
    t.forget_dead_pods()?;
    // It tries again by itself, after a while that grows; a fresh one does at once.
    t.kubectl_ok(&["-n", "bulkhead", "delete", "pod", "-l", "app=uninstaller", "--wait", "--timeout=60s"])?;
    done(t, "uninstaller")
}

/// Waits until the first container of the pod has ended with these words; all that it said.
fn told(t: &Context<'_>, app: &str, words: &str) -> Result<String> {
    let message = "{.items[*].status.initContainerStatuses[0]['lastState','state'].terminated.message}";
    let watch = "{.status.initContainerStatuses[0]['lastState','state'].terminated.message}{\"\\n\"}";
    let (selector, watch) = (format!("app={app}"), format!("-o=jsonpath={watch}"));
    let watch = t.kubectl(&["-n", "bulkhead", "get", "pods", "-l", &selector, "--watch", &watch]);
    watch.deadline(120).spawn()?.wait_for_text(words)?;
    let all = format!("-o=jsonpath={message}");
    t.kubectl_ok(&["-n", "bulkhead", "get", "pods", "-l", &selector, &all])
}

/// Waits until its pod has nothing left to do.
fn done(t: &Context<'_>, app: &str) -> Result<()> {
    let daemonset = format!("daemonset/{app}");
    let wait = t.kubectl(&["-n", "bulkhead", "rollout", "status", &daemonset, "--timeout=120s"]).output()?;
    wait.ok().with_context(|| {
        let pods = t.kubectl(&["-n", "bulkhead", "describe", "pods"]).output();
        pods.map_or_else(|error| error.to_string(), |pods| pods.out())
    })?;
    Ok(())
}
