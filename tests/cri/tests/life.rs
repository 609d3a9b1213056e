//! One pod's whole life, with containerd going away and coming back in the middle of it. What has to hold through
//! every containerd that is supported: `tests/run matrix` asks each of them. They differ in when they call Shutdown
//! (docs/containerd-contract.md, T5), and a pod must neither go too early nor stay.

use anyhow::{Result, ensure};
use harness::{Context, Settings, Test};

use crate::{figures::working_set, pod::inspect};

pub(crate) const TESTS: &[Test] =
    &[Test::common("life::t5_of_a_pod_through_a_restart_of_containerd", whole).unless(pods_are_lost)];

/// Its sandbox controller confuses the folders of state and of content when it looks for shims that run
/// (plugins/sandbox/controller.go); mended in 2.1.
fn pods_are_lost(settings: &Settings) -> Option<&'static str> {
    let api = settings.handler == "bulkhead";
    (api && settings.version.starts_with("2.0."))
        .then_some("containerd 2.0 does not find pods of the sandbox API again when it is restarted")
}

fn whole(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let script = |name: &str| format!("echo hello from {name}; trap 'exit 3' TERM; sleep 1000 & wait");
    let (a, b) = (t.run_in(&pod, "a", &script("a"))?, t.run_in(&pod, "b", &script("b"))?);
    for (id, name) in [(&a, "a"), (&b, "b")] {
        ensure!(t.exec_in(id, "echo $((6 * 7))")? == "42");
        ensure!(t.crictl_ok(&["logs", id])? == format!("hello from {name}"));
        ensure!(working_set(t, id)? > 0);
    }
    let boot = t.exec_in(&a, "cat /proc/sys/kernel/random/boot_id")?;

    t.node().restart()?;

    for (id, name) in [(&a, "a"), (&b, "b")] {
        let status = inspect(t, "inspect", id)?;
        ensure!(status["status"]["state"] == "CONTAINER_RUNNING", "{status}");
        ensure!(t.exec_in(id, "cat /proc/sys/kernel/random/boot_id")? == boot);
        ensure!(t.crictl_ok(&["logs", id])? == format!("hello from {name}"));
        ensure!(working_set(t, id)? > 0);
        t.crictl_ok(&["stop", "--timeout", "60", id])?;
        let status = inspect(t, "inspect", id)?;
        ensure!(status["status"]["exitCode"] == 3, "{status}");
    }
    t.crictl_ok(&["stopp", &pod.id])?;
    let status = inspect(t, "inspectp", &pod.id)?;
    ensure!(status["status"]["state"] == "SANDBOX_NOTREADY", "{status}");
    t.crictl_ok(&["rmp", &pod.id])?;
    Ok(())
}
