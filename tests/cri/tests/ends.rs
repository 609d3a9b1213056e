//! How pods end that nobody stopped, and how they live on without containerd.

use anyhow::{Result, ensure};
use harness::{Context, Pod, Proc, Test};

use crate::{SLEEPER, pod::inspect};

pub(crate) const TESTS: &[Test] = &[
    Test::common("ends::a_pod_outlives_a_restart_of_containerd", restart),
    Test::common("ends::a_pod_outlives_a_kill_of_containerd", killed),
    Test::bulkhead("ends::a_machine_that_is_killed_ends_its_pod", "runc has no machine", machine_killed),
    Test::bulkhead("ends::a_shim_that_is_killed_leaves_nothing", "runc's leaves its containers", shim_killed),
];

fn restart(t: &mut Context<'_>) -> Result<()> {
    outlives(t, |t| t.node().restart())
}

fn killed(t: &mut Context<'_>) -> Result<()> {
    outlives(t, |t| {
        t.node().kill()?;
        t.node().launch()
    })
}

fn outlives(t: &mut Context<'_>, interrupt: impl Fn(&mut Context<'_>) -> Result<()>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    let boot = t.exec_in(&a, "cat /proc/sys/kernel/random/boot_id; readlink /proc/self/ns/pid")?;
    interrupt(t)?;
    let status = inspect(t, "inspectp", &pod.id)?;
    ensure!(status["status"]["state"] == "SANDBOX_READY", "{status}");
    let status = inspect(t, "inspect", &a)?;
    ensure!(status["status"]["state"] == "CONTAINER_RUNNING", "{status}");
    let now = t.exec_in(&a, "cat /proc/sys/kernel/random/boot_id; readlink /proc/self/ns/pid")?;
    ensure!(now == boot, "it is another one: {now} after {boot}");
    let b = t.run_in(&pod, "b", SLEEPER)?;
    ensure!(t.exec_in(&b, "hostname")? == "p");
    t.crictl_ok(&["stop", "--timeout", "60", &b])?;
    ensure!(inspect(t, "inspect", &b)?["status"]["exitCode"] == 0);
    t.remove_pod(&pod)
}

/// CRI's events as they come, a line `TYPE ID` each: it learns of an end that nobody asked for in its own time.
fn cri_events(t: &Context<'_>) -> Result<Proc> {
    let line = "{{.containerEventType}} {{.containerId}}";
    t.crictl()?.args(["events", "--output", "go-template", "--template", line]).spawn()
}

/// A pod with one container, whose events are known to arrive.
fn watched_pod(t: &Context<'_>) -> Result<(Proc, Pod, String)> {
    let events = cri_events(t)?;
    let pod = t.pod("p", |_| {})?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    events.wait_for_text(&format!("CONTAINER_STARTED_EVENT {a}"))?;
    Ok((events, pod, a))
}

fn machine_killed(t: &mut Context<'_>) -> Result<()> {
    let (events, pod, a) = watched_pod(t)?;
    let vmm = t.parts()?.remove(0);
    t.kill_part(&vmm)?;
    events.wait_for_text(&format!("CONTAINER_STOPPED_EVENT {a}"))?;
    let status = inspect(t, "inspect", &a)?;
    ensure!(status["status"]["state"] == "CONTAINER_EXITED", "{status}");
    ensure!(status["status"]["exitCode"] == 137, "{status}");
    // Of the pod's end containerd learns by itself, and not from who stops the pod meanwhile.
    events.wait_for_text(&format!("CONTAINER_STOPPED_EVENT {}", pod.id))?;
    t.crictl_ok(&["stopp", &pod.id])?;
    let status = inspect(t, "inspectp", &pod.id)?;
    ensure!(status["status"]["state"] == "SANDBOX_NOTREADY", "{status}");
    t.crictl_ok(&["rmp", &pod.id])?;
    Ok(())
}

fn shim_killed(t: &mut Context<'_>) -> Result<()> {
    let (events, pod, a) = watched_pod(t)?;
    let shim = t.process("containerd-shim-bulkhead-v2")?;
    let same = |pid| t.process("containerd-shim-bulkhead-v2").is_ok_and(|now| now.pid == pid);
    let ended = harness::signal_process(shim.pid, rustix::process::Signal::KILL, same)?;
    harness::wait_for_exit(&ended, std::time::Duration::from_secs(10))?;
    events.wait_for_text(&format!("CONTAINER_STOPPED_EVENT {a}"))?;
    t.crictl_ok(&["stopp", &pod.id])?;
    t.crictl_ok(&["rmp", &pod.id])?;
    Ok(())
}
