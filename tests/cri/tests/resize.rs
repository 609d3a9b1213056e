//! Limits that change while a pod runs, and the machine that follows them.

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Run, Test};
use serde_json::{Value, json};

use crate::SLEEPER;

const WHY: &str = "runc has no machine";

pub(crate) const TESTS: &[Test] = &[
    Test::bulkhead("resize::an_update_makes_the_machine_larger_and_smaller", WHY, up_and_down),
    Test::bulkhead("resize::containers_that_come_and_go_do_so", WHY, come_and_go),
    Test::bulkhead("resize::more_than_there_can_be_is_refused_and_nothing_changes", WHY, refused),
    Test::bulkhead("resize::processors_that_a_pod_has_stated_can_go", WHY, stated),
    Test::bulkhead("resize::a_container_without_a_limit_gets_the_default_beside_others", WHY, unlimited),
];

/// Bytes in a MiB.
const MIB: u64 = 1 << 20;
/// A machine of a pod that states nothing: the workload's default and the guest's reserve.
const BOOT_MIB: u64 = 1024 + 128;
/// The container's own limits, as it sees them.
const LIMITS: &str = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";

fn limits(mib: u64, quota: u64) -> Value {
    json!({"memory_limit_in_bytes": mib * MIB, "cpu_quota": quota, "cpu_period": 100_000})
}

fn update(t: &Context<'_>, id: &str, mib: u64, quota: u64) -> Result<Run> {
    let (bytes, quota) = ((mib * MIB).to_string(), quota.to_string());
    let args = ["update", "--memory", &bytes, "--cpu-quota", &quota, "--cpu-period", "100000", id];
    Ok(t.crictl()?.args(args))
}

/// What the guest's kernel has, in MiB.
fn mem_total(t: &Context<'_>, id: &str) -> Result<u64> {
    let kib = t.exec_in(id, "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")?;
    Ok(kib.parse::<u64>().with_context(|| format!("MemTotal is {kib:?}"))? >> 10)
}

/// The one pod as `bulkhead ps` tells it.
fn machine(t: &Context<'_>) -> Result<Value> {
    let ps = t.bulkhead(&["ps", "--output", "json"])?.output()?.ok()?;
    let pods: Value = serde_json::from_slice(&ps.stdout)?;
    Ok(pods[0].clone())
}

/// Of the guest's memory what the host has given, in MiB.
fn held_by_host(t: &Context<'_>) -> Result<u64> {
    let pid = machine(t)?["vmm_pid"].as_i64().context("no pid of the machine")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status.lines().find_map(|line| line.strip_prefix("RssShmem:")?.trim().strip_suffix(" kB"));
    Ok(kib.with_context(|| format!("no RssShmem in {status}"))?.parse::<u64>()? >> 10)
}

fn up_and_down(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let a = t.create_in(&pod, "a", SLEEPER, |c| c["linux"]["resources"] = limits(256, 50_000))?;
    t.crictl_ok(&["start", &a])?;
    let before = mem_total(t, &a)?;
    ensure!(t.exec_in(&a, "nproc")? == "1");
    ensure!(machine(t)?["memory_mib"] == BOOT_MIB, "{}", machine(t)?);

    update(t, &a, 2048, 200_000)?.output()?.ok()?;
    ensure!(t.exec_in(&a, LIMITS)? == format!("{}\n200000 100000", 2048 * MIB));
    let total = mem_total(t, &a)?;
    // 1024 MiB and their descriptions.
    ensure!((before + 1024..before + 1024 + 256).contains(&total), "{before} MiB became {total}");
    ensure!(t.exec_in(&a, "nproc")? == "2");
    let told = machine(t)?;
    ensure!(told["vcpus"] == 2 && told["memory_mib"].as_u64() >= Some(BOOT_MIB + 1024), "{told}");
    // More than there was at boot can be used, and is taken from the host for as long.
    t.exec_in(&a, "dd if=/dev/zero of=/dev/shm/x bs=1M count=50 2>/dev/null; dd if=/dev/zero of=/dev/null bs=1400M count=1")?;
    let used = held_by_host(t)?;
    ensure!(used > 1400, "{used} MiB");

    update(t, &a, 256, 50_000)?.output()?.ok()?;
    ensure!(t.exec_in(&a, LIMITS)? == format!("{}\n50000 100000", 256 * MIB));
    ensure!(t.exec_in(&a, "nproc")? == "1");
    let total = mem_total(t, &a)?;
    ensure!(total <= before, "{before} MiB became {total}");
    let told = machine(t)?;
    ensure!(told["vcpus"] == 1 && told["memory_mib"] == BOOT_MIB, "{told}");
    let held = held_by_host(t)?;
    ensure!(held <= BOOT_MIB && held + 300 < used, "{used} MiB became {held}");

    // And once more: what the guest has let go of comes back.
    update(t, &a, 1536, 150_000)?.output()?.ok()?;
    ensure!(mem_total(t, &a)? >= before + 512);
    ensure!(t.exec_in(&a, "nproc")? == "2");
    ensure!(t.exec_in(&a, "stat -c %s /dev/shm/x")? == (50 * MIB).to_string());
    t.remove_pod(&pod)
}

fn come_and_go(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    let (before, boot) = (mem_total(t, &a)?, machine(t)?["memory_mib"].clone());
    let b = t.create_in(&pod, "b", SLEEPER, |c| c["linux"]["resources"] = limits(1536, 200_000))?;
    // CRI has the container made when it is started.
    t.crictl_ok(&["start", &b])?;
    ensure!(mem_total(t, &a)? >= before + 512);
    ensure!(t.exec_in(&a, "nproc")? == "2");
    t.crictl_ok(&["rm", "--force", &b])?;
    // Nobody who removes a container waits for this; the shim says it.
    t.log_says(&[&format!("the machine has {boot} MiB of memory and 1 processors")])?;
    ensure!(t.exec_in(&a, "nproc")? == "1");
    ensure!(mem_total(t, &a)? <= before);
    t.remove_pod(&pod)
}

fn refused(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let a = t.create_in(&pod, "a", SLEEPER, |c| c["linux"]["resources"] = limits(256, 50_000))?;
    t.crictl_ok(&["start", &a])?;
    let before = state(t, &a)?;
    let much = 64 << 20;
    let need = format!(
        "would need {} MiB of memory, 128 of them for the guest itself, has {BOOT_MIB} and can have",
        much + 128 + 256
    );
    let memory = update(t, &a, much + 256, 50_000)?.output()?.expect_failure()?;
    memory.expect_stderr(&["cannot update container", &need, "sandbox.max_memory_mib"])?;
    let cpus = update(t, &a, 512, 99_900_000)?.output()?.expect_failure()?;
    cpus.expect_stderr(&["would need 999 processors, has 1 and can have", "sandbox.max_vcpus"])?;
    ensure!(state(t, &a)? == before, "{:?} after {before:?}", state(t, &a)?);

    // CRI has the container made when it is started.
    let b = t.create_in(&pod, "b", SLEEPER, |c| c["linux"]["resources"] = limits(much, 50_000))?;
    let start = t.crictl()?.args(["start", &b]).output()?.expect_failure()?;
    start.expect_stderr(&["cannot create container", &need, "sandbox.max_memory_mib"])?;
    ensure!(state(t, &a)? == before, "{:?} after {before:?}", state(t, &a)?);
    t.remove_pod(&pod)
}

/// What an update changes: limits, the memory that the guest has, and the machine as `bulkhead ps` tells it.
fn state(t: &Context<'_>, id: &str) -> Result<(String, u64, [Value; 2])> {
    let told = machine(t)?;
    Ok((t.exec_in(id, LIMITS)?, mem_total(t, id)?, [told["vcpus"].clone(), told["memory_mib"].clone()]))
}

/// The pod's sum is of the one container that has a limit, as the kubelet states it.
fn unlimited(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |p| p["linux"]["resources"] = limits(100, 100_000))?;
    let a = t.create_in(&pod, "a", SLEEPER, |c| c["linux"]["resources"] = limits(100, 100_000))?;
    t.crictl_ok(&["start", &a])?;
    let before = mem_total(t, &a)?;
    ensure!(before < 300, "{before} MiB");
    let b = t.run_in(&pod, "b", SLEEPER)?;
    let after = mem_total(t, &b)?;
    // The default, what describes its pages, and what fills the last block in emulation.
    ensure!((before + 1000..before + 1200).contains(&after), "{before} MiB became {after}");
    t.crictl_ok(&["rm", "--force", &b])?;
    t.remove_pod(&pod)
}

/// Two processors at boot, by the sum that the pod states; an update of its container leaves one.
fn stated(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |p| p["linux"]["resources"] = limits(256, 200_000))?;
    let a = t.create_in(&pod, "a", SLEEPER, |c| c["linux"]["resources"] = limits(256, 200_000))?;
    t.crictl_ok(&["start", &a])?;
    ensure!(t.exec_in(&a, "nproc")? == "2");
    update(t, &a, 256, 100_000)?.output()?.ok()?;
    ensure!(t.exec_in(&a, "nproc")? == "1");
    update(t, &a, 256, 200_000)?.output()?.ok()?;
    ensure!(t.exec_in(&a, "nproc")? == "2");
    t.remove_pod(&pod)
}
