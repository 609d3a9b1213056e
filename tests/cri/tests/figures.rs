//! What containerd's CRI tells of the resources of pods and containers.

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Figures, Test};
use serde_json::{Value, json};

use crate::{SLEEPER, pod::inspect};

pub(crate) const TESTS: &[Test] = &[
    Test::common("figures::stats_are_those_of_the_container", stats),
    Test::common("figures::statsp_are_those_of_the_pod", pod_stats),
    Test::common("figures::a_container_is_killed_at_its_limit_and_its_neighbour_lives", limit),
    Test::bulkhead("figures::a_machine_is_as_large_as_its_pod", "runc has no machine", sized),
    Test::bulkhead("figures::a_scrape_tells_each_container", "runc's shim tells nothing of itself", scrape),
];

fn stats(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let hold =
        "dd if=/dev/zero of=/dev/shm/hold bs=1M count=20 2>/dev/null; trap 'exit 0' TERM; sleep 1000 & wait";
    let a = t.run_in(&pod, "a", hold)?;
    let b = t.run_in(&pod, "b", SLEEPER)?;
    t.exec_in(&a, "until [ \"$(stat -c %s /dev/shm/hold)\" = 20971520 ]; do sleep 0.1; done")?;
    let (a, b) = (working_set(t, &a)?, working_set(t, &b)?);
    ensure!(a > 20 << 20, "{a} bytes");
    ensure!(b < 15 << 20, "{b} bytes");
    t.remove_pod(&pod)
}

/// Bytes, as `crictl stats` tells them.
pub(crate) fn working_set(t: &Context<'_>, id: &str) -> Result<u64> {
    let all: Value = serde_json::from_str(&t.crictl_ok(&["stats", "--output", "json", "--id", id])?)?;
    let bytes = &all["stats"][0]["memory"]["workingSetBytes"]["value"];
    bytes.as_str().and_then(|text| text.parse().ok()).with_context(|| format!("no working set in {all}"))
}

fn pod_stats(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    t.run_in(&pod, "a", SLEEPER)?;
    let all: Value = serde_json::from_str(&t.crictl_ok(&["statsp", "--output", "json", "--id", &pod.id])?)?;
    let linux = &all["stats"][0]["linux"];
    ensure!(linux["memory"]["workingSetBytes"]["value"].is_string(), "{all}");
    ensure!(linux["network"]["defaultInterface"]["name"] == "eth0", "{all}");
    ensure!(linux["containers"].as_array().is_some_and(|c| c.len() == 1), "{all}");
    t.remove_pod(&pod)
}

fn limit(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let b = t.run_in(&pod, "b", SLEEPER)?;
    // Swap would only make it slower.
    let limits = json!({"memory_limit_in_bytes": 32 << 20, "memory_swap_limit_in_bytes": 32 << 20});
    let script = "dd if=/dev/zero of=/dev/null bs=64M count=1";
    let a = t.create_in(&pod, "a", script, |c| c["linux"]["resources"] = limits)?;
    let mut events = t.events()?;
    t.crictl_ok(&["start", &a])?;
    ensure!(events.wait_exit(&a, 60)? == 137);
    let status = inspect(t, "inspect", &a)?;
    ensure!(status["status"]["reason"] == "OOMKilled", "{status}");
    ensure!(t.exec_in(&b, "echo here")? == "here");
    t.remove_pod(&pod)
}

fn sized(t: &mut Context<'_>) -> Result<()> {
    let resources = json!({"memory_limit_in_bytes": 256 << 20, "cpu_quota": 150_000, "cpu_period": 100_000});
    let pod = t.pod("p", |p| p["linux"]["resources"] = resources)?;
    let config = t.node().bulkhead_config();
    let ps = harness::Run::new(t.settings().program("bulkhead")?).args(["ps", "--output", "json"]);
    let pods: Value = serde_json::from_slice(&ps.env("BULKHEAD_CONFIG", config).output()?.ok()?.stdout)?;
    ensure!(pods[0]["memory_mib"] == 256 + 128, "{pods}");
    ensure!(pods[0]["vcpus"] == 2, "{pods}");
    t.remove_pod(&pod)
}

/// Two containers of one pod, and none that only stands for it.
fn scrape(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let empty = Figures::scrape(&t.pod_dir(&pod.id)?.join("metrics.sock"))?;
    ensure!(empty.get("bulkhead_machine_up", &[])? == 1.0);
    ensure!(empty.find("bulkhead_container_pids", &[]).is_none(), "there is no container: {empty:#?}");
    let (a, b) = (t.run_in(&pod, "a", SLEEPER)?, t.run_in(&pod, "b", SLEEPER)?);
    let page = t.bulkhead(&["metrics", &pod.id[..12]])?.output()?.ok()?;
    let page = Figures::parse(&String::from_utf8(page.stdout)?)?;
    for id in [&a, &b] {
        let labels = [format!("pod=\"{}\"", pod.id), format!("container=\"{id}\"")];
        ensure!(page.get("bulkhead_container_pids", &[&labels[0], &labels[1]])? >= 1.0);
    }
    ensure!(page.find("bulkhead_container_pids", &[&format!("container=\"{}\"", pod.id)]).is_none());
    t.remove_pod(&pod)
}
