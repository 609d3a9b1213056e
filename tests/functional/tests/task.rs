//! `ctr task`: exec, kill, pause, resume, ps, metrics, attach, delete.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Test};
use serde_json::Value;

pub(crate) const TESTS: &[Test] = &[
    Test::common("task::exec_is_in_the_container", exec_is_in_the_container),
    Test::common("task::exec_exit_code", exec_exit_code),
    Test::common("task::exec_killed_by_a_signal", exec_killed_by_a_signal),
    Test::common("task::exec_user_and_cwd", exec_user_and_cwd),
    Test::common("task::exec_many_at_once", exec_many_at_once),
    Test::common("task::exec_detached", exec_detached),
    Test::common("task::exec_same_id_twice", exec_same_id_twice),
    Test::common("task::kill_signals", kill_signals),
    Test::common("task::kill_exec", kill_exec),
    Test::common("task::kill_all", kill_all),
    Test::common("task::kill_after_exit", kill_after_exit),
    Test::common("task::pause_and_resume", pause_and_resume),
    Test::common("task::ps", ps),
    Test::common("task::metrics_are_real", metrics_are_real),
    Test::common("task::attach", attach),
    Test::common("task::delete_of_a_running_task", delete_of_a_running_task),
    Test::common("task::delete_after_exit", delete_after_exit),
    Test::common("task::start_again_under_the_same_id", start_again_under_the_same_id),
];

fn state(t: &Context, id: &str) -> Result<String> {
    let list = t.ctr_ok(&["task", "ls"])?;
    let row = list.lines().find(|l| l.split_whitespace().next() == Some(id));
    Ok(row
        .with_context(|| format!("no {id} in:\n{list}"))?
        .split_whitespace()
        .last()
        .unwrap_or_default()
        .to_string())
}

fn exec_is_in_the_container(t: &mut Context) -> Result<()> {
    t.start_detached(
        &["--env", "WORD=anchor", "--hostname", "ship"],
        "c",
        &["sh", "-c", "echo mine > /tmp/f; echo $$ > /tmp/pid; trap 'exit 0' TERM; sleep 1000 & wait"],
    )?;
    let seen = t.exec_ok("c", "until [ -s /tmp/pid ]; do sleep 0.1; done; cat /tmp/f; hostname; echo $WORD; tr '\\0' ' ' < /proc/1/cmdline | cut -c1-5; [ $$ -gt 1 ] && echo later")?;
    ensure!(seen == "mine\nship\nanchor\nsh -c\nlater", "saw {seen:?}");
    t.remove("c")
}

fn exec_exit_code(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    for code in [0, 9, 200] {
        t.exec("c", &format!("e{code}"), &["sh", "-c", &format!("exit {code}")])
            .output()?
            .expect_code(code)?;
    }
    t.remove("c")
}

fn exec_killed_by_a_signal(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    t.exec("c", "a", &["sh", "-c", "kill -TERM $$"]).output()?.expect_code(143)?;
    t.exec("c", "b", &["sh", "-c", "kill -SEGV $$"]).output()?.expect_code(139)?;
    t.remove("c")
}

fn exec_user_and_cwd(t: &mut Context) -> Result<()> {
    t.start_sleeper(&["--user", "alice", "--cwd", "/home/alice"], "c")?;
    let seen = t.exec_ok("c", "id -u; pwd")?;
    ensure!(seen == "1000\n/home/alice", "saw {seen:?}");
    let run = t.ctr().args([
        "task",
        "exec",
        "--exec-id",
        "f",
        "--cwd",
        "/etc",
        "--user",
        "65534:65534",
        "c",
        "sh",
        "-c",
        "id -u; pwd",
    ]);
    let output = run.output()?.ok()?;
    ensure!(output.out() == "65534\n/etc", "{output}");
    t.remove("c")
}

fn exec_many_at_once(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let running: Result<Vec<_>> = (0..8)
        .map(|n| t.exec("c", &format!("e{n}"), &["sh", "-c", &format!("echo {n}; exit {n}")]).spawn())
        .collect();
    for (n, proc) in running?.into_iter().enumerate() {
        let output = proc.wait()?.expect_code(n as i32)?;
        ensure!(output.out() == n.to_string(), "{output}");
    }
    t.remove("c")
}

fn exec_detached(t: &mut Context) -> Result<()> {
    let mut events = t.events()?;
    t.start_sleeper(&[], "c")?;
    let log = format!("file://{}/exec.log", t.dir().display());
    t.ctr()
        .args([
            "task",
            "exec",
            "-d",
            "--log-uri",
            &log,
            "--exec-id",
            "e",
            "c",
            "sh",
            "-c",
            "echo done; exit 6",
        ])
        .output()?
        .ok()?;
    let exit = events.wait(30, "the exit of e", |e| e.topic == "/tasks/exit" && e.text("id") == "e")?;
    ensure!(exit.number("exit_status") == 6, "{exit:?}");
    t.ctr().args(["task", "delete", "--exec-id", "e", "c"]).output()?.expect_code(6)?;
    let text = std::fs::read_to_string(t.dir().join("exec.log"))?;
    ensure!(text == "done\n", "the log holds {text:?}");
    t.remove("c")
}

fn exec_same_id_twice(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let first = t.exec("c", "e", &["sh", "-c", "echo up; sleep 1000"]).spawn()?;
    first.wait_for_text("up")?;
    t.exec("c", "e", &["true"]).output()?.expect_failure()?.expect_stderr(&["already exists"])?;
    t.ctr_ok(&["task", "kill", "-s", "KILL", "--exec-id", "e", "c"])?;
    first.wait()?.expect_code(137)?;
    t.remove("c")
}

fn kill_signals(t: &mut Context) -> Result<()> {
    let script =
        "trap 'echo usr1' USR1; trap 'echo term; exit 11' TERM; echo up; while :; do sleep 1000 & wait; done";
    let run = t.run(&["--rm"], "c", &["sh", "-c", script]).spawn()?;
    run.wait_for_text("up")?;
    t.ctr_ok(&["task", "kill", "-s", "SIGUSR1", "c"])?;
    run.wait_for_text("usr1")?;
    t.ctr_ok(&["task", "kill", "c"])?;
    let output = run.wait()?.expect_code(11)?;
    ensure!(output.out() == "up\nusr1\nterm", "{output}");
    Ok(())
}

fn kill_exec(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let exec = t.exec("c", "e", &["sh", "-c", "echo up; sleep 1000"]).spawn()?;
    exec.wait_for_text("up")?;
    t.ctr_ok(&["task", "kill", "-s", "SIGTERM", "--exec-id", "e", "c"])?;
    exec.wait()?.expect_code(143)?;
    ensure!(state(t, "c")? == "RUNNING", "the container went with its exec");
    t.remove("c")
}

fn kill_all(t: &mut Context) -> Result<()> {
    let run = t.run(&["--rm"], "c", &["sh", "-c", "sleep 1000 & sleep 1000 & echo up; wait"]).spawn()?;
    run.wait_for_text("up")?;
    t.ctr_ok(&["task", "kill", "--all", "-s", "SIGKILL", "c"])?;
    run.wait()?.expect_code(137)?;
    Ok(())
}

fn kill_after_exit(t: &mut Context) -> Result<()> {
    let mut events = t.events()?;
    t.start_detached(&[], "c", &["true"])?;
    events.wait_exit("c", 30)?;
    t.ctr()
        .args(["task", "kill", "c"])
        .output()?
        .expect_failure()?
        .expect_stderr(&["process already finished"])?;
    t.remove("c")
}

fn pause_and_resume(t: &mut Context) -> Result<()> {
    let mut echo = t
        .run(&["--rm"], "c", &["sh", "-c", "echo up; while read x; do echo got $x; done; exit 4"])
        .stdin_open()
        .spawn()?;
    echo.wait_for_text("up")?;
    t.ctr_ok(&["task", "pause", "c"])?;
    ensure!(state(t, "c")? == "PAUSED", "task ls says {}", state(t, "c")?);
    echo.write_stdin(b"letter\n")?;
    ensure!(!echo.saw("got", Duration::from_millis(1500)), "a paused container has answered");
    t.exec("c", "e", &["true"]).output()?.expect_failure()?.expect_stderr(&["paused"])?;
    t.ctr_ok(&["task", "resume", "c"])?;
    echo.wait_for_text("got letter")?;
    ensure!(state(t, "c")? == "RUNNING", "task ls says {}", state(t, "c")?);
    echo.close_stdin();
    echo.wait()?.expect_code(4)?;
    Ok(())
}

fn ps(t: &mut Context) -> Result<()> {
    let pid_file = t.dir().join("pid");
    let run = t
        .run(
            &["--rm", "--pid-file", &pid_file.display().to_string()],
            "c",
            &["sh", "-c", "sleep 1000 & echo up; wait"],
        )
        .spawn()?;
    run.wait_for_text("up")?;
    let init = std::fs::read_to_string(&pid_file)?;
    let table = t.ctr_ok(&["task", "ps", "c"])?;
    let pids: Vec<&str> = table.lines().skip(1).filter_map(|l| l.split_whitespace().next()).collect();
    ensure!(pids.len() == 2, "two processes run, ps shows:\n{table}");
    ensure!(pids.contains(&init.trim()), "{init} is not in:\n{table}");
    // The other one has a pid of the guest, which must not look like one of the host (pid_max is at most 1 << 22).
    let beyond = pids.iter().filter(|pid| pid.parse().is_ok_and(|pid: u32| pid > 1 << 22)).count();
    ensure!(!t.settings().is_bulkhead() || beyond == 1, "{table}");
    t.ctr_ok(&["task", "kill", "-s", "KILL", "c"])?;
    run.wait()?.expect_code(137)?;
    Ok(())
}

fn metrics(t: &Context) -> Result<Value> {
    Ok(serde_json::from_str(&t.ctr_ok(&["task", "metrics", "--format", "json", "c"])?)?)
}

/// Seconds of processor time, from metrics of either version of cgroups.
fn cpu_seconds(m: &Value) -> f64 {
    m["cpu"]["usage_usec"]
        .as_f64()
        .map(|us| us / 1e6)
        .or(m["cpu"]["usage"]["total"].as_f64().map(|ns| ns / 1e9))
        .unwrap_or(0.0)
}

fn metrics_are_real(t: &mut Context) -> Result<()> {
    t.start_sleeper(&["--memory-limit", "134217728"], "c")?;
    let before = metrics(t)?;
    // The shell's memory grows by 24 MB and stays until the text is dropped.
    t.exec_ok(
        "c",
        "x=$(head -c 24000000 /dev/zero | tr '\\0' x); i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done",
    )?;
    t.exec_ok("c", "dd if=/dev/zero of=/dev/shm/f bs=1M count=20 2>/dev/null")?;
    let after = metrics(t)?;
    let grown = cpu_seconds(&after) - cpu_seconds(&before);
    ensure!((0.05..60.0).contains(&grown), "a loop took {grown} s of processor time; {after:#}");
    let usage =
        |m: &Value| m["memory"]["usage"].as_u64().or(m["memory"]["usage"]["usage"].as_u64()).unwrap_or(0);
    ensure!(usage(&after) > usage(&before) + (15 << 20), "20 MB more are in use: {before:#} {after:#}");
    let limit = after["memory"]["usage_limit"].as_u64().or(after["memory"]["usage"]["limit"].as_u64());
    ensure!(limit == Some(134_217_728), "the limit shows as {limit:?}");
    let pids = after["pids"]["current"].as_u64().unwrap_or(0);
    ensure!((1..=3).contains(&pids), "{pids} processes");
    t.remove("c")
}

fn attach(t: &mut Context) -> Result<()> {
    let script = "echo up; while read x; do echo got $x; [ $x = end ] && exit 13; done";
    // Without --null-io: the fifos are there, and attach opens them.
    t.run(&["-d"], "c", &["sh", "-c", script]).output()?.ok()?;
    let mut attached = t.ctr().args(["task", "attach", "c"]).stdin_open().spawn()?;
    attached.write_stdin(b"first\n")?;
    attached.wait_for_text("got first")?;
    attached.write_stdin(b"end\n")?;
    let output = attached.wait()?.expect_code(13)?;
    ensure!(output.out().ends_with("got first\ngot end"), "{output}");
    t.ctr_ok(&["container", "delete", "c"])?;
    Ok(())
}

fn delete_of_a_running_task(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    t.ctr().args(["task", "delete", "c"]).output()?.expect_failure()?;
    ensure!(state(t, "c")? == "RUNNING", "the refused delete has ended it");
    t.remove("c")
}

fn delete_after_exit(t: &mut Context) -> Result<()> {
    let mut events = t.events()?;
    t.start_detached(&[], "c", &["sh", "-c", "exit 21"])?;
    ensure!(events.wait_exit("c", 30)? == 21, "the exit event says something else");
    ensure!(state(t, "c")? == "STOPPED", "task ls says {}", state(t, "c")?);
    let output = t.ctr().args(["task", "delete", "c"]).output()?.ok()?;
    output.expect_stderr(&["21"])?;
    t.ctr_ok(&["container", "delete", "c"])?;
    Ok(())
}

fn start_again_under_the_same_id(t: &mut Context) -> Result<()> {
    for round in ["one", "two"] {
        let seen = t.run_ok(&[], &["echo", round])?;
        ensure!(seen == round, "saw {seen:?}");
    }
    t.start_sleeper(&[], "c")?;
    t.run(&[], "c", &["true"]).output()?.expect_failure()?.expect_stderr(&["already exists"])?;
    ensure!(state(t, "c")? == "RUNNING", "the refused second start has ended the first");
    t.remove("c")
}
