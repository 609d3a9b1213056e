//! `bulkhead exec`: programs in the guest itself.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Proc, Pty, Run, Test, Toml, signal_process};
use rustix::process::Signal;

pub(crate) const TESTS: &[Test] = &[
    Test::bulkhead("exec::off_unless_configured", OURS, off_unless_configured),
    Test::bulkhead("exec::by_annotation_where_allowed", OURS, by_annotation_where_allowed),
    Test::bulkhead("exec::sees_the_guest", OURS, sees_the_guest),
    Test::bulkhead("exec::status_and_streams", OURS, status_and_streams),
    Test::bulkhead("exec::input_and_its_end", OURS, input_and_its_end),
    Test::bulkhead("exec::terminal", OURS, terminal),
    Test::bulkhead("exec::chooses_the_root", OURS, chooses_the_root),
    Test::bulkhead("exec::users_of_its_own", OURS, users_of_its_own),
    Test::bulkhead("exec::leaves_nothing_running", OURS, leaves_nothing_running),
    Test::bulkhead("exec::ends_with_its_container", OURS, ends_with_its_container),
    Test::bulkhead("exec::a_stopped_machine", OURS, a_stopped_machine),
    Test::bulkhead("exec::a_machine_that_dies", OURS, a_machine_that_dies),
];

const OURS: &str = "runc has no guest";

/// A pod into whose guest one may look.
fn open_pod(t: &mut Context, flags: &[&str]) -> Result<()> {
    t.set_config("agent", "debug_exec", true.into())?;
    t.start_sleeper(flags, "c")
}

/// `bulkhead exec c -- sh -c SCRIPT`, which must succeed; its standard output.
fn sh(t: &Context, script: &str) -> Result<String> {
    Ok(t.bulkhead(&["exec", "c", "--", "sh", "-c", script])?.output()?.ok()?.out())
}

fn off_unless_configured(t: &mut Context) -> Result<()> {
    let output = t.bulkhead(&["exec", "c", "--", "true"])?.output()?.expect_code(125)?;
    output.expect_stderr(&["bulkhead: there is no pod `c`"])?;
    t.start_sleeper(&[], "c")?;
    let output = t.bulkhead(&["exec", "c", "--", "true"])?.output()?.expect_code(125)?;
    ensure!(
        output.err()
            == format!(
                "bulkhead: no program may be run in the guest of pod `{}/c`: set `debug_exec = true` in the section \
                 [agent] of bulkhead's configuration and make the pod anew",
                t.node().namespace()
            ),
        "{output}"
    );
    // Nobody listens, so nothing can be asked of it.
    let socket = t.pod_dir("c")?.join("exec.sock");
    ensure!(!socket.exists(), "{} is there", socket.display());
    // A pod has what held when it was made.
    t.set_config("agent", "debug_exec", true.into())?;
    t.bulkhead(&["exec", "c", "--", "true"])?.output()?.expect_code(125)?;
    t.remove("c")
}

fn by_annotation_where_allowed(t: &mut Context) -> Result<()> {
    let wish = ["--annotation", "io.bulkhead.agent.debug_exec=true"];
    let output = t.run(&[&["--rm"], &wish[..]].concat(), "c", &["true"]).output()?.expect_failure()?;
    output
        .expect_stderr(&["annotation `io.bulkhead.agent.debug_exec`: the administrator does not allow it"])?;
    t.set_config("annotations", "allowed", Toml::Array(vec!["agent.debug_exec".into()]))?;
    t.start_sleeper(&[], "plain")?;
    t.bulkhead(&["exec", "plain", "--", "true"])?.output()?.expect_code(125)?;
    t.remove("plain")?;
    t.start_sleeper(&wish, "c")?;
    t.bulkhead(&["exec", "c", "--", "true"])?.output()?.ok()?;
    t.remove("c")
}

fn sees_the_guest(t: &mut Context) -> Result<()> {
    open_pod(t, &[])?;
    let dir = t.pod_dir("c")?;
    let mode = std::fs::metadata(dir.join("exec.sock"))?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "the socket has mode {mode:o}");
    let ledger = std::fs::read_to_string(dir.join("ledger"))?;
    ensure!(ledger.contains("exec.sock"), "the socket is not in the ledger:\n{ledger}");

    let ps = sh(t, "ps -o pid,comm,args")?;
    ensure!(ps.lines().any(|line| line.split_whitespace().take(2).eq(["1", "init"])), "{ps}");
    ensure!(ps.contains("bulkhead-zygote") && ps.contains("sleep 1000"), "{ps}");
    // Every namespace but that of mounts is the agent's, and that one shows what the agent has.
    let same = sh(
        t,
        "for n in pid net ipc uts user cgroup; do [ $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) ] && echo $n; done",
    )?;
    ensure!(same.lines().eq(["pid", "net", "ipc", "uts", "user", "cgroup"]), "{same}");
    let mounts = sh(t, "cat /proc/1/mountinfo")?;
    ensure!(mounts.contains(" /run/bulkhead/share ") && mounts.contains(" - virtiofs share "), "{mounts}");
    let log = sh(t, "dmesg | head -n 3; ls -d /sys/fs/cgroup/bulkhead/c; ls -d /proc/1/root/init")?;
    ensure!(
        log.contains("Linux version") && log.contains("/sys/fs/cgroup/bulkhead/c\n/proc/1/root/init"),
        "{log}"
    );
    let caps = sh(t, "grep CapEff /proc/self/status; grep CapEff /proc/1/status")?;
    let caps: Vec<&str> = caps.lines().collect();
    ensure!(caps.len() == 2 && caps[0] == caps[1], "{caps:?}");
    // The pod's network is by its name, and the container's own files by its process.
    let pod = sh(t, "nsenter --net=/run/bulkhead/ns/net ip -o link; ls -l /proc/self/ns/net")?;
    ensure!(pod.contains(" lo:"), "{pod}");
    t.exec_ok("c", "echo mine >/root/note")?;
    let note = sh(t, "cat /proc/$(head -n 1 /sys/fs/cgroup/bulkhead/c/cgroup.procs)/root/root/note")?;
    ensure!(note == "mine", "{note}");
    // What is used of the container cannot be damaged, and its image shows nothing of the guest's folders.
    let output = t.bulkhead(&["exec", "c", "--", "touch", "/bin/x"])?.output()?.expect_code(1)?;
    output.expect_stderr(&["Read-only file system"])?;
    t.log_says(&["a program in the guest itself", "exec=1"])?;
    t.remove("c")
}

fn status_and_streams(t: &mut Context) -> Result<()> {
    open_pod(t, &[])?;
    let script = "echo out; echo err >&2; exit 42";
    let output = t.bulkhead(&["exec", "c", "--", "sh", "-c", script])?.output()?.expect_code(42)?;
    ensure!((output.out().as_str(), output.err().as_str()) == ("out", "err"), "{output}");
    t.bulkhead(&["exec", "c", "--", "sh", "-c", "kill -9 $$"])?.output()?.expect_code(137)?;
    t.bulkhead(&["exec", "c", "--", "sh", "-c", "kill -15 $$"])?.output()?.expect_code(143)?;
    // Without -i there is no input, whoever types.
    let output = t.bulkhead(&["exec", "c", "--", "cat"])?.stdin_bytes("lost").output()?.ok()?;
    ensure!(output.out().is_empty(), "{output}");
    let output = t.bulkhead(&["exec", "c", "--", "nope"])?.output()?.expect_code(125)?;
    output.expect_stderr(&["bulkhead: exec: \"nope\": executable file not found in $PATH"])?;
    // All of a large output comes, though its program is gone by then.
    let output = t.bulkhead(&["exec", "c", "--", "head", "-c", "3000000", "/dev/zero"])?.output()?.ok()?;
    ensure!(output.stdout.len() == 3_000_000, "{} bytes came", output.stdout.len());
    // Who takes no more of it ends it, as on the host.
    let pipe = Run::new("bash").args(["-c", "set -o pipefail; \"$0\" exec c -- yes | head -n 1"]);
    let pipe = pipe.arg(t.settings().program("bulkhead")?).env("BULKHEAD_CONFIG", t.node().bulkhead_config());
    ensure!(pipe.output()?.expect_code(141)?.out() == "y");
    // A guest is looked at while its containers stand still.
    t.ctr_ok(&["task", "pause", "c"])?;
    let state = sh(t, "cat /sys/fs/cgroup/bulkhead/c/cgroup.freeze")?;
    ensure!(state == "1", "{state}");
    t.ctr_ok(&["task", "resume", "c"])?;
    t.remove("c")
}

fn input_and_its_end(t: &mut Context) -> Result<()> {
    open_pod(t, &[])?;
    let bytes: Vec<u8> = (0..700_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let output = t.bulkhead(&["exec", "-i", "c", "--", "cat"])?.stdin_bytes(bytes.clone()).output()?.ok()?;
    ensure!(output.stdout == bytes, "{} bytes came back", output.stdout.len());
    // The end of the input is not the end of the output.
    let script = "read line; echo got $line; cat >/dev/null; echo end; exit 3";
    let mut proc = t.bulkhead(&["exec", "-i", "c", "--", "sh", "-c", script])?.stdin_open().spawn()?;
    proc.write_stdin(b"one\n")?;
    proc.wait_for_text("got one")?;
    proc.close_stdin();
    proc.wait_for_text("end")?;
    proc.wait()?.expect_code(3)?;
    // A program need not read what there is.
    let mut proc = t.bulkhead(&["exec", "-i", "c", "--", "true"])?.stdin_open().spawn()?;
    proc.write_stdin(b"unread\n")?;
    proc.wait()?.ok()?;
    t.remove("c")
}

fn terminal(t: &mut Context) -> Result<()> {
    open_pod(t, &[])?;
    let (mut pty, proc) = on_terminal(t, &["exec", "c", "-it"])?;
    pty.type_keys("stty size; echo first-$((1+1)); tty\n")?;
    pty.wait_for("20 90\nfirst-2\n/dev/pts/", 60)?;
    pty.type_keys("while [ \"$(stty size)\" != '10 70' ]; do :; done; echo second-$((1+1))\n")?;
    pty.resize(70, 10)?;
    pty.wait_for("second-2", 60)?;
    pty.type_keys("exit 8\n")?;
    proc.wait()?.expect_code(8)?;
    // A key that interrupts is the program's, not the command's.
    let script =
        "trap 'echo interrupted-$((1+1)); exit 5' INT; sleep 1000 & echo up-$((1+1)); while :; do wait; done";
    let (mut pty, proc) = on_terminal(t, &["exec", "c", "-it", "--", "sh", "-c", script])?;
    pty.wait_for("up-2", 60)?;
    pty.type_keys("\u{3}")?;
    pty.wait_for("interrupted-2", 60)?;
    proc.wait()?.expect_code(5)?;
    t.remove("c")
}

/// Starts `bulkhead ARGS` on a terminal of 90 columns and 20 rows.
fn on_terminal(t: &mut Context, args: &[&str]) -> Result<(Pty, Proc)> {
    let (program, config) = (t.settings().program("bulkhead")?, t.node().bulkhead_config());
    Pty::spawn(|setsid| setsid.arg(program).arg("--config").arg(config).args(args), 90, 20)
}

fn chooses_the_root(t: &mut Context) -> Result<()> {
    open_pod(t, &[])?;
    let output = t.bulkhead(&["exec", "c", "--root", "x", "--", "true"])?.output()?.expect_code(125)?;
    output.expect_stderr(&["the pod has no container \"x\" whose programs could be used: there are c"])?;
    t.bulkhead(&["exec", "c", "--root", "c", "--", "true"])?.output()?.ok()?;
    t.remove("c")
}

fn users_of_its_own(t: &mut Context) -> Result<()> {
    open_pod(t, &["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"])?;
    // The container's root is somebody; the guest's is root, whoever owns the files that it uses.
    let ids = sh(
        t,
        "id -u; cut -c 1-40 /proc/self/uid_map; stat -c %u /proc/$(head -n 1 /sys/fs/cgroup/bulkhead/c/cgroup.procs)",
    )?;
    let ids: Vec<&str> = ids.split_whitespace().collect();
    ensure!(ids == ["0", "0", "0", "4294967295", "100000"], "{ids:?}");
    t.remove("c")
}

/// How many processes of the guest have this argument.
fn count(t: &Context, argument: &str) -> Result<usize> {
    let out = sh(t, "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'")?;
    Ok(out.lines().filter(|line| *line == argument).count())
}

fn leaves_nothing_running(t: &mut Context) -> Result<()> {
    open_pod(t, &[])?;
    // What a program has started goes with it.
    sh(t, "sleep 2345 & exit 0")?;
    ensure!(count(t, "2345")? == 0);
    // And all of it goes with whoever has asked for it.
    for (signal, exec) in [(Signal::TERM, "exec=3"), (Signal::KILL, "exec=6")] {
        let args = ["exec", "c", "--", "sh", "-c", "sleep 3456 & echo ready; wait"];
        let proc = t.bulkhead(&args)?.spawn()?;
        proc.wait_for_text("ready")?;
        ensure!(count(t, "3456")? == 1);
        proc.signal(signal)?;
        let output = proc.wait()?;
        if signal == Signal::TERM {
            output.expect_code(143)?;
        }
        t.log_says(&["whoever ran it has gone: it is killed", exec])?;
        ensure!(count(t, "3456")? == 0, "it runs on after {signal:?}");
    }
    let cgroups = sh(t, "ls -d /sys/fs/cgroup/debug/*/ | wc -l")?;
    ensure!(cgroups == "1", "cgroups of programs that have ended: {cgroups}");
    t.remove("c")
}

fn ends_with_its_container(t: &mut Context) -> Result<()> {
    open_pod(t, &[])?;
    let proc = t.bulkhead(&["exec", "c", "--", "sh", "-c", "echo ready; sleep 1000"])?.spawn()?;
    proc.wait_for_text("ready")?;
    t.remove("c")?;
    let output = proc.wait()?.expect_failure()?;
    ensure!(output.took < Duration::from_secs(60), "{output}");
    Ok(())
}

fn a_stopped_machine(t: &mut Context) -> Result<()> {
    t.set_config("agent", "request_timeout_seconds", 3.into())?;
    open_pod(t, &[])?;
    let vmm = t.parts()?.first().cloned().context("no VMM")?;
    let signal = |t: &Context, signal| {
        signal_process(vmm.pid, signal, |pid| t.processes().iter().any(|p| p.pid == pid)).map(drop)
    };
    signal(t, Signal::STOP)?;
    let output = t.bulkhead(&["exec", "c", "--", "sleep", "4567"])?.output();
    signal(t, Signal::CONT)?;
    output?.expect_code(125)?.expect_stderr(&["the guest did not answer"])?;
    // What came too late was killed, and the next one is not held up.
    let ps = sh(t, "ps -o args")?;
    ensure!(!ps.contains("sleep 4567"), "{ps}");
    t.remove("c")
}

fn a_machine_that_dies(t: &mut Context) -> Result<()> {
    open_pod(t, &[])?;
    let proc = t.bulkhead(&["exec", "c", "--", "sh", "-c", "echo ready; sleep 1000"])?.spawn()?;
    proc.wait_for_text("ready")?;
    let vmm = t.parts()?.first().cloned().context("no VMM")?;
    signal_process(vmm.pid, Signal::KILL, |pid| t.processes().iter().any(|p| p.pid == pid))?;
    let output = proc.wait()?.expect_code(125)?;
    output.expect_stderr(&["the machine ended while the program ran"])?;
    t.remove("c")
}
