//! The life of a container that runs in the background, by every command that looks at it or changes it.

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Test};
use serde_json::Value;

use crate::SLEEPER;

pub(crate) const TESTS: &[Test] = &[
    Test::common("life::it_is_looked_at", looked_at),
    Test::common("life::logs_are_followed_to_their_end", logs),
    Test::common("life::it_is_stopped_started_paused_and_killed", stopped_started_paused_and_killed),
    Test::common("life::it_is_restarted", restarted),
    Test::common("life::a_signal_to_its_pid_reaches_it", signal),
];

pub(crate) fn inspect(t: &Context<'_>, name: &str) -> Result<Value> {
    let all: Value = serde_json::from_str(&t.nerdctl_ok(&["inspect", name])?)?;
    Ok(all[0].clone())
}

fn looked_at(t: &mut Context<'_>) -> Result<()> {
    t.nerdctl_start("box", &["-e", "A=1"], SLEEPER)?;
    let ps = t.nerdctl_ok(&["ps", "--format", "{{.Names}} {{.Status}}"])?;
    ensure!(ps == "box Up", "{ps}");
    let seen = inspect(t, "box")?;
    ensure!(seen["State"]["Status"] == "running" && seen["State"]["Running"] == true, "{seen}");
    ensure!(
        seen["NetworkSettings"]["IPAddress"].as_str().is_some_and(|ip| ip.starts_with("10.4.0.")),
        "{seen}"
    );
    let exec =
        t.nerdctl()?.args(["exec", "-e", "B=2", "-w", "/tmp", "box", "sh", "-c", "echo $A$B $PWD; exit 5"]);
    let exec = exec.output()?.expect_failure()?.expect_stderr(&["exit code 5"])?;
    ensure!(exec.out() == "12 /tmp", "{exec}");
    let cat = t.nerdctl()?.args(["exec", "-i", "box", "cat"]).stdin_bytes("typed\n").output()?.ok()?;
    ensure!(cat.out() == "typed", "{cat}");
    let top = t.nerdctl_ok(&["top", "box"])?;
    ensure!(top.lines().count() > 1 && top.contains("sleep 1000"), "{top}");
    let stats = t.nerdctl_ok(&[
        "stats",
        "--no-stream",
        "--format",
        "{{.Name}} {{.PIDs}} {{.MemUsage}} {{.NetIO}}",
        "box",
    ])?;
    let pids: Option<u32> = stats.split(' ').nth(1).and_then(|n| n.parse().ok());
    ensure!(
        stats.starts_with("box ") && pids.is_some_and(|n| n >= 2) && !stats.contains("0B / 0B /"),
        "{stats}"
    );
    t.nerdctl_ok(&["rename", "box", "other"])?;
    t.nerdctl_ok(&["rm", "-f", "other"])?;
    Ok(())
}

fn logs(t: &mut Context<'_>) -> Result<()> {
    let script = "echo first; echo error >&2; trap 'echo last; exit 4' TERM; sleep 1000 & wait";
    t.nerdctl_start("box", &[], script)?;
    let follow = t.nerdctl()?.args(["logs", "-f", "box"]).spawn()?;
    follow.wait_for_text("first")?;
    t.nerdctl_ok(&["stop", "-t", "60", "box"])?;
    let seen = follow.wait()?.ok()?;
    ensure!(seen.out() == "first\nlast" && seen.err().contains("error"), "{seen}");
    let again = t.nerdctl()?.args(["logs", "--tail", "1", "box"]).output()?.ok()?;
    ensure!(again.out() == "last", "{again}");
    ensure!(t.nerdctl_ok(&["wait", "box"])? == "4");
    t.nerdctl_ok(&["rm", "box"])?;
    // None of many lines of one that is over at once is missing.
    t.nerdctl_start("quick", &[], "seq 20000")?;
    t.nerdctl_ok(&["wait", "quick"])?;
    let lines = t.nerdctl_ok(&["logs", "quick"])?;
    ensure!(lines.lines().count() == 20_000 && lines.ends_with("\n20000"), "{} lines", lines.lines().count());
    t.nerdctl_ok(&["rm", "quick"])?;
    Ok(())
}

fn stopped_started_paused_and_killed(t: &mut Context<'_>) -> Result<()> {
    let status = |t: &Context<'_>| -> Result<String> {
        Ok(inspect(t, "box")?["State"]["Status"].as_str().context("no status")?.to_owned())
    };
    t.nerdctl_start("box", &[], SLEEPER)?;
    t.nerdctl_ok(&["pause", "box"])?;
    ensure!(status(t)? == "paused");
    t.nerdctl_ok(&["unpause", "box"])?;
    ensure!(t.nerdctl_exec("box", "echo on > /note; echo again")? == "again");
    t.nerdctl_ok(&["stop", "-t", "60", "box"])?;
    ensure!(status(t)? == "exited" && t.nerdctl_ok(&["wait", "box"])? == "0");
    t.nerdctl_ok(&["start", "box"])?;
    ensure!(t.nerdctl_exec("box", "cat /note")? == "on", "its files outlive a stop");
    t.nerdctl_ok(&["kill", "-s", "KILL", "box"])?;
    ensure!(t.nerdctl_ok(&["wait", "box"])? == "137");
    t.nerdctl_ok(&["rm", "box"])?;
    Ok(())
}

/// By containerd's own monitor, which makes the new task without nerdctl.
fn restarted(t: &mut Context<'_>) -> Result<()> {
    let script = "echo . >>/times; echo run $(wc -l </times); trap 'exit 1' TERM; sleep 1000 & wait";
    let id = t.nerdctl_start("box", &["--restart", "on-failure:5"], script)?;
    let mut events = t.events()?;
    t.nerdctl_exec("box", "until pidof sleep >/dev/null; do :; done; kill 1")?;
    ensure!(events.wait_exit(&id, 60)? == 1);
    let started = |e: &harness::Event| e.topic == "/tasks/start" && e.text("container_id") == id;
    events.wait(60, "its second start", started)?;
    let follow = t.nerdctl()?.args(["logs", "-f", "box"]).spawn()?;
    follow.wait_for_text("run 1\nrun 2\n").context("one log for both")?;
    t.nerdctl_exec("box", "ping -c 1 -W 30 10.4.0.1").context("it has its network again")?;
    // Stopped on purpose it stays so; only killed, it might come again before it is removed.
    t.nerdctl_ok(&["stop", "-t", "60", "box"])?;
    t.nerdctl_ok(&["rm", "box"])?;
    Ok(())
}

/// As supervisors do: the pid that is told, in a file or by inspect, is the container's.
fn signal(t: &mut Context<'_>) -> Result<()> {
    for (signal, status) in [("TERM", "6"), ("KILL", "137")] {
        t.nerdctl_start("box", &[], "trap 'exit 6' TERM; sleep 1000 & wait")?;
        t.nerdctl_exec("box", "until pidof sleep >/dev/null; do :; done")?;
        let pid = inspect(t, "box")?["State"]["Pid"].as_u64().context("no pid")?;
        harness::Run::new("kill").args(["-s", signal]).arg(pid.to_string()).output()?.ok()?;
        let seen = t.nerdctl_ok(&["wait", "box"])?;
        ensure!(seen == status, "{seen} after {signal}");
        t.nerdctl_ok(&["rm", "box"])?;
    }
    Ok(())
}
