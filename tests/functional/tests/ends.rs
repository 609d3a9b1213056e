//! Ends that nobody planned: programs killed at the worst time. Never a success, and nothing is left.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Part, Test, Watcher, signal_process, stretched, wait_for_exit};
use rustix::process::Signal;

pub(crate) const TESTS: &[Test] = &[
    Test::common("ends::containerd_restarts_while_running", containerd_restarts_while_running),
    Test::common("ends::containerd_killed_while_running", containerd_killed_while_running),
    Test::common("ends::container_ends_while_containerd_is_away", container_ends_while_containerd_is_away),
    Test::common("ends::shim_killed_while_running", shim_killed_while_running),
    Test::common("ends::shim_killed_and_its_hooks_undone", shim_killed_and_its_hooks_undone),
    Test::common("ends::shim_killed_during_exec", shim_killed_during_exec),
    Test::common("ends::shim_killed_before_create", shim_killed_before_create),
    Test::common("ends::shim_killed_while_stopping", shim_killed_while_stopping),
    Test::common("ends::containerd_killed_before_create", containerd_killed_before_create),
    Test::common("ends::containerd_killed_while_stopping", containerd_killed_while_stopping),
    Test::common("ends::containerd_killed_during_exec", containerd_killed_during_exec),
    Test::bulkhead("ends::vmm_killed_while_running", PARTS, |t| killed_while_running(t, 0)),
    Test::bulkhead("ends::helpers_killed_while_running", PARTS, |t| each_helper(t, killed_while_running)),
    Test::bulkhead("ends::vmm_killed_during_exec", PARTS, |t| killed_during_exec(t, 0)),
    Test::bulkhead("ends::helpers_killed_during_exec", PARTS, |t| each_helper(t, killed_during_exec)),
    Test::bulkhead("ends::vmm_killed_while_stopping", PARTS, |t| part_killed_while_stopping(t, 0)),
    Test::bulkhead("ends::helpers_killed_while_stopping", PARTS, |t| {
        each_helper(t, part_killed_while_stopping)
    }),
    Test::bulkhead("ends::vmm_killed_at_its_launch", PARTS, |t| killed_at_its_launch(t, 0)),
    Test::bulkhead("ends::helpers_killed_at_their_launch", PARTS, |t| each_helper(t, killed_at_its_launch)),
    Test::bulkhead("ends::vmm_killed_during_boot", PARTS, |t| killed_during_boot(t, 0)),
    Test::bulkhead("ends::helpers_killed_during_boot", PARTS, |t| each_helper(t, killed_during_boot)),
    Test::bulkhead("ends::shim_killed_during_boot", PARTS, shim_killed_during_boot),
    Test::bulkhead("ends::containerd_killed_during_boot", PARTS, containerd_killed_during_boot),
    Test::common("ends::a_reboot_is_the_containers", reboot),
    Test::bulkhead("ends::guest_panic", "runc has no guest", guest_panic),
];

const PARTS: &str = "a container of runc has no machine";
const SHIM: &str = "containerd-shim-";
const SOCKETS: &str = "/run/containerd/s";

/// Kills the one process of the runtime whose name starts with `name`, and waits until it is gone.
fn kill(t: &Context, name: &str) -> Result<()> {
    let target = t.process(name)?;
    let fd =
        signal_process(target.pid, Signal::KILL, |_| t.process(name).is_ok_and(|p| p.pid == target.pid))?;
    wait_for_exit(&fd, Duration::from_secs(10))
}

fn reachable(t: &Context, id: &str) -> Result<()> {
    let output = t.exec(id, "reach", &["echo", "reached"]).output()?.ok()?;
    ensure!(output.out() == "reached", "{output}");
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

/// What a client's hooks have made (a network, say) its poststop hook takes back, whoever runs it.
fn shim_killed_and_its_hooks_undone(t: &mut Context) -> Result<()> {
    let mut events = t.events()?;
    let note = t.dir().join("undone");
    let script = format!("echo again >> {}", note.display());
    let run = t.run_spec("c", &["sh", "-c", "echo up; sleep 1000"], |spec| {
        let hook = serde_json::json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
        spec["hooks"] = serde_json::json!({ "poststop": hook });
    })?;
    let run = run.spawn()?;
    run.wait_for_text("up")?;
    kill(t, SHIM)?;
    run.wait()?.expect_failure()?;
    // ctr sees the connection break; the clean-up comes after that, and ends with this event.
    no_success(events.wait_exit("c", 60)?)?;
    let undone = std::fs::read_to_string(&note).context("the poststop hook did not run")?;
    ensure!(undone == "again\n", "it ran more than once: {undone:?}");
    Ok(())
}

fn shim_killed_during_exec(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let exec = t.exec("c", "e", &["sh", "-c", "echo up; sleep 1000"]).spawn()?;
    exec.wait_for_text("up")?;
    kill(t, "containerd-shim-")?;
    let output = exec.wait()?.expect_failure()?;
    ensure!(output.took < stretched(Duration::from_secs(60)), "{output}");
    t.ctr_ok(&["container", "delete", "c"])?;
    Ok(())
}

/// The exit status of something that ended by no will of its own.
fn no_success(status: u64) -> Result<()> {
    ensure!(status == 137 || status == 255, "the exit status is {status}");
    Ok(())
}

/// A container that is on its way, as early as can be seen from outside: the shim's socket has just appeared.
fn before_create(t: &mut Context) -> Result<harness::Proc> {
    let sockets = Path::new(SOCKETS);
    std::fs::create_dir_all(sockets)?;
    let appears = Watcher::new(sockets)?;
    let run = t.run(&["--rm"], "c", &["true"]).spawn()?;
    appears.wait(Duration::from_secs(30))?;
    Ok(run)
}

fn containerd_killed_before_create(t: &mut Context) -> Result<()> {
    let run = before_create(t)?;
    t.node().kill()?;
    run.wait()?.expect_failure()?;
    t.node().launch()?;
    clean_up(t)?;
    t.run(&["--rm"], "c", &["true"]).output()?.ok()?;
    Ok(())
}

fn shim_killed_before_create(t: &mut Context) -> Result<()> {
    let run = before_create(t)?;
    // The program may be the one that starts the server, or the server: both are the shim's.
    let shims: Vec<_> = t.processes().into_iter().filter(|p| p.name.starts_with(SHIM)).collect();
    for shim in shims {
        let same = |pid| t.processes().iter().any(|p| p.pid == pid);
        if let Ok(fd) = signal_process(shim.pid, Signal::KILL, same) {
            wait_for_exit(&fd, Duration::from_secs(10))?;
        }
    }
    // The kill may have come late enough for a container that runs for no time at all.
    run.wait()?;
    // If it came before there was a server, the socket is there and nobody who could remove it: containerd calls no
    // `delete` for a shim that has not answered. Whoever takes the name next replaces it.
    let alone = !t.processes().iter().any(|p| p.name.starts_with(SHIM));
    if alone && std::fs::read_dir(SOCKETS)?.next().is_some() {
        t.run(&["--rm"], "c", &["true"]).output()?.ok()?;
    }
    Ok(())
}

fn shim_killed_while_stopping(t: &mut Context) -> Result<()> {
    killed_while_stopping(t, |t| kill(t, SHIM))
}

fn part_killed_while_stopping(t: &mut Context, part: usize) -> Result<()> {
    killed_while_stopping(t, |t| kill_part(t, part).map(drop))
}

/// A container that was told to stop and does not.
fn stopping(t: &mut Context) -> Result<harness::Proc> {
    let script = "trap 'while :; do :; done' TERM; echo up; while :; do sleep 1000 & wait; done";
    let run = t.run(&[], "c", &["sh", "-c", script]).spawn()?;
    run.wait_for_text("up")?;
    t.ctr_ok(&["task", "kill", "c"])?;
    Ok(run)
}

/// It goes on stopping, and what is left of it is for the user to end.
fn containerd_killed_while_stopping(t: &mut Context) -> Result<()> {
    let run = stopping(t)?;
    t.node().kill()?;
    run.wait()?.expect_failure()?;
    t.node().launch()?;
    let mut events = t.events()?;
    t.ctr_ok(&["task", "kill", "--signal", "KILL", "c"])?;
    no_success(events.wait_exit("c", 60)?)?;
    clean_up(t)
}

/// Killed between the request to stop and the end.
fn killed_while_stopping(t: &mut Context, kill: impl Fn(&mut Context) -> Result<()>) -> Result<()> {
    let mut events = t.events()?;
    let run = stopping(t)?;
    kill(t)?;
    no_success(events.wait_exit("c", 60)?)?;
    run.wait()?.expect_failure()?;
    clean_up(t)
}

/// What a user does after a crash: both may find that it is done already.
fn clean_up(t: &Context) -> Result<()> {
    t.ctr().args(["task", "delete", "--force", "c"]).output()?;
    let output = t.ctr().args(["container", "delete", "c"]).output()?;
    if output.exit != harness::Exit::Code(0) {
        output.expect_stderr(&["not found"])?;
    }
    Ok(())
}

fn containerd_killed_during_exec(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let exec = t.exec("c", "e", &["sh", "-c", "echo up; sleep 1000"]).spawn()?;
    exec.wait_for_text("up")?;
    t.node().kill()?;
    exec.wait()?.expect_failure()?;
    t.node().launch()?;
    reachable(t, "c")?;
    t.remove("c")
}

/// The parts of a pod's machine, from one that is started for it.
fn parts_of_a_pod(t: &mut Context) -> Result<Vec<Part>> {
    // No doorkeeper of an earlier victim.
    t.reset_config()?;
    t.start_sleeper(&[], "c")?;
    let parts = t.parts()?;
    t.remove("c")?;
    Ok(parts)
}

/// Runs a test with the number of each helper: which there are is the backend's business.
fn each_helper(t: &mut Context, test: fn(&mut Context, usize) -> Result<()>) -> Result<()> {
    let parts = parts_of_a_pod(t)?;
    for (number, part) in parts.iter().enumerate().skip(1) {
        test(t, number).with_context(|| format!("the victim was {}", part.name))?;
    }
    Ok(())
}

/// Kills a part of the pod that runs: 0 is the VMM, then come its helpers.
fn kill_part(t: &mut Context, number: usize) -> Result<Part> {
    let part = t.parts()?.get(number).cloned().with_context(|| format!("there is no part {number}"))?;
    t.kill_part(&part)?;
    Ok(part)
}

fn killed_while_running(t: &mut Context, victim: usize) -> Result<()> {
    let mut events = t.events()?;
    let run = t.run(&[], "c", &["sh", "-c", "echo up; sleep 1000"]).spawn()?;
    run.wait_for_text("up")?;
    let part = kill_part(t, victim)?;
    no_success(events.wait_exit("c", 60)?)?;
    let output = run.wait()?;
    ensure!([harness::Exit::Code(137), harness::Exit::Code(255)].contains(&output.exit), "{output}");
    t.log_says(&["level=error", &part.name])?;
    clean_up(t)
}

fn killed_during_exec(t: &mut Context, victim: usize) -> Result<()> {
    let mut events = t.events()?;
    t.start_sleeper(&[], "c")?;
    let exec = t.exec("c", "e", &["sh", "-c", "echo up; sleep 1000"]).spawn()?;
    exec.wait_for_text("up")?;
    kill_part(t, victim)?;
    no_success(events.wait_exit("c", 60)?)?;
    exec.wait()?.expect_failure()?;
    clean_up(t)
}

/// Puts a doorkeeper before the program of a part: it says its pid and waits until it is let through, so
/// that the test knows the moment of the launch without guessing.
fn doorkeeper(t: &mut Context, part: &Part) -> Result<(PathBuf, PathBuf)> {
    let config: harness::Toml =
        std::fs::read_to_string(t.node().bulkhead_config())?.parse::<harness::TomlTable>()?.into();
    let named = config.get("hypervisor").and_then(|h| h.get(part.key)).and_then(|p| p.as_str());
    let real = t.settings().program(named.unwrap_or(&part.program))?;
    let (here, go) = (t.dir().join(format!("{}-here", part.key)), t.dir().join(format!("{}-go", part.key)));
    // An earlier victim may have had them.
    for fifo in [&here, &go].into_iter().filter(|fifo| !fifo.exists()) {
        harness::Run::new("mkfifo").arg(fifo).output()?.ok()?;
    }
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *version*) ;; *) read me rest </proc/self/stat; echo $me >{}; read x <{} ;; esac\n\
         exec {} \"$@\"\n",
        here.display(),
        go.display(),
        real.display()
    );
    let keeper = t.write(&part.program, script)?;
    harness::Run::new("chmod").arg("755").arg(&keeper).output()?.ok()?;
    t.set_config("hypervisor", part.key, keeper.display().to_string().into())?;
    Ok((here, go))
}

/// A container that is on its way: the program of `part` has been launched and has not yet done anything.
struct Door {
    run: harness::Proc,
    part: Part,
    /// All parts of such a machine, with the pids of another.
    parts: Vec<Part>,
    pid: u32,
    go: PathBuf,
}

/// With more words for the guest's kernel.
fn boot_to_the_door(t: &mut Context, part: usize, kernel_params: &str) -> Result<Door> {
    let parts = parts_of_a_pod(t)?;
    let part = parts.get(part).cloned().with_context(|| format!("there is no part {part}"))?;
    t.set_config("hypervisor", "kernel_params", kernel_params.into())?;
    let (here, go) = doorkeeper(t, &part)?;
    let run = t.run(&[], "c", &["true"]).spawn()?;
    let pid = harness::Run::new("cat").arg(&here).deadline(60).output()?.ok()?.out().parse()?;
    Ok(Door { run, part, parts, pid, go })
}

fn killed_at_its_launch(t: &mut Context, victim: usize) -> Result<()> {
    let door = boot_to_the_door(t, victim, "")?;
    let fd = signal_process(door.pid, Signal::KILL, |pid| t.processes().iter().any(|p| p.pid == pid))?;
    wait_for_exit(&fd, Duration::from_secs(10))?;
    door.run.wait()?.expect_failure()?.expect_stderr(&[&door.part.name])?;
    clean_up(t)
}

/// The guest's kernel is up, and waits for a disk that never comes.
fn killed_during_boot(t: &mut Context, victim: usize) -> Result<()> {
    let door = boot_to_the_door(t, 0, "loglevel=7 rdinit=/nothing rootdelay=1000")?;
    let console = t.pod_dir("c")?.join("console.log");
    let written = Watcher::of_file(&console)?;
    std::fs::write(&door.go, "go\n")?;
    while !String::from_utf8_lossy(&std::fs::read(&console)?).contains("Waiting 1000 sec") {
        written.wait(Duration::from_secs(60))?;
    }
    let part = door.parts.get(victim).with_context(|| format!("there is no part {victim}"))?;
    kill(t, &part.program)?;
    door.run.wait()?.expect_failure()?.expect_stderr(&[&part.name])?;
    clean_up(t)
}

fn shim_killed_during_boot(t: &mut Context) -> Result<()> {
    let door = boot_to_the_door(t, 0, "")?;
    kill(t, SHIM)?;
    door.run.wait()?.expect_failure()?;
    clean_up(t)
}

fn containerd_killed_during_boot(t: &mut Context) -> Result<()> {
    let door = boot_to_the_door(t, 0, "")?;
    t.node().kill()?;
    door.run.wait()?.expect_failure()?;
    std::fs::write(&door.go, "go\n")?;
    t.node().launch()?;
    clean_up(t)
}

/// Whoever has the right to it ends its own processes by it, as the kernel has it for a namespace of pids.
fn reboot(t: &mut Context) -> Result<()> {
    for (command, signal) in [("reboot", 1), ("poweroff", 2)] {
        t.start_sleeper(&["--privileged"], "c")?;
        let mut events = t.events()?;
        // The kernel has the caller end well, or kills it with the rest.
        t.exec("c", "e", &[command, "-f"]).output()?;
        let status = events.wait_exit("c", 60)?;
        ensure!(status == 128 + signal, "the exit status is {status} after {command}");
        t.remove("c")?;
    }
    Ok(())
}

fn guest_panic(t: &mut Context) -> Result<()> {
    let mut events = t.events()?;
    // The guest has no sysrq; a kernel that is told to panic when memory runs out needs no more than that.
    let script =
        "echo 2 > /proc/sys/vm/panic_on_oom && echo up && dd if=/dev/zero of=/dev/null bs=100M count=1";
    let flags = ["--privileged", "--memory-limit", "67108864"];
    let output = t.run(&flags, "c", &["sh", "-c", script]).output()?.expect_code(255)?;
    ensure!(output.out() == "up", "{output}");
    ensure!(events.wait_exit("c", 30)? == 255, "{output}");
    let log = t.log();
    ensure!(
        log.lines().any(|l| l.contains("level=error") && l.contains("panic")),
        "no word of it in the log:\n{log}"
    );
    clean_up(t)
}
