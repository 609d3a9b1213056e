//! Further processes in a container, by crictl.

use anyhow::{Result, ensure};
use harness::{Context, Test};

use crate::SLEEPER;

pub(crate) const TESTS: &[Test] = &[
    Test::common("exec::the_output_and_the_exit_status_come_back", sync),
    Test::common("exec::input_reaches_it_and_its_end_too", stdin),
    Test::common("exec::a_terminal_is_typed_on_and_resized", terminal),
    Test::common("exec::a_missing_program_is_named", missing),
    Test::common("exec::one_that_is_late_is_ended", late),
    Test::bulkhead("exec::in_the_guest", "runc has no guest", in_the_guest),
];

fn sync(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    let exec = t.crictl()?.args(["exec", "-s", &a, "sh", "-c", "echo out; echo err >&2; exit 7"]).output()?;
    exec.expect_failure()?.expect_stderr(&["exited with 7: err"])?;
    ensure!(t.crictl_ok(&["exec", "-s", &a, "echo", "fine"])? == "fine");
    t.remove_pod(&pod)
}

fn stdin(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    let cat = t.crictl()?.args(["exec", "-i", &a, "cat"]).stdin_bytes("one\ntwo\n").output()?.ok()?;
    ensure!(cat.out() == "one\ntwo", "{cat}");
    t.remove_pod(&pod)
}

fn terminal(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    let (mut screen, shell) = t.crictl_on_terminal(&["exec", "-it", &a, "sh"], 90, 20)?;
    screen.type_keys("while [ \"$(stty size)\" != '20 90' ]; do :; done; echo first-$((1+1))\n")?;
    screen.wait_for("first-2", 60)?;
    screen.type_keys("while [ \"$(stty size)\" != '10 70' ]; do :; done; echo second-$((1+1))\n")?;
    screen.resize_until(70, 10, "second-2")?;
    screen.type_keys("exit 3\n")?;
    shell.wait()?.expect_failure()?.expect_stderr(&["exit code 3"])?;
    t.remove_pod(&pod)
}

fn missing(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    let exec = t.crictl()?.args(["exec", "-s", &a, "nosuch"]).output()?.expect_failure()?;
    exec.expect_stderr(&["nosuch", "executable file not found in $PATH"])?;
    t.remove_pod(&pod)
}

fn late(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    t.crictl()?.args(["exec", "-s", "--timeout", "1", &a, "sleep", "987"]).output()?.expect_failure()?;
    let seen = t.exec_in(&a, "ps -o args")?;
    ensure!(!seen.contains("sleep 987"), "{seen}");
    t.remove_pod(&pod)
}

/// `bulkhead exec POD …`: in the guest itself, with the programs of one of the pod's containers.
fn in_the_guest(t: &mut Context<'_>) -> Result<()> {
    t.set_config("agent", "debug_exec", true.into())?;
    let pod = t.pod("p", |_| {})?;
    let exec = |t: &Context<'_>, args: &[&str]| t.bulkhead(&[&["exec", &pod.id[..12]], args].concat());
    let none = exec(t, &["--", "true"])?.output()?.expect_code(125)?;
    none.expect_stderr(&["the pod has no container, and the guest has no programs of its own"])?;
    let (a, b) = (t.run_in(&pod, "a", SLEEPER)?, t.run_in(&pod, "b", SLEEPER)?);
    let which = exec(t, &["--", "true"])?.output()?.expect_code(125)?;
    which.expect_stderr(&["say which container's programs are to be used, with --root", &a, &b])?;
    let of_both = "ls -d /sys/fs/cgroup/bulkhead/*/ | wc -l";
    let both = exec(t, &["--root", &b[..12], "--", "sh", "-c", of_both])?.output()?.ok()?.out();
    ensure!(both.trim() == "2", "{both}");
    // What uses the files of a container ends with it, and nothing else does.
    let wait = ["--", "sh", "-c", "echo ready; sleep 1000"];
    let with_a = exec(t, &[&["--root", &a], &wait[..]].concat())?.spawn()?;
    with_a.wait_for_text("ready")?;
    let mut with_b =
        exec(t, &["-i", "--root", &b, "--", "sh", "-c", "echo ready; cat"])?.stdin_open().spawn()?;
    with_b.wait_for_text("ready")?;
    t.crictl_ok(&["rm", "--force", &a])?;
    with_a.wait()?.expect_code(137)?;
    with_b.write_stdin(b"still here\n")?;
    with_b.wait_for_text("still here")?;
    with_b.close_stdin();
    with_b.wait()?.ok()?;
    t.remove_pod(&pod)
}
