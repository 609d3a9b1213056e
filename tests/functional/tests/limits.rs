//! Limits, and what happens at them.

use anyhow::{Context as _, Result, bail, ensure};
use harness::{Context, Run, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::common("limits::memory", memory),
    Test::common("limits::memory_over_is_137_and_an_event", memory_over_is_137_and_an_event),
    Test::common("limits::memory_is_all_usable", memory_is_all_usable),
    Test::common("limits::cpus", cpus),
    Test::common("limits::pids", pids),
    Test::bulkhead("limits::without_one", "a container of runc has no machine", without_one),
    Test::bulkhead("limits::devices", "runc limits the host's own devices", devices),
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

/// A limit of the host's device is one of what stands for it in the guest; one of any other device is refused.
fn devices(t: &mut Context) -> Result<()> {
    let file = t.write("disk", vec![0; 1 << 20])?;
    let device = Run::new("losetup").args(["--find", "--show"]).arg(&file).output()?.ok()?.out();
    let limited = |t: &mut Context, name: &str| -> Result<harness::Output> {
        let number = device.trim_start_matches("/dev/loop").parse::<u32>()?;
        let script = format!("{GO} cat io.weight io.max; stat -c '%t %T' {device}");
        let run = t.run_spec(name, &["sh", "-c", &script], |spec| {
            let other = u32::from(name == "other");
            spec["linux"]["devices"] =
                serde_json::json!([{ "path": device, "type": "b", "major": 7, "minor": number }]);
            if let Some(mounts) = spec["mounts"].as_array_mut() {
                mounts.push(serde_json::json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup" }));
            }
            spec["linux"]["resources"]["blockIO"] = serde_json::json!({
                "weight": 500,
                "throttleReadBpsDevice": [{ "major": 7, "minor": number + other, "rate": 1 << 20 }],
            });
        });
        run?.output()
    };
    let results = (limited(t, "c"), limited(t, "other"));
    Run::new("losetup").arg("--detach").arg(&device).output()?.ok()?;
    let output = results.0?.ok()?;
    let said = output.out();
    let [weight, max, numbers] = said.lines().collect::<Vec<_>>()[..] else { bail!("{output}") };
    let numbers: Vec<_> = numbers.split(' ').map(|n| u32::from_str_radix(n, 16)).collect::<Result<_, _>>()?;
    ensure!(weight == "default 4950", "{output}");
    ensure!(max.starts_with(&format!("{}:{} rbps=1048576 ", numbers[0], numbers[1])), "{output}");
    results.1?.expect_failure()?.expect_stderr(&["linux.resources.blockIO: 7:", "is not a device"])?;
    Ok(())
}

/// The machine has the documented size, of which the host has given what was touched. A page that the guest freed
/// stays the host's loss until the guest has reported it free (two seconds, `PAGE_REPORTING_DELAY` in the kernel's
/// `mm/page_reporting.c`), and is taken again without a new one: a new machine's 300 MiB may come partly from those,
/// so that what is used afterwards is bounded, and not how much more it is.
fn without_one(t: &mut Context) -> Result<()> {
    let mount = ["--mount", "type=tmpfs,src=tmpfs,dst=/filled,options=size=400m"];
    t.start_sleeper(&mount, "c")?;
    let memory = |t: &mut Context| -> Result<(u64, u64)> {
        let ps = t.bulkhead(&["ps", "--output", "json"])?.output()?.ok()?;
        let pods: serde_json::Value = serde_json::from_slice(&ps.stdout)?;
        let figure = |key: &str| pods[0][key].as_u64().with_context(|| format!("no {key} in {ps}"));
        Ok((figure("memory_mib")?, figure("memory_used_bytes")? >> 20))
    };
    let (size, before) = memory(t)?;
    let total =
        t.exec("c", "e", &["awk", "/MemTotal/{print int($2/1024)}", "/proc/meminfo"]).output()?.ok()?;
    let total: u64 = total.out().parse()?;
    ensure!(size == 1152 && (1100..=1152).contains(&total), "{size} MiB, of which the guest sees {total}");
    ensure!(before < size / 2, "{before} of {size} MiB are used by a machine that has done nothing");
    t.exec("c", "f", &["dd", "if=/dev/zero", "of=/filled/file", "bs=1M", "count=300"]).output()?.ok()?;
    let (_, after) = memory(t)?;
    ensure!((300..=before + 380).contains(&after), "300 MiB more were {before} -> {after} MiB");
    t.remove("c")
}
