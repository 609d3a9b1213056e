//! Ends that nobody planned: programs killed at the worst time. Never a success, and nothing is left.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::{Context, Test, signal_process, wait_for_exit};
use rustix::process::Signal;

pub(crate) const TESTS: &[Test] = &[
    Test::common("ends::containerd_restarts_while_running", containerd_restarts_while_running),
    Test::common("ends::containerd_killed_while_running", containerd_killed_while_running),
    Test::common("ends::container_ends_while_containerd_is_away", container_ends_while_containerd_is_away),
    Test::common("ends::shim_killed_while_running", shim_killed_while_running),
    Test::common("ends::shim_killed_during_exec", shim_killed_during_exec),
];

/// Kills the one process of the runtime whose name starts with `name`, and waits until it is gone.
fn kill(t: &Context, name: &str) -> Result<()> {
    let target = t.process(name)?;
    let fd =
        signal_process(target.pid, Signal::KILL, |_| t.process(name).is_ok_and(|p| p.pid == target.pid))?;
    wait_for_exit(&fd, Duration::from_secs(10))
}

fn reachable(t: &Context, id: &str) -> Result<()> {
    let seen = t.exec_ok(id, "echo reached")?;
    ensure!(seen == "reached", "saw {seen:?}");
    Ok(())
}

fn containerd_restarts_while_running(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    t.node().restart()?;
    let list = t.ctr_ok(&["task", "ls"])?;
    ensure!(list.lines().any(|l| l.starts_with("c ") && l.ends_with("RUNNING")), "task ls shows:\n{list}");
    reachable(t, "c")?;
    t.remove("c")
}

fn containerd_killed_while_running(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    t.node().kill()?;
    t.node().launch()?;
    reachable(t, "c")?;
    t.remove("c")
}

fn container_ends_while_containerd_is_away(t: &mut Context) -> Result<()> {
    let dir = t.dir().join("shared");
    std::fs::create_dir(&dir)?;
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:rw", dir.display());
    t.start_detached(
        &["--mount", &mount],
        "c",
        &["sh", "-c", "trap 'exit 23' TERM; echo > /mnt/up; sleep 1000 & wait"],
    )?;
    let exec = t
        .exec(
            "c",
            "e",
            &["sh", "-c", "until [ -e /mnt/up ]; do sleep 0.1; done; echo ready; read x; kill -TERM 1"],
        )
        .stdin_open();
    let mut exec = exec.spawn()?;
    exec.wait_for_text("ready")?;
    t.node().kill()?;
    // ctr goes with its daemon, or stays with the fifos in hand: either way the line arrives.
    exec.write_stdin(b"go\n").ok();
    exec.close_stdin();
    drop(exec);
    t.node().launch()?;
    // containerd may have reaped the ended task already when it came back, or leave that to the user.
    let output = t.ctr().args(["task", "delete", "--force", "c"]).output()?;
    if output.exit != harness::Exit::Code(0) {
        output.expect_stderr(&["not found"])?;
    }
    t.ctr_ok(&["container", "delete", "c"])?;
    Ok(())
}

fn shim_killed_while_running(t: &mut Context) -> Result<()> {
    let mut events = t.events()?;
    t.start_sleeper(&[], "c")?;
    kill(t, "containerd-shim-")?;
    let status = events.wait_exit("c", 30)?;
    ensure!(status == 137 || status == 255, "the exit status is {status}");
    t.ctr_ok(&["container", "delete", "c"])?;
    Ok(())
}

fn shim_killed_during_exec(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let exec = t.exec("c", "e", &["sh", "-c", "echo up; sleep 1000"]).spawn()?;
    exec.wait_for_text("up")?;
    kill(t, "containerd-shim-")?;
    let output = exec.wait()?.expect_failure()?;
    ensure!(output.took < Duration::from_secs(60), "{output}");
    t.ctr_ok(&["container", "delete", "c"])?;
    Ok(())
}
