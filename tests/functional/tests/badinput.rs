//! Wrong input: the user reads in ctr's own output what is wrong, and nothing is left.

use anyhow::Result;
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::common("badinput::command_not_in_the_image", command_not_in_the_image),
    Test::common("badinput::command_not_in_the_image_exec", command_not_in_the_image_exec),
    Test::common("badinput::command_is_not_a_program", command_is_not_a_program),
    Test::common("badinput::user_does_not_exist", user_does_not_exist),
    Test::common("badinput::mount_source_does_not_exist", mount_source_does_not_exist),
    Test::common("badinput::device_does_not_exist", device_does_not_exist),
    Test::common("badinput::exec_in_a_stopped_container", exec_in_a_stopped_container),
];

fn command_not_in_the_image(t: &mut Context) -> Result<()> {
    let output = t.run_rm(&[], &["nope"])?.expect_failure()?;
    output.expect_stderr(&["exec: \"nope\": executable file not found in $PATH"])?;
    let output = t.run_rm(&[], &["/bin/nope"])?.expect_failure()?;
    output.expect_stderr(&["exec: \"/bin/nope\": stat /bin/nope: no such file or directory"])?;
    Ok(())
}

fn command_not_in_the_image_exec(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let output = t.exec("c", "e", &["nope"]).output()?.expect_failure()?;
    output.expect_stderr(&["exec: \"nope\": executable file not found in $PATH"])?;
    t.remove("c")
}

fn command_is_not_a_program(t: &mut Context) -> Result<()> {
    t.run_rm(&[], &["/etc/not-a-program"])?
        .expect_failure()?
        .expect_stderr(&["/etc/not-a-program", "permission denied"])?;
    Ok(())
}

/// ctr itself forgets the snapshot when it cannot make the specification.
fn remove_snapshot(t: &Context) -> Result<()> {
    t.ctr_ok(&["snapshot", "rm", "c"])?;
    Ok(())
}

fn user_does_not_exist(t: &mut Context) -> Result<()> {
    t.run_rm(&["--user", "mallory"], &["true"])?.expect_failure()?.expect_stderr(&["no users found"])?;
    remove_snapshot(t)
}

fn mount_source_does_not_exist(t: &mut Context) -> Result<()> {
    let output =
        t.run_rm(&["--mount", "type=bind,src=/no/such/place,dst=/mnt,options=rbind:ro"], &["true"])?;
    output.expect_failure()?.expect_stderr(&["/no/such/place", "no such file or directory"])?;
    Ok(())
}

fn device_does_not_exist(t: &mut Context) -> Result<()> {
    let output = t.run_rm(&["--device", "/dev/no-such-device"], &["true"])?.expect_failure()?;
    output.expect_stderr(&["/dev/no-such-device", "no such file or directory"])?;
    remove_snapshot(t)
}

fn exec_in_a_stopped_container(t: &mut Context) -> Result<()> {
    let mut events = t.events()?;
    t.start_detached(&[], "c", &["true"])?;
    events.wait_exit("c", 30)?;
    t.exec("c", "e", &["true"]).output()?.expect_failure()?;
    t.remove("c")
}
