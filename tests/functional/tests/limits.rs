//! Limits, and what happens at them.

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::common("limits::memory", memory),
    Test::common("limits::memory_over_is_137_and_an_event", memory_over_is_137_and_an_event),
    Test::common("limits::memory_is_all_usable", memory_is_all_usable),
    Test::common("limits::cpus", cpus),
    Test::common("limits::pids", pids),
];

/// Shows the container's own control group inside, whichever version the kernel has.
const SEE: [&str; 2] =
    ["--mount", "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:noexec:nodev"];

/// Goes to that group: with cgroup v2 the whole tree is shown to who has no cgroup namespace of its own.
const GO: &str = "cd /sys/fs/cgroup; cd .$(sed -n s/^0:://p /proc/self/cgroup) 2>/dev/null;";

fn with_view<'a>(flags: &[&'a str]) -> Vec<&'a str> {
    SEE.iter().chain(flags).copied().collect()
}

fn memory(t: &mut Context) -> Result<()> {
    let flags = with_view(&["--memory-limit", "100663296"]);
    let script = format!("{GO} cat memory.max 2>/dev/null || cat memory/memory.limit_in_bytes");
    let seen = t.sh(&flags, &script)?;
    ensure!(seen == "100663296", "saw {seen:?}");
    Ok(())
}

fn memory_over_is_137_and_an_event(t: &mut Context) -> Result<()> {
    let mut events = t.events()?;
    // More than the limit, but not more than a machine made for it has in all: that would be refused at once.
    let command = ["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"];
    t.start_detached(&["--memory-limit", "67108864"], "c", &command)?;
    events.wait(60, "/tasks/oom of c", |e| e.topic == "/tasks/oom" && e.text("container_id") == "c")?;
    let status = events.wait_exit("c", 60)?;
    ensure!(status == 137, "the exit status is {status}");
    t.remove("c")
}

/// A limit is the workload's: what the system below needs comes on top.
fn memory_is_all_usable(t: &mut Context) -> Result<()> {
    t.run_ok(
        &["--memory-limit", "268435456"],
        &["dd", "if=/dev/zero", "of=/dev/null", "bs=220M", "count=1"],
    )?;
    Ok(())
}

fn cpus(t: &mut Context) -> Result<()> {
    let flags = with_view(&["--cpus", "0.5"]);
    let script = format!(
        "{GO} cat cpu.max 2>/dev/null || echo $(cat cpu/cpu.cfs_quota_us) $(cat cpu/cpu.cfs_period_us)"
    );
    let seen = t.sh(&flags, &script)?;
    ensure!(seen == "50000 100000", "saw {seen:?}");
    Ok(())
}

fn pids(t: &mut Context) -> Result<()> {
    let script = "i=0; while [ $i -lt 30 ]; do sleep 1000 & i=$((i+1)); echo $i; done";
    let run = t.run_spec("c", &["sh", "-c", script], |spec| {
        spec["linux"]["resources"]["pids"] = serde_json::json!({ "limit": 12 });
    })?;
    let output = run.output()?.expect_failure()?.expect_stderr(&["can't fork"])?;
    let last: u32 = output.out().lines().last().context("nothing was said")?.parse()?;
    ensure!((8..=11).contains(&last), "{last} processes were allowed of 12");
    Ok(())
}
