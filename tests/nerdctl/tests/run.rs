//! `nerdctl run`: what the command sees, what of it is seen outside, and which limits hold.

use std::fs;

use anyhow::{Result, ensure};
use harness::{Context, Test};

use crate::SLEEPER;

pub(crate) const TESTS: &[Test] = &[
    Test::common("run::output_input_and_status", output_input_and_status),
    Test::common("run::a_terminal", terminal),
    Test::common("run::what_the_flags_say", what_the_flags_say),
    Test::common("run::limits_and_powers", limits_and_powers),
    Test::common("run::a_command_that_is_not_there", not_there),
    Test::common("run::users_of_its_own", users),
];

fn output_input_and_status(t: &mut Context<'_>) -> Result<()> {
    let run = t.nerdctl_run(&["--rm"], &["sh", "-c", "echo out; echo err >&2; exit 7"])?.output()?;
    ensure!(run.out() == "out" && run.err().contains("err"), "{run}");
    run.expect_code(7)?;
    let cat = t.nerdctl_run(&["--rm", "-i"], &["cat"])?.stdin_bytes("one\ntwo\n").output()?.ok()?;
    ensure!(cat.out() == "one\ntwo", "{cat}");
    ensure!(t.nerdctl_ok(&["ps", "-aq"])?.is_empty(), "--rm left a container");
    Ok(())
}

fn terminal(t: &mut Context<'_>) -> Result<()> {
    let (mut screen, run) = t.nerdctl_on_terminal(&["--rm"], &["sh"])?;
    screen.type_keys("while [ \"$(stty size)\" != '20 90' ]; do :; done; echo first-$((1+1))\n")?;
    screen.wait_for("first-2", 60)?;
    screen.type_keys("while [ \"$(stty size)\" != '10 70' ]; do :; done; echo second-$((1+1))\n")?;
    screen.resize_until(70, 10, "second-2")?;
    screen.type_keys("exit 3\n")?;
    run.wait()?.expect_code(3)?;
    Ok(())
}

fn what_the_flags_say(t: &mut Context<'_>) -> Result<()> {
    let flags =
        ["--rm", "-e", "WORD=hello", "--hostname", "lighthouse", "--user", "alice", "--workdir", "/tmp"];
    let script = "echo $WORD; hostname; id -un; id -G; pwd; cat /etc/hostname";
    let seen = t.nerdctl_run(&flags, &["sh", "-c", script])?.output()?.ok()?.out();
    let wanted = "hello\nlighthouse\nalice\n1000 2000 2001\n/tmp\nlighthouse";
    ensure!(seen == wanted, "{seen}");
    Ok(())
}

/// Each where the container sees it, so that the host's kind of cgroup does not matter.
fn limits_and_powers(t: &mut Context<'_>) -> Result<()> {
    let flags = [
        "--memory=64m",
        "--cpus=0.5",
        "--pids-limit=20",
        "--shm-size=8m",
        "--tmpfs=/scratch:size=1m,mode=1777",
        "--cap-drop=ALL",
        "--cap-add=NET_ADMIN",
        "--security-opt=no-new-privileges",
        "--device=/dev/null:/dev/hole:rw",
        "--read-only",
    ];
    t.nerdctl_start("box", &flags, SLEEPER)?;
    let sees = |script: &str| t.nerdctl_exec("box", script);
    let shm = sees("df -k /dev/shm | awk 'END { print $2 }'")?;
    ensure!(shm == "8192", "/dev/shm has {shm} KiB");
    let scratch = sees("dd if=/dev/zero of=/scratch/f bs=1k count=2048 2>/dev/null; wc -c </scratch/f")?;
    ensure!(scratch == "1048576", "{scratch} bytes went into 1 MiB");
    // Bit 12 is CAP_NET_ADMIN (linux/capability.h).
    let status = sees("grep -E '^(CapBnd|NoNewPrivs)' /proc/self/status | tr -d '\\t'")?;
    ensure!(status.contains("CapBnd:0000000000001000") && status.contains("NoNewPrivs:1"), "{status}");
    ensure!(sees("echo gone >/dev/hole; wc -c </dev/hole")? == "0");
    ensure!(sees("touch /file").is_err(), "the root is read-only");
    let many = t.nerdctl()?.args(["exec", "box", "sh", "-c", "for n in $(seq 40); do sleep 1 & done; wait"]);
    many.output()?.expect_stderr(&["can't fork"])?;
    let usage = t.nerdctl_ok(&["stats", "--no-stream", "--format", "{{.MemUsage}}", "box"])?;
    ensure!(usage.ends_with("/ 64MiB"), "{usage}");
    t.nerdctl_ok(&["rm", "-f", "box"])?;
    let killed = t.nerdctl_run(
        &["--rm", "--memory=32m"],
        &["sh", "-c", "tail -c 100m /dev/zero | sleep 5; echo ${PIPESTATUS:-x}"],
    )?;
    let killed = killed.output()?;
    ensure!(killed.err().contains("Killed") || killed.exit == harness::Exit::Code(137), "{killed}");
    Ok(())
}

fn not_there(t: &mut Context<'_>) -> Result<()> {
    let run = t.nerdctl_run(&["--rm"], &["nosuch"])?.output()?.expect_failure()?;
    run.expect_stderr(&["nosuch", "executable file not found in $PATH"])?;
    let run =
        t.nerdctl()?.args(["run", "--rm", "--pull", "never", "bulkhead.test/nosuch:1", "true"]).output()?;
    run.expect_failure()?.expect_stderr(&["nosuch"])?;
    Ok(())
}

/// The one who is root in the container is another outside, also for the files that it makes and those of the image.
fn users(t: &mut Context<'_>) -> Result<()> {
    let etc = t.dir().join("etc");
    fs::create_dir(&etc)?;
    for file in ["subuid", "subgid"] {
        fs::write(etc.join(file), "games:100000:65536\n")?;
    }
    let script =
        "id -u; touch /made; stat -c %u /made /bin/busybox; cat /proc/self/uid_map /proc/self/gid_map";
    let flags = ["--rm", "--network=none"];
    let run = t.nerdctl_run_with_etc(&etc, &["--userns-remap=games"], &flags, &["sh", "-c", script])?;
    let seen = run.output()?.ok()?.out();
    let words: Vec<_> = seen.split_whitespace().collect();
    ensure!(words == ["0", "0", "0", "0", "100000", "65536", "0", "100000", "65536"], "{seen}");
    let run = t.nerdctl_run(&["--rm", "--userns=host"], &["cat", "/proc/self/uid_map"])?;
    let seen = run.output()?.ok()?.out();
    ensure!(seen.split_whitespace().eq(["0", "0", "4294967295"]), "{seen}");
    Ok(())
}
