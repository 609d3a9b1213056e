//! Statements L: the shim's log.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Result, bail, ensure};
use harness::{Context, Run, Test};
use rustix::fs::OFlags;

use crate::fake::Fake;
use crate::task::{member, sleeper};

pub(crate) const TESTS: &[Test] = &[
    Test::common("l1_the_log_fifo_gets_lines", l1_the_log_fifo_gets_lines),
    Test::common("l2_a_full_log_does_not_block", l2_a_full_log_does_not_block),
    Test::common("l2_a_log_without_a_reader_does_not_block", l2_a_log_without_a_reader_does_not_block),
    Test::common("l3_the_log_of_a_further_container_stays_empty", |t| {
        l3_the_log_of_a_further_container_stays_empty(t)
    }),
];

/// Makes the fifo and opens it as containerd does.
pub(crate) fn log_fifo(bundle: &std::path::Path) -> Result<File> {
    let path = bundle.join("log");
    Run::new("mkfifo").args(["-m", "700"]).arg(&path).output()?.ok()?;
    Ok(File::options().read(true).write(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?)
}

fn l1_the_log_fifo_gets_lines(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &sleeper(t, "c")?)?;
    let mut log = log_fifo(&bundle)?;
    let shim = fake.shim("c", &bundle)?;
    shim.create("c", &bundle)?;
    shim.start("c", "")?;
    shim.end("c")?;
    let mut text = vec![0; 1 << 16];
    let n = log.read(&mut text)?;
    let text = String::from_utf8_lossy(&text[..n]).into_owned();
    ensure!(text.lines().count() >= 1 && text.ends_with('\n'), "the log holds {text:?}");
    Ok(())
}

fn l2_a_full_log_does_not_block(t: &mut Context) -> Result<()> {
    t.set_config("", "log_level", "trace".into())?;
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &sleeper(t, "c")?)?;
    let mut log = log_fifo(&bundle)?;
    // Fill the pipe to the brim; nobody reads.
    while std::io::Write::write(&mut log, &[b'x'; 4096]).is_ok() {}
    let shim = fake.shim("c", &bundle)?;
    shim.create("c", &bundle)?;
    shim.start("c", "")?;
    shim.end("c")
}

fn l2_a_log_without_a_reader_does_not_block(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &sleeper(t, "c")?)?;
    let log = log_fifo(&bundle)?;
    let shim = fake.shim("c", &bundle)?;
    // containerd goes away.
    drop(log);
    shim.create("c", &bundle)?;
    shim.start("c", "")?;
    // ... and comes back.
    let mut log = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(bundle.join("log"))?;
    shim.end("c")?;
    let mut text = vec![0; 1 << 16];
    let n = log.read(&mut text).unwrap_or(0);
    ensure!(n > 0, "nothing is logged after the reader's return");
    Ok(())
}

/// Its lines are the pod's, and in the pod's log.
fn l3_the_log_of_a_further_container_stays_empty(t: &mut Context) -> Result<()> {
    t.set_config("", "log_level", "trace".into())?;
    let fake = Fake::start(t)?;
    let pod = fake.bundle("pod", &member(t, "pod")?)?;
    let container = fake.bundle("c1", &member(t, "c1")?)?;
    let (mut of_pod, mut of_container) = (log_fifo(&pod)?, log_fifo(&container)?);
    let shim = fake.shim("pod", &pod)?;
    for (id, bundle) in [("pod", &pod), ("c1", &container)] {
        shim.create(id, bundle)?;
        shim.start(id, "")?;
    }
    shim.end("c1")?;
    shim.end("pod")?;
    ensure!(of_pod.read(&mut [0])? == 1, "the pod's log is empty");
    match of_container.read(&mut [0]) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
        read => bail!("somebody has written into the container's log, or it cannot be read: {read:?}"),
    }
}
