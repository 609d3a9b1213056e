//! `ctr run` and its flags: what the process in the container finds.

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Run, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::bulkhead("run::a_kernel_of_the_users_own", "runc has the host's", kernel_of_the_users_own),
    Test::common("run::exit_code_is_exact", exit_code_is_exact),
    Test::common("run::programs_take_each_others_pages", each_others_pages),
    Test::common("run::killed_is_128_plus_signal", killed_is_128_plus_signal),
    Test::common("run::detached", detached),
    Test::common("run::env", env),
    Test::common("run::cwd", cwd),
    Test::common("run::user_by_name_has_its_groups", user_by_name_has_its_groups),
    Test::common("run::user_by_id", user_by_id),
    Test::common("run::hostname", hostname),
    Test::common("run::mount_bind_writable", mount_bind_writable),
    Test::common("run::mount_bind_read_only", mount_bind_read_only),
    Test::common("run::mount_bind_file", mount_bind_file),
    Test::common("run::mount_tmpfs", mount_tmpfs),
    Test::common("run::mounts_in_order", mounts_in_order),
    Test::common("run::read_only", read_only),
    Test::common("run::rootfs_directory", rootfs_directory),
    Test::common("run::pid_file", pid_file),
    Test::common("run::device_char", device_char),
    Test::common("run::device_block", device_block),
    Test::common("run::rlimit_nofile", rlimit_nofile)
        .unless(|s| s.is_containerd_1().then_some("ctr 1.x has no --rlimit-nofile")),
    Test::common("run::sysctl", sysctl),
    Test::common("run::hook_start_container", hook_start_container),
    Test::common("run::hooks_of_the_host_are_told_of_the_container", hooks_of_the_host),
    Test::common("run::namespaces_are_its_own", namespaces_are_its_own),
    Test::common("run::cgroup_namespace", cgroup_namespace),
    Test::common("run::twenty_at_once", twenty_at_once),
    Test::bulkhead(
        "run::kernel_is_the_guests",
        "a container of runc shares the host's kernel",
        kernel_is_the_guests,
    ),
];

fn exit_code_is_exact(t: &mut Context) -> Result<()> {
    for code in [0, 1, 42, 255] {
        t.run_rm(&[], &["sh", "-c", &format!("exit {code}")])?.expect_code(code)?;
    }
    Ok(())
}

fn killed_is_128_plus_signal(t: &mut Context) -> Result<()> {
    let run = t.run(&["--rm"], "c", &["sh", "-c", "echo up; sleep 1000"]).spawn()?;
    run.wait_for_text("up")?;
    t.ctr_ok(&["task", "kill", "-s", "SIGKILL", "c"])?;
    run.wait()?.expect_code(137)?;
    Ok(())
}

fn detached(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let list = t.ctr_ok(&["task", "ls"])?;
    ensure!(list.lines().any(|l| l.starts_with("c ") && l.ends_with("RUNNING")), "task ls shows:\n{list}");
    t.remove("c")
}

fn env(t: &mut Context) -> Result<()> {
    let seen = t.sh(
        &["--env", "GREETING=hello world", "--env", "EMPTY="],
        "echo \"$GREETING|${EMPTY-unset}|$PATH\"",
    )?;
    ensure!(
        seen == "hello world||/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "saw {seen:?}"
    );
    Ok(())
}

fn cwd(t: &mut Context) -> Result<()> {
    let seen = t.run_ok(&["--cwd", "/home/alice"], &["pwd"])?;
    ensure!(seen == "/home/alice", "saw {seen:?}");
    Ok(())
}

fn user_by_name_has_its_groups(t: &mut Context) -> Result<()> {
    let seen = t.sh(&["--user", "alice"], "id -u; id -g; id -G | tr ' ' '\n' | sort -n | tr '\n' ' '; touch /home/alice/f && stat -c %u:%g /home/alice/f")?;
    ensure!(seen == "1000\n1000\n1000 2000 2001 1000:1000", "saw {seen:?}");
    let capable = t.sh(&["--user", "alice"], "grep CapEff /proc/self/status")?;
    ensure!(capable.ends_with("0000000000000000"), "an ordinary user has capabilities: {capable}");
    Ok(())
}

fn user_by_id(t: &mut Context) -> Result<()> {
    let seen = t.sh(&["--user", "4321:8765"], "id -u; id -g")?;
    ensure!(seen == "4321\n8765", "saw {seen:?}");
    Ok(())
}

fn hostname(t: &mut Context) -> Result<()> {
    let seen = t.run_ok(&["--hostname", "lighthouse"], &["hostname"])?;
    ensure!(seen == "lighthouse", "saw {seen:?}");
    Ok(())
}

fn mount_bind_writable(t: &mut Context) -> Result<()> {
    let dir = t.dir().join("shared");
    std::fs::create_dir(&dir)?;
    std::fs::write(dir.join("in"), "from the host")?;
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:rw", dir.display());
    let seen = t.sh(&["--mount", &mount], "cat /mnt/in; echo from inside > /mnt/out; mkdir /mnt/d")?;
    ensure!(seen == "from the host", "saw {seen:?}");
    ensure!(std::fs::read_to_string(dir.join("out"))? == "from inside\n", "the host sees something else");
    ensure!(dir.join("d").is_dir(), "the directory made inside is not there");
    Ok(())
}

fn mount_bind_read_only(t: &mut Context) -> Result<()> {
    let dir = t.dir().join("shared");
    std::fs::create_dir(&dir)?;
    std::fs::write(dir.join("in"), "from the host")?;
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:ro", dir.display());
    let output =
        t.run_rm(&["--mount", &mount], &["sh", "-c", "cat /mnt/in; touch /mnt/out"])?.expect_failure()?;
    ensure!(output.out() == "from the host", "{output}");
    let output = output.expect_stderr(&["Read-only file system"])?;
    ensure!(!dir.join("out").exists(), "written all the same\n{output}");
    Ok(())
}

fn mount_bind_file(t: &mut Context) -> Result<()> {
    let file = t.write("motd", "good morning\n")?;
    let mount = format!("type=bind,src={},dst=/etc/motd,options=rbind:ro", file.display());
    let seen = t.sh(&["--mount", &mount], "cat /etc/motd; ls /etc/passwd")?;
    ensure!(seen == "good morning\n/etc/passwd", "saw {seen:?}");
    Ok(())
}

fn mount_tmpfs(t: &mut Context) -> Result<()> {
    let mount = "type=tmpfs,src=tmpfs,dst=/scratch,options=size=4m:mode=1777:noexec";
    let seen = t.sh(
        &["--mount", mount],
        "grep ' /scratch ' /proc/mounts; stat -c %a /scratch; df -m /scratch | awk 'END{print $2}'",
    )?;
    let lines: Vec<&str> = seen.lines().collect();
    ensure!(lines.len() == 3 && lines[0].contains("tmpfs") && lines[0].contains("noexec"), "saw {seen:?}");
    ensure!(lines[1] == "1777" && lines[2] == "4", "saw {seen:?}");
    Ok(())
}

fn mounts_in_order(t: &mut Context) -> Result<()> {
    let dir = t.dir().join("under");
    std::fs::create_dir_all(dir.join("inner"))?;
    let bind = format!("type=bind,src={},dst=/m,options=rbind:rw", dir.display());
    let over = "type=tmpfs,src=tmpfs,dst=/m/inner,options=size=1m";
    let seen = t.sh(&["--mount", &bind, "--mount", over], "touch /m/inner/x /m/y; ls /m/inner")?;
    ensure!(seen == "x", "saw {seen:?}");
    ensure!(dir.join("y").exists(), "the bind mount does not lie below");
    ensure!(!dir.join("inner/x").exists(), "the later mount does not lie above the earlier one");
    Ok(())
}

fn read_only(t: &mut Context) -> Result<()> {
    t.run_rm(&["--read-only"], &["touch", "/x"])?
        .expect_failure()?
        .expect_stderr(&["Read-only file system"])?;
    t.run_ok(&["--read-only"], &["touch", "/run/x"])?;
    Ok(())
}

fn rootfs_directory(t: &mut Context) -> Result<()> {
    let root = t.rootfs()?;
    let runtime = t.settings().runtime_name.clone();
    let seen = t
        .ctr()
        .args(["run", "--rm", "--runtime", &runtime, "--rootfs"])
        .arg(&root)
        .args(["c", "/bin/sh", "-c", "echo hi; /bin/touch /made"])
        .output()?
        .ok()?;
    ensure!(seen.out() == "hi", "{seen}");
    ensure!(root.join("made").exists(), "what the container wrote is not in the directory");
    Ok(())
}

fn pid_file(t: &mut Context) -> Result<()> {
    let file = t.dir().join("pid");
    t.start_sleeper(&["--pid-file", &file.display().to_string()], "c")?;
    let pid: u32 = std::fs::read_to_string(&file)?.trim().parse()?;
    let list = t.ctr_ok(&["task", "ls"])?;
    let row = list.lines().find(|l| l.starts_with("c ")).unwrap_or_default();
    ensure!(row.split_whitespace().nth(1) == Some(&pid.to_string()), "the file says {pid}, task ls: {row}");
    ensure!(pid > 0, "pid 0");
    t.remove("c")
}

fn device_char(t: &mut Context) -> Result<()> {
    let seen =
        t.sh(&["--device", "/dev/fuse"], "stat -c '%F %t:%T' /dev/fuse; exec 3<>/dev/fuse && echo opened")?;
    ensure!(seen == "character special file a:e5\nopened", "saw {seen:?}");
    // Without the flag not even a node made by hand opens.
    let output =
        t.run_rm(&[], &["sh", "-c", "mknod /tmp/fuse c 10 229 && exec 3<>/tmp/fuse"])?.expect_failure()?;
    output.expect_stderr(&["Operation not permitted"])?;
    Ok(())
}

/// Programs that are linked to the same address, by turns in pages that another one had: each is what its file says,
/// whatever a translator remembers of the page.
fn each_others_pages(t: &mut Context) -> Result<()> {
    let watcher =
        std::env::var("BULKHEAD_TEST_WATCHER").context("BULKHEAD_TEST_WATCHER names the watcher")?;
    let busybox = std::env::var("BULKHEAD_TEST_BUSYBOX").context("BULKHEAD_TEST_BUSYBOX names busybox")?;
    let folder = t.dir().join("programs");
    std::fs::create_dir_all(&folder)?;
    for (from, to) in [(&watcher, "watcher"), (&busybox, "true")] {
        std::fs::copy(from, folder.join(to)).with_context(|| format!("copy {from}"))?;
    }
    // The watcher wants an argument, and says so.
    let script = "n=0; while [ $((n += 1)) -le 60 ]; do \
                  /programs/watcher 2>/dev/null; [ $? = 1 ] || echo watcher $n; \
                  echo 1 >/proc/sys/vm/drop_caches; \
                  /programs/true || echo true $n; \
                  echo 1 >/proc/sys/vm/drop_caches; done; echo done";
    let mount = format!("type=bind,src={},dst=/programs,options=rbind:ro", folder.display());
    let said = t.sh(&["--privileged", "--mount", &mount], script)?;
    ensure!(said == "done", "programs that did not do what they should: {said}");
    Ok(())
}

fn device_block(t: &mut Context) -> Result<()> {
    let mut content = vec![0; 1 << 20];
    content[..18].copy_from_slice(b"treasure is here\n\0");
    let file = t.write("disk", content)?;
    let device = Run::new("losetup").args(["--find", "--show"]).arg(&file).output()?.ok()?.out();
    let result = t.run_rm(
        &["--device", &device],
        &[
            "sh",
            "-c",
            &format!(
                "head -n 1 {device}; echo written | dd of={device} bs=512 seek=1 conv=fsync 2>/dev/null"
            ),
        ],
    );
    Run::new("losetup").arg("--detach").arg(&device).output()?.ok()?;
    let output = result?.ok()?;
    ensure!(output.out() == "treasure is here", "{output}");
    let disk = std::fs::read(&file)?;
    ensure!(disk[512..].starts_with(b"written\n"), "what the container wrote is not on the device");
    Ok(())
}

fn rlimit_nofile(t: &mut Context) -> Result<()> {
    let seen = t.sh(&["--rlimit-nofile", "333:444"], "ulimit -Sn; ulimit -Hn")?;
    ensure!(seen == "333\n444", "saw {seen:?}");
    Ok(())
}

fn sysctl(t: &mut Context) -> Result<()> {
    let script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced";
    let run = t.run_spec("c", &["sh", "-c", script], |spec| {
        spec["linux"]["sysctl"] =
            serde_json::json!({ "net.ipv4.ip_unprivileged_port_start": "77", "kernel.shm_rmid_forced": "1" });
    })?;
    let output = run.output()?.ok()?;
    ensure!(output.out() == "77\n1", "{output}");
    Ok(())
}

fn hook_start_container(t: &mut Context) -> Result<()> {
    let run = t.run_spec("c", &["sh", "-c", "cat /hooked"], |spec| {
        spec["hooks"] = serde_json::json!({ "startContainer": [{
            "path": "/bin/sh",
            "args": ["sh", "-c", "cat > /state; echo \"$WORD from a hook\" > /hooked"],
            "env": ["PATH=/bin", "WORD=hello"],
        }] });
    })?;
    let output = run.output()?.ok()?;
    ensure!(output.out() == "hello from a hook", "{output}");
    let state: serde_json::Value = serde_json::from_slice(&std::fs::read(t.rootfs()?.join("state"))?)?;
    ensure!(state["id"] == "c", "the hook was told: {state}");
    Ok(())
}

/// Clients note in annotations what their hooks have to know.
fn hooks_of_the_host(t: &mut Context) -> Result<()> {
    let hook = |name: &str| {
        let script = format!("cat > {}", t.dir().join(name).display());
        serde_json::json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"] }])
    };
    let (create, poststop) = (hook("create"), hook("poststop"));
    let run = t.run_spec("c", &["true"], |spec| {
        spec["annotations"] = serde_json::json!({ "harbour/berth": "seven" });
        spec["hooks"] = serde_json::json!({ "createRuntime": create, "poststop": poststop });
    })?;
    run.output()?.ok()?;
    for (name, status) in [("create", "creat"), ("poststop", "stopped")] {
        let state: serde_json::Value = serde_json::from_slice(&std::fs::read(t.dir().join(name))?)?;
        ensure!(state["id"] == "c" && state["annotations"]["harbour/berth"] == "seven", "{name}: {state}");
        ensure!(state["status"].as_str().is_some_and(|s| s.starts_with(status)), "{name}: {state}");
    }
    Ok(())
}

fn namespaces_are_its_own(t: &mut Context) -> Result<()> {
    let script =
        "echo $$; ls / | tr '\n' ' '; echo; ip -o addr | grep -v ' lo ' | wc -l; ls /proc | grep -c '^[0-9]'";
    let seen = t.sh(&[], script)?;
    let lines: Vec<&str> = seen.lines().collect();
    ensure!(lines[0] == "1", "the first process is not number 1: {seen}");
    ensure!(lines[1] == "bin dev etc home proc root run sys tmp var ", "the root shows {}", lines[1]);
    ensure!(lines[2] == "0", "a network address is there: {seen}");
    ensure!(lines[3].parse::<u32>()? <= 4, "foreign processes are to be seen: {seen}");
    // What one container does to its namespaces does not show in another.
    t.start_sleeper(&["--hostname", "one", "--cap-add", "CAP_SYS_ADMIN"], "one")?;
    let inside = t.exec_ok("one", "hostname changed; hostname")?;
    ensure!(inside == "changed", "saw {inside:?}");
    let other = t.run(&["--rm", "--hostname", "two"], "two", &["sh", "-c", "hostname"]).output()?.ok()?;
    ensure!(other.out() == "two", "{other}");
    t.remove("one")
}

fn cgroup_namespace(t: &mut Context) -> Result<()> {
    let run = t.run_spec("c", &["cat", "/proc/self/cgroup"], |spec| {
        if let Some(list) = spec["linux"]["namespaces"].as_array_mut() {
            list.push(serde_json::json!({ "type": "cgroup" }));
        }
    })?;
    let output = run.output()?.ok()?;
    // Hierarchies in which runc makes no group of its own show the group of the shim.
    let ours = output
        .out()
        .lines()
        .filter(|l| l.contains("memory") || l.starts_with("0::"))
        .all(|l| l.ends_with(":/"));
    ensure!(ours && !output.out().is_empty(), "{output}");
    Ok(())
}

fn twenty_at_once(t: &mut Context) -> Result<()> {
    let ids: Vec<String> = (0..20).map(|n| format!("c{n}")).collect();
    let script = |id: &str| format!("echo hello from {id}; exit {}", id.len());
    let running: Result<Vec<_>> =
        ids.iter().map(|id| t.run(&["--rm"], id, &["sh", "-c", &script(id)]).deadline(600).spawn()).collect();
    for (proc, id) in running?.into_iter().zip(&ids) {
        let output = proc.wait()?.expect_code(id.len() as i32)?;
        ensure!(output.out() == format!("hello from {id}"), "{output}");
    }
    Ok(())
}

fn kernel_is_the_guests(t: &mut Context) -> Result<()> {
    let guest = t.run_ok(&[], &["cat", "/proc/version"])?;
    let host = std::fs::read_to_string("/proc/version")?;
    ensure!(guest.starts_with("Linux version"), "saw {guest:?}");
    ensure!(guest.trim() != host.trim(), "the container runs on the host's kernel: {host}");
    Ok(())
}

/// The configuration may name another kernel. This one is told apart by its release.
fn kernel_of_the_users_own(t: &mut Context) -> Result<()> {
    let release = t.run_ok(&[], &["uname", "-r"])?;
    let own: String = release.chars().map(|c| if c.is_ascii_digit() { '9' } else { c }).collect();
    let config = harness::Toml::Table(std::fs::read_to_string(t.node().bulkhead_config())?.parse()?);
    let kernel = config["hypervisor"]["kernel"].as_str().context("the configuration names no kernel")?;
    let mut image = std::fs::read(kernel).with_context(|| format!("read {kernel}"))?;
    let places: Vec<usize> =
        (0..image.len() - release.len()).filter(|at| image[*at..].starts_with(release.as_bytes())).collect();
    for at in places {
        image[at..at + own.len()].copy_from_slice(own.as_bytes());
    }
    let path = t.write("vmlinux", image)?.display().to_string();
    t.set_config("hypervisor", "kernel", path.into())?;
    let found = t.run_ok(&[], &["uname", "-r"])?;
    ensure!(found == own && own != release, "the guest's kernel is {found}, not {own}");
    Ok(())
}
