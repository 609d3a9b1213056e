//! Files that a container shares with the host, gets from it, gives to it, and leaves in an image.

use std::fs;

use anyhow::{Result, ensure};
use harness::{Context, Test};

use crate::SLEEPER;

pub(crate) const TESTS: &[Test] = &[
    Test::common("files::volumes", volumes),
    Test::common("files::copied_both_ways", copied),
    Test::common("files::committed", committed),
];

fn volumes(t: &mut Context<'_>) -> Result<()> {
    fs::create_dir(t.dir().join("shared"))?;
    t.write("shared/note", "from the host\n")?;
    let shared = t.dir().join("shared").display().to_string();
    let (rw, ro) = (format!("{shared}:/data"), format!("{shared}:/fixed:ro"));
    let mount = format!("type=bind,source={shared}/note,target=/one,readonly");
    let flags = ["--rm", "-v", &rw, "-v", &ro, "-v", "named:/kept", "--mount", &mount];
    let script = "cat /data/note /one; echo back >/data/answer; echo kept >/kept/file; \
                  touch /fixed/no 2>&1; touch /one 2>&1; echo done";
    let seen = t.nerdctl_run(&flags, &["sh", "-c", script])?.output()?.ok()?.out();
    ensure!(seen.starts_with("from the host\nfrom the host\n") && seen.ends_with("done"), "{seen}");
    ensure!(seen.matches("Read-only file system").count() == 2, "{seen}");
    ensure!(fs::read_to_string(t.dir().join("shared/answer"))? == "back\n");
    let seen = t.nerdctl_run(&["--rm", "-v", "named:/kept"], &["cat", "/kept/file"])?.output()?.ok()?;
    ensure!(seen.out() == "kept", "a named volume is the same for the next container: {seen}");
    ensure!(t.nerdctl_ok(&["volume", "ls", "-q"])? == "named");
    t.nerdctl_ok(&["volume", "rm", "named"])?;
    Ok(())
}

/// nerdctl goes by the root of the container's pid: what it writes must reach the container, and never the host.
fn copied(t: &mut Context<'_>) -> Result<()> {
    fs::create_dir(t.dir().join("shared"))?;
    let volume = format!("{}:/data", t.dir().join("shared").display());
    t.nerdctl_start("box", &["-v", &volume], SLEEPER)?;
    let file = t.write("greeting", "hello\n")?.display().to_string();
    t.nerdctl_ok(&["cp", &file, "box:/etc/greeting-of-bulkhead"])?;
    t.nerdctl_ok(&["cp", &file, "box:/data/"])?;
    ensure!(t.nerdctl_exec("box", "cat /etc/greeting-of-bulkhead /data/greeting")? == "hello\nhello");
    ensure!(!std::path::Path::new("/etc/greeting-of-bulkhead").exists(), "it came to the host");
    t.nerdctl_exec("box", "mkdir -p /out/deep; echo answer >/out/deep/file; ln -s deep/file /out/link")?;
    let to = t.dir().join("copy").display().to_string();
    t.nerdctl_ok(&["cp", "box:/out", &to])?;
    ensure!(fs::read_to_string(t.dir().join("copy/deep/file"))? == "answer\n");
    ensure!(fs::read_link(t.dir().join("copy/link"))?.ends_with("deep/file"));
    // And from one that has ended.
    t.nerdctl_ok(&["stop", "-t", "60", "box"])?;
    let to = t.dir().join("later").display().to_string();
    t.nerdctl_ok(&["cp", "box:/out/deep/file", &to])?;
    ensure!(fs::read_to_string(t.dir().join("later"))? == "answer\n");
    t.nerdctl_ok(&["rm", "box"])?;
    Ok(())
}

fn committed(t: &mut Context<'_>) -> Result<()> {
    t.nerdctl_start("box", &[], SLEEPER)?;
    t.nerdctl_exec("box", "echo mine >/mine")?;
    t.nerdctl_ok(&["commit", "box", "bulkhead.test/mine:1"])?;
    ensure!(t.nerdctl_exec("box", "echo on")? == "on", "it runs on");
    let runtime = t.settings().runtime_name.clone();
    let run =
        ["run", "--rm", "--pull", "never", "--runtime", &runtime, "bulkhead.test/mine:1", "cat", "/mine"];
    ensure!(t.nerdctl_ok(&run)? == "mine");
    t.nerdctl_ok(&["rm", "-f", "box"])?;
    t.nerdctl_ok(&["rmi", "bulkhead.test/mine:1"])?;
    Ok(())
}
