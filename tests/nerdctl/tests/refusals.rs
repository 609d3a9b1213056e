//! What a machine of its own cannot give: refused by name, and nothing left.

use anyhow::{Result, ensure};
use harness::{Context, Test};

use crate::SLEEPER;

const WHY: &str = "runc shares the host's kernel";

pub(crate) const TESTS: &[Test] = &[
    Test::bulkhead("refusals::what_is_the_hosts", WHY, hosts),
    Test::bulkhead("refusals::another_containers_namespaces", WHY, others),
];

fn refused(t: &Context<'_>, flags: &[&str], words: &[&str]) -> Result<()> {
    let flags: Vec<&str> = ["--rm"].iter().chain(flags).copied().collect();
    let run = t.nerdctl_run(&flags, &["true"])?.output()?;
    run.expect_failure()?.expect_stderr(words)?;
    ensure!(t.nerdctl_ok(&["ps", "-aq"])?.lines().count() <= 1, "it is not there");
    Ok(())
}

fn hosts(t: &mut Context<'_>) -> Result<()> {
    refused(t, &["--network", "host"], &["hostNetwork", "virtual machine"])?;
    refused(t, &["--pid", "host"], &["hostPID", "virtual machine"])?;
    refused(t, &["--ipc", "host"], &["hostIPC", "virtual machine"])?;
    refused(t, &["--uts", "host"], &["hostUTS", "virtual machine"])?;
    let device =
        if std::path::Path::new("/dev/loop-control").exists() { "/dev/loop-control" } else { "/dev/kvm" };
    refused(t, &["--device", device], &[device, "belongs to the host"])?;
    let source = format!("{}:/data:rshared", t.dir().display());
    refused(t, &["-v", &source], &["mounts do not travel"])?;
    Ok(())
}

fn others(t: &mut Context<'_>) -> Result<()> {
    t.nerdctl_start("box", &[], SLEEPER)?;
    refused(t, &["--network", "container:box"], &["another machine is in this network namespace"])?;
    refused(t, &["--pid", "container:box"], &["joining the pid namespace"])?;
    t.nerdctl_ok(&["rm", "-f", "box"])?;
    Ok(())
}
