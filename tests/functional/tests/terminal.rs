//! Containers and execs on a terminal.

use anyhow::{Result, ensure};
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::common("terminal::run_has_a_terminal", run_has_a_terminal),
    Test::common("terminal::run_resize", run_resize),
    Test::common("terminal::interrupt_key", interrupt_key),
    Test::common("terminal::exec_has_a_terminal", exec_has_a_terminal),
];

fn run_has_a_terminal(t: &mut Context) -> Result<()> {
    let script = "tty; test -t 0 && test -t 1 && test -t 2 && echo all three; ls -l /dev/console | cut -c1; \
        echo tty $(cut -d' ' -f7 /proc/self/stat); exit 12";
    let (pty, proc) = t.run_on_terminal(&["--rm"], "c", &["sh", "-c", script], (80, 24))?;
    let output = proc.wait()?.expect_code(12)?;
    let screen = pty.screen();
    ensure!(
        screen.contains("/dev/pts/") || screen.contains("/dev/console"),
        "the screen shows {screen:?}\n{output}"
    );
    ensure!(screen.contains("all three\n"), "the screen shows {screen:?}");
    ensure!(!screen.contains("tty 0\n"), "it is not the controlling terminal; the screen shows {screen:?}");
    Ok(())
}

fn run_resize(t: &mut Context) -> Result<()> {
    let (mut pty, proc) = t.run_on_terminal(&["--rm"], "c", &["sh"], (100, 30))?;
    // The first size reaches the container only after its start: ask until it is there.
    pty.type_keys("while [ \"$(stty size)\" != '30 100' ]; do :; done; echo first-$((1+1))\n")?;
    pty.wait_for("first-2", 60)?;
    pty.type_keys("while [ \"$(stty size)\" != '43 132' ]; do :; done; echo second-$((1+1))\n")?;
    pty.resize_until(132, 43, "second-2")?;
    pty.type_keys("exit 3\n")?;
    proc.wait()?.expect_code(3)?;
    Ok(())
}

fn interrupt_key(t: &mut Context) -> Result<()> {
    let script =
        "trap 'echo interrupted-$((1+1)); exit 5' INT; sleep 1000 & echo up-$((1+1)); while :; do wait; done";
    let (mut pty, proc) = t.run_on_terminal(&["--rm"], "c", &["sh", "-c", script], (80, 24))?;
    pty.wait_for("up-2", 60)?;
    pty.type_keys("\u{3}")?;
    pty.wait_for("interrupted-2", 60)?;
    proc.wait()?.expect_code(5)?;
    Ok(())
}

fn exec_has_a_terminal(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let (mut pty, proc) = t.ctr_on_terminal(&["task", "exec", "-t", "--exec-id", "e", "c", "sh"], 90, 20)?;
    pty.type_keys("while [ \"$(stty size)\" != '20 90' ]; do :; done; echo first-$((1+1))\n")?;
    pty.wait_for("first-2", 60)?;
    pty.type_keys("while [ \"$(stty size)\" != '10 70' ]; do :; done; echo second-$((1+1))\n")?;
    pty.resize_until(70, 10, "second-2")?;
    pty.type_keys("exit 8\n")?;
    proc.wait()?.expect_code(8)?;
    t.remove("c")
}
