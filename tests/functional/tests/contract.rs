//! What containerd itself does with a shim, as far as its user sees it. A test's name begins with the number of its
//! statement in docs/containerd-contract.md; the rest of them is the suite `contract`.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use harness::{Context, IMAGE, Output, Test, signal_process, wait_for_exit};
use rustix::process::Signal;

pub(crate) const TESTS: &[Test] = &[
    Test::common("contract::n2_an_absolute_path_is_a_runtime", n2_an_absolute_path_is_a_runtime),
    Test::common("contract::n2_a_relative_path_is_refused", n2_a_relative_path_is_refused),
    Test::common("contract::n3_a_name_is_looked_for_on_the_path", n3_a_name_is_looked_for_on_the_path),
    Test::common("contract::n3_and_beside_containerd", n3_and_beside_containerd),
    Test::bulkhead("contract::n5_labels_are_refused", "runc labels on the host", n5_labels_are_refused),
    Test::common("contract::s5_a_version_of_tomorrow_is_refused", s5_a_version_of_tomorrow_is_refused),
    Test::bulkhead(
        "contract::d3_what_delete_says_is_a_warning",
        "what is taken back, and by whom, is bulkhead's",
        |t| d3_what_delete_says_is_a_warning(t),
    ),
];

/// The shim's program.
fn program(t: &Context) -> Result<PathBuf> {
    let bulkhead = t.settings().is_bulkhead();
    t.settings().program(if bulkhead { "containerd-shim-bulkhead-v2" } else { "containerd-shim-runc-v2" })
}

/// `ctr run` of a command that says hi, with a runtime of the test's.
fn run_with(t: &Context, runtime: &str) -> Result<Output> {
    t.ctr().args(["run", "--rm", "--runtime", runtime, IMAGE, "c", "echo", "hi"]).output()
}

/// The same, which must work.
fn runs_with(t: &Context, runtime: &str) -> Result<()> {
    let output = run_with(t, runtime)?.ok()?;
    ensure!(output.out() == "hi", "{output}");
    Ok(())
}

fn n2_an_absolute_path_is_a_runtime(t: &mut Context) -> Result<()> {
    let path = program(t)?;
    runs_with(t, &path.display().to_string())
}

fn n2_a_relative_path_is_refused(t: &mut Context) -> Result<()> {
    let output = run_with(t, "bin/containerd-shim-mine-v2")?.expect_failure()?;
    output.expect_stderr(&["bin/containerd-shim-mine-v2", "full path to the binary"])?;
    Ok(())
}

/// What is installed is found without a restart; what was found stays where it was.
fn n3_a_name_is_looked_for_on_the_path(t: &mut Context) -> Result<()> {
    let runtime = "io.containerd.mine.v2";
    let output = run_with(t, runtime)?.expect_failure()?;
    output.expect_stderr(&[runtime, "containerd-shim-mine-v2"])?;
    let path = t.node().bin().join("containerd-shim-mine-v2");
    symlink(program(t)?, &path)?;
    let found = runs_with(t, runtime);
    std::fs::remove_file(&path)?;
    found?;
    let output = run_with(t, runtime)?.expect_failure()?;
    output.expect_stderr(&[&path.display().to_string()])?;
    Ok(())
}

/// containerd finds what lies in the folder of its own program, too.
fn n3_and_beside_containerd(t: &mut Context) -> Result<()> {
    let runtime = "io.containerd.neighbour.v2";
    run_with(t, runtime)?.expect_failure()?.expect_stderr(&["containerd-shim-neighbour-v2"])?;
    let dir = t.dir().join("beside");
    std::fs::create_dir(&dir)?;
    symlink(program(t)?, dir.join("containerd-shim-neighbour-v2"))?;
    t.node().restart_from(Some(&dir))?;
    let found = runs_with(t, runtime);
    t.node().restart_from(None)?;
    found
}

fn n5_labels_are_refused(t: &mut Context) -> Result<()> {
    let label = "system_u:system_r:container_kvm_t:s0";
    let run = t.run_spec("c", &["true"], |spec| spec["process"]["selinuxLabel"] = label.into())?;
    run.output()?.expect_failure()?.expect_stderr(&["process.selinuxLabel", label])?;
    let run = t.run_spec("c", &["true"], |spec| spec["linux"]["mountLabel"] = label.into())?;
    run.output()?.expect_failure()?.expect_stderr(&["linux.mountLabel"])?;
    Ok(())
}

/// A shim that says no more than a version, and serves nobody.
fn shim_of_version(t: &Context, version: u32) -> Result<String> {
    let answer = format!(r#"{{"version":{version},"address":"unix:///nowhere","protocol":"ttrpc"}}"#);
    let script = format!("#!/bin/sh\nfor last; do :; done\n[ \"$last\" != start ] || printf %s '{answer}'\n");
    let path = t.write(&format!("version-{version}"), script)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path.display().to_string())
}

fn s5_a_version_of_tomorrow_is_refused(t: &mut Context) -> Result<()> {
    let refused: &[u32] = if t.settings().is_containerd_1() { &[3, 4] } else { &[4] };
    for version in refused {
        let output = run_with(t, &shim_of_version(t, *version)?)?.expect_failure()?;
        output.expect_stderr(&["unsupported shim version", &version.to_string()])?;
    }
    Ok(())
}

/// What `delete` cannot take back: here what a hook has made, whose undoing fails.
fn d3_what_delete_says_is_a_warning(t: &mut Context) -> Result<()> {
    let mut events = t.events()?;
    let run = t.run_spec("c", &["sh", "-c", "echo up; sleep 1000"], |spec| {
        let script = "echo the berth is still taken >&2; exit 3";
        let hook = serde_json::json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
        spec["hooks"] = serde_json::json!({ "poststop": hook });
    })?;
    let run = run.spawn()?;
    run.wait_for_text("up")?;
    let shim = t.process("containerd-shim")?;
    let ended = signal_process(shim.pid, Signal::KILL, |pid| t.processes().iter().any(|p| p.pid == pid))?;
    wait_for_exit(&ended, Duration::from_secs(10))?;
    run.wait()?.expect_failure()?;
    events.wait_exit("c", 60)?;
    t.log_says(&["level=warn", "poststop hook /bin/sh", "the berth is still taken"])
}
