//! Limits of a pod that runs, changed by kubectl.

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Run, Test};

pub(crate) const TESTS: &[Test] = &[Test::common("resources::a_resize_in_place", resize)];

/// `kubectl patch` of the one container's resources.
fn patch(t: &Context<'_>, resources: &str) -> Run {
    let patch = format!(r#"{{"spec": {{"containers": [{{"name": "main", "resources": {resources}}}]}}}}"#);
    t.kubectl(&["patch", "pod", "resize", "--subresource", "resize", "--patch", &patch])
}

/// Changes them, and waits until the pod's status says that these limits are in force and nothing is left to do.
fn resize_to(t: &Context<'_>, cpu: &str, memory: &str) -> Result<()> {
    let limits = format!(r#"{{"cpu":"{cpu}","memory":"{memory}"}}"#);
    patch(t, &format!(r#"{{"requests": {{"memory": "{memory}"}}, "limits": {limits}}}"#)).output()?.ok()?;
    in_force(t, &limits)
}

fn in_force(t: &Context<'_>, limits: &str) -> Result<()> {
    let line =
        "-o=jsonpath={.status.containerStatuses[0].resources.limits} {.status.conditions[*].type}{\"\\n\"}";
    let watch = t.kubectl(&["get", "pod", "resize", "--watch", line]).deadline(60).spawn()?;
    watch.wait_until(&format!("the limits {limits} and no resize to come"), |said| {
        let mut lines = said.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        lines.any(|line| line.starts_with(limits) && !line.contains("PodResize"))
    })
}

/// The container's own quota and limit, in bytes: a machine has cgroup v2, this node perhaps not.
fn limits(t: &Context<'_>) -> Result<String> {
    let script = "cd /sys/fs/cgroup; if [ -e cpu.max ]; then cat cpu.max memory.max; else \
                  echo $(cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us); cat memory/memory.limit_in_bytes; fi";
    t.in_pod("resize", "main", script)
}

/// Processors, and memory in MiB.
fn machine(t: &Context<'_>) -> Result<(u64, u64)> {
    let script = "nproc; sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
    let seen = t.in_pod("resize", "main", script)?;
    let (cpus, kib) = seen.split_once('\n').with_context(|| format!("two lines of {seen:?}"))?;
    Ok((cpus.parse()?, kib.parse::<u64>()? >> 10))
}

fn resize(t: &mut Context<'_>) -> Result<()> {
    t.example("resize.yaml")?;
    t.ready(&["resize", "neighbour"])?;
    ensure!(limits(t)? == "100000 100000\n134217728", "{}", limits(t)?);
    let first = machine(t)?;
    t.in_pod("resize", "main", "echo here >/mark")?;

    resize_to(t, "2", "512Mi")?;
    ensure!(limits(t)? == "200000 100000\n536870912", "{}", limits(t)?);
    let large = machine(t)?;
    resize_to(t, "500m", "192Mi")?;
    ensure!(limits(t)? == "50000 100000\n201326592", "{}", limits(t)?);
    let small = machine(t)?;
    if t.settings().is_bulkhead() {
        ensure!((first.0, large.0, small.0) == (1, 2, 1), "{first:?} {large:?} {small:?}");
        // In emulation in steps of 128 MiB.
        ensure!(large.1 >= first.1 + 384, "{first:?} MiB became {large:?}");
        ensure!(small.1 <= first.1 + 128, "{large:?} MiB became {small:?}");
    }

    // Beyond what the node has, and beyond what others leave of it.
    let refused = patch(t, r#"{"requests": {"memory": "9Ti"}, "limits": {"memory": "9Ti"}}"#).output()?;
    refused.expect_failure()?.expect_stderr(&["node didn't have enough allocatable resources: memory"])?;
    patch(t, r#"{"requests": {"cpu": "800m"}, "limits": {"cpu": "1"}}"#).output()?.ok()?;
    t.wait("condition=PodResizePending", &["pod/resize"])?;
    let reason = "{.status.conditions[?(@.type=='PodResizePending')].reason}";
    ensure!(t.field("pod/resize", reason)? == "Deferred", "{}", t.field("pod/resize", reason)?);
    ensure!(limits(t)?.starts_with("50000 "), "{}", limits(t)?);
    t.kubectl_ok(&["delete", "pod", "neighbour", "--wait", "--timeout=60s"])?;
    in_force(t, r#"{"cpu":"1","memory":"192Mi"}"#)?;
    ensure!(limits(t)?.starts_with("100000 "), "{}", limits(t)?);

    // The kubelet lets limits be anything; runc gives a share of what there is.
    if t.settings().is_bulkhead() {
        too_much(t)?;
    }
    // All this while it was the same container.
    ensure!(t.in_pod("resize", "main", "cat /mark")? == "here");
    ensure!(t.field("pod/resize", "{.status.containerStatuses[0].restartCount}")? == "0");
    Ok(())
}

/// What a machine cannot have is told where the user looks, and changes nothing.
fn too_much(t: &Context<'_>) -> Result<()> {
    let before = (limits(t)?, machine(t)?);
    patch(t, r#"{"limits": {"cpu": "999"}}"#).output()?.ok()?;
    let words = ["would need 999 processors, has 1 and can have", "sandbox.max_vcpus"];
    let said = t.event("resize", &words)?;
    ensure!(said.starts_with("ResizeError: "), "{said}");
    let condition = "{.status.conditions[?(@.type=='PodResizeInProgress')]";
    t.wait(&format!("jsonpath={condition}.reason}}=Error"), &["pod/resize"])?;
    let message = t.field("pod/resize", &format!("{condition}.message}}"))?;
    ensure!(words.iter().all(|word| message.contains(word)), "{message}");
    ensure!((limits(t)?, machine(t)?) == before, "{:?} {:?} after {before:?}", limits(t)?, machine(t)?);
    // And back to what can be.
    resize_to(t, "1500m", "128Mi")?;
    ensure!(limits(t)?.starts_with("150000 "), "{}", limits(t)?);
    Ok(())
}
