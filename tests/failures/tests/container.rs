//! A container's life through `ctr`, whatever happens on the way; then it is removed by force.

use anyhow::{Result, ensure};
use harness::{Context, Exit};

use crate::{COMMAND, PATIENCE, READY, STATUS, Told, case, directory};

pub(crate) fn life(t: &mut Context<'_>) -> Result<()> {
    let (place, action) = case(t)?;
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:rw", directory(t)?);
    let mut told = Told::default();
    t.arm(place, action)?;
    let run = t.run(&["--mount", &mount], "c", &["sh", "-c", COMMAND]).deadline(2 * PATIENCE).spawn()?;
    let up = run.saw(READY, std::time::Duration::from_secs(PATIENCE));
    if up {
        let exec = t.exec("c", "e", &["echo", "seen"]).deadline(PATIENCE).output()?;
        if let Some(said) = told.answer(exec) {
            ensure!(said == "seen", "an exec succeeded and said {said:?}");
        }
        let kill = t.ctr().args(["task", "kill", "c"]).deadline(PATIENCE).output()?;
        if told.answer(kill).is_none() {
            // It has ended, or must be ended by force: either way the client learns of it.
            t.ctr().args(["task", "kill", "--signal", "KILL", "c"]).deadline(PATIENCE).output()?;
        }
    }
    let run = run.wait()?;
    match run.exit {
        Exit::Code(0) => anyhow::bail!("a success that is none:\n{run}"),
        Exit::Code(STATUS) => ensure!(up, "it ended well without having run:\n{run}"),
        _ => drop(told.answer(run)),
    }
    t.reached(place)?;
    if action == "error" {
        told.names(place)?;
    }
    for remove in [["task", "delete", "--force", "c"].as_slice(), &["container", "delete", "c"]] {
        let output = t.ctr().args(remove).deadline(PATIENCE).output()?;
        if output.exit != Exit::Code(0) {
            output.expect_stderr(&["not found"])?;
        }
    }
    Ok(())
}
