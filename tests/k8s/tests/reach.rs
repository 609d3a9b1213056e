//! Every command that reaches into a pod.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Test, stretched};

pub(crate) const TESTS: &[Test] = &[
    Test::common("reach::logs_exec_attach_cp_and_forward", commands),
    Test::common("reach::an_ephemeral_container_debugs", debug),
    Test::bulkhead(
        "reach::what_containers_use_is_told",
        "what the kubelet knows of runc's containers is up to 15 s old, and nothing tells when it is newer",
        usage,
    ),
];

fn commands(t: &mut Context<'_>) -> Result<()> {
    t.example("shell.yaml")?;
    t.ready(&["shell"])?;
    logs_and_attach(t)?;
    exec(t)?;
    copies(t)?;
    forward(t)
}

fn logs_and_attach(t: &mut Context<'_>) -> Result<()> {
    let follow = t.kubectl(&["logs", "-f", "shell"]).spawn()?;
    follow.wait_for_text("ready\n")?;
    follow.wait_for_text("careful\n").context("errors are in the log, too")?;
    let mut attach = t.kubectl(&["attach", "-i", "shell"]).stdin_open().spawn()?;
    attach.write_stdin(b"a word\n")?;
    attach.wait_for_text("heard a word\n")?;
    follow.wait_for_text("heard a word\n")?;
    let last = t.kubectl_ok(&["logs", "--tail", "1", "shell"])?;
    ensure!(last == "heard a word", "{last}");
    Ok(())
}

fn exec(t: &mut Context<'_>) -> Result<()> {
    let exec = t.kubectl(&["exec", "shell", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]).output()?;
    let exec = exec.expect_code(7)?.expect_stderr(&["err", "exit code 7"])?;
    ensure!(exec.out() == "out", "{exec}");
    // A binary megabyte there and back, and the end of input.
    let bytes: Vec<u8> = (0..1_000_003_u32).map(|i| (i * 7 % 251) as u8).collect();
    let cat = t.kubectl(&["exec", "-i", "shell", "--", "cat"]).stdin_bytes(bytes.clone()).output()?.ok()?;
    ensure!(cat.stdout == bytes, "{} bytes came back", cat.stdout.len());
    let missing = t.kubectl(&["exec", "shell", "--", "no-such-program"]).output()?.expect_failure()?;
    missing.expect_stderr(&["no-such-program"])?;
    Ok(())
}

fn copies(t: &mut Context<'_>) -> Result<()> {
    let file = t.write("letter", "hello\n")?.display().to_string();
    t.kubectl_ok(&["cp", &file, "shell:/tmp/letter"])?;
    ensure!(t.in_pod("shell", "shell", "cat /tmp/letter")? == "hello");
    let back = t.dir().join("back").display().to_string();
    t.kubectl_ok(&["cp", "shell:/tmp/letter", &back])?;
    ensure!(fs::read_to_string(&back)? == "hello\n");
    Ok(())
}

fn forward(t: &mut Context<'_>) -> Result<()> {
    let forward = t.kubectl(&["port-forward", "shell", "0:80", "--address", "127.0.0.1"]).spawn()?;
    forward.wait_for_text("Forwarding from 127.0.0.1:")?;
    let said = String::from_utf8_lossy(&forward.stdout_so_far()).into_owned();
    let port = said.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next());
    let port: u16 = port.and_then(|port| port.parse().ok()).with_context(|| format!("no port in {said}"))?;
    for _ in 0..3 {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(stretched(Duration::from_secs(60))))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        ensure!(page.ends_with("page\n"), "{page}");
    }
    Ok(())
}

/// It comes into the machine that runs already, and sees the processes of its target.
fn debug(t: &mut Context<'_>) -> Result<()> {
    t.example("shared-processes.yaml")?;
    t.ready(&["shared-processes"])?;
    let seen = t.in_pod("shared-processes", "main", "ps -o args")?;
    ensure!(seen.contains("sleep 1001") && seen.contains("sleep 1002"), "each sees the other's: {seen}");
    t.in_pod("shared-processes", "other", "kill -9 $(ps -o pid,args | awk '/sleep 100[1]/ {print $1}')")?;
    t.wait("jsonpath={.status.containerStatuses[0].restartCount}=1", &["pod/shared-processes"])?;
    let kernel = t.in_pod("shared-processes", "other", "uname -r")?;
    let script = "uname -r; ps -o args; echo that is all";
    t.kubectl_ok(&[
        "debug",
        "shared-processes",
        "--image=busybox:1.37",
        "--container=look",
        "--target=other",
        "--profile=general",
        "--",
        "sh",
        "-c",
        script,
    ])?;
    let state = "jsonpath={.status.ephemeralContainerStatuses[0].state.terminated.exitCode}=0";
    t.wait(state, &["pod/shared-processes"])?;
    let seen = t.kubectl_ok(&["logs", "shared-processes", "-c", "look"])?;
    ensure!(
        seen.starts_with(&kernel) && seen.contains("sleep 1002") && seen.ends_with("that is all"),
        "{seen}"
    );
    Ok(())
}

/// What metrics servers read, and `kubectl top` and autoscalers have from them.
fn usage(t: &mut Context<'_>) -> Result<()> {
    t.example("usage.yaml")?;
    t.ready(&["usage"])?;
    let node = t.field("pod/usage", "{.spec.nodeName}")?;
    let figures = t.kubectl_ok(&["get", "--raw", &format!("/api/v1/nodes/{node}/proxy/metrics/resource")])?;
    let figure = |name: &str, container: &str| -> Result<f64> {
        let start = format!("{name}{{container=\"{container}\",namespace=\"default\",pod=\"usage\"}} ");
        let line = figures.lines().find_map(|line| line.strip_prefix(&start));
        let value = line.and_then(|line| line.split(' ').next());
        Ok(value.with_context(|| format!("no {name} of {container} in {figures}"))?.parse()?)
    };
    let memory = |container| figure("container_memory_working_set_bytes", container);
    let (busy, idle) = (memory("busy")?, memory("idle")?);
    let mib = f64::from(1 << 20);
    ensure!((40.0 * mib..64.0 * mib).contains(&busy), "busy uses {busy} bytes");
    ensure!((1.0..16.0 * mib).contains(&idle), "idle uses {idle} bytes");
    ensure!(figure("container_cpu_usage_seconds_total", "busy")? > 0.0, "{figures}");
    // Without it a metrics server leaves a container out.
    let (started, now) = (figure("container_start_time_seconds", "busy")?, unix_now()?);
    ensure!((now - 600.0..=now).contains(&started), "started at {started}, and it is {now}");
    Ok(())
}

fn unix_now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}
