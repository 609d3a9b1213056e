//! Containers with users of their own: root inside, nobody outside.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use harness::{Context, Test};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] = &[
    Test::common("userns::ids_are_mapped", ids_are_mapped),
    Test::common("userns::exec_is_mapped", exec_is_mapped),
    Test::common("userns::users_and_groups", users_and_groups),
    Test::common("userns::no_power_outside", no_power_outside),
    Test::common("userns::root_of_its_own_network_and_name", own_network_and_name),
    Test::common("userns::limits_hold", limits_hold),
    Test::common("userns::read_only_root", read_only_root),
    Test::common("userns::terminal", terminal),
    Test::common("userns::binds_keep_their_owners", binds_keep_their_owners),
    Test::common("userns::binds_with_mapped_owners", binds_with_mapped_owners),
    Test::common("userns::snapshot_with_mapped_layers", snapshot_with_mapped_layers),
    Test::common("userns::one_kind_of_ids_is_not_enough", one_kind_of_ids),
    Test::bulkhead("userns::a_user_who_is_not_mapped", "runc says it in other words", unmapped_user),
];

const FIRST: u32 = 100_000;
const MAPPED: [&str; 4] = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"];

fn with<'a>(flags: &[&'a str]) -> Vec<&'a str> {
    MAPPED.iter().chain(flags).copied().collect()
}

fn ids_are_mapped(t: &mut Context) -> Result<()> {
    let script = "cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; id -u; id -g; stat -c %u:%g / /bin/busybox; \
        touch /new; stat -c %u /new; stat -c %u /proc/1 /dev /sys/class/net/lo";
    let seen = t.sh(&MAPPED, script)?;
    let expected = "0 100000 65536\n 0 100000 65536\n0\n0\n0:0\n0:0\n0\n0\n0\n0";
    ensure!(seen.trim_start() == expected, "saw {seen:?}");
    let caps = t.sh(&MAPPED, "grep CapEff /proc/self/status")?;
    ensure!(caps.ends_with("00000000a80425fb"), "saw {caps:?}");
    Ok(())
}

fn exec_is_mapped(t: &mut Context) -> Result<()> {
    t.start_sleeper(&MAPPED, "c")?;
    let seen = t.exec_ok("c", "[ $(readlink /proc/1/ns/user) = $(readlink /proc/self/ns/user) ] && echo same; id -u; touch /made; stat -c %u /made; echo again > /dev/stdout")?;
    ensure!(seen == "same\n0\n0\nagain", "saw {seen:?}");
    let run = t.ctr().args(["task", "exec", "--exec-id", "u", "--user", "1000", "c"]);
    let seen = run.args(["sh", "-c", "id -u; touch /tmp/mine; stat -c %u /tmp/mine"]).output()?.ok()?.out();
    ensure!(seen == "1000\n1000", "saw {seen:?}");
    t.remove("c")
}

fn users_and_groups(t: &mut Context) -> Result<()> {
    let seen = t.sh(&with(&["--user", "alice"]), "id -un; id -G; echo out > /dev/stdout; touch /tmp/a; stat -c %U:%G /tmp/a; touch /root/x 2>/dev/null || echo refused")?;
    ensure!(seen == "alice\n1000 2000 2001\nout\nalice:alice\nrefused", "saw {seen:?}");
    Ok(())
}

fn no_power_outside(t: &mut Context) -> Result<()> {
    for (command, expected) in [
        (&["chown", "70000", "/tmp"][..], "Invalid argument"),
        (&["mknod", "/tmp/n", "c", "1", "3"], "Operation not permitted"),
        (&["sh", "-c", "echo 1 > /proc/sys/kernel/panic"], "ermission denied"),
    ] {
        // With all capabilities, which are none outside.
        let output = t.run_rm(&with(&["--privileged"]), command)?.expect_failure()?;
        output.expect_stderr(&[expected])?;
    }
    Ok(())
}

fn own_network_and_name(t: &mut Context) -> Result<()> {
    let flags = with(&["--cap-add", "CAP_NET_ADMIN", "--cap-add", "CAP_SYS_ADMIN"]);
    let script = "ip link set lo up mtu 1234 && ip -o link show lo | grep -c 1234; hostname ship && hostname; \
        ping -c 1 127.0.0.1 | grep -c ' 0% packet loss'; (echo hi | nc -l -p 80) & \
        until netstat -ltn | grep -q ':80 '; do sleep 0.1; done; nc 127.0.0.1 80 </dev/null; \
        mount -t tmpfs none /mnt && stat -c %u /mnt";
    let seen = t.sh(&flags, &format!("mkdir -p /mnt; {script}"))?;
    ensure!(seen == "1\nship\n1\nhi\n0", "saw {seen:?}");
    Ok(())
}

fn limits_hold(t: &mut Context) -> Result<()> {
    let mut made = Ok(());
    let run = t.run_spec("c", &["sh", "-c", "ulimit -n; ulimit -Hn"], |spec| {
        made = mapped_spec(t, spec);
        // More than a process of the guest has by itself.
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 8192, "soft": 5000}]);
    })?;
    made?;
    let seen = run.output()?.ok()?.out();
    ensure!(seen == "5000\n8192", "saw {seen:?}");
    let flags = with(&["--memory-limit", "67108864"]);
    let output = t.run_rm(&flags, &["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"])?;
    output.expect_code(137)?;
    Ok(())
}

fn read_only_root(t: &mut Context) -> Result<()> {
    let flags = with(&["--read-only", "--cwd", "/home"]);
    let seen =
        t.sh(&flags, "pwd; stat -c %u . ; touch x 2>/dev/null || echo refused; touch /run/x && echo made")?;
    ensure!(seen == "/home\n0\nrefused\nmade", "saw {seen:?}");
    Ok(())
}

fn terminal(t: &mut Context) -> Result<()> {
    let flags = with(&["--rm"]);
    let script = "[ -t 0 ] && stat -c 'owner %u' $(tty) && stat -c 'console %u' /dev/console; echo done";
    let (pty, ctr) = t.run_on_terminal(&flags, "c", &["sh", "-c", script], (80, 24))?;
    pty.wait_for("done", 30)?;
    let screen = pty.screen();
    ensure!(screen.contains("owner 0") && screen.contains("console 0"), "saw {screen:?}");
    ctr.wait()?.ok()?;
    Ok(())
}

fn binds_keep_their_owners(t: &mut Context) -> Result<()> {
    let dir = t.dir().join("shared");
    fs::create_dir(&dir)?;
    chown(&dir, Some(FIRST), Some(FIRST))?;
    fs::write(dir.join("roots"), "secret")?;
    fs::set_permissions(dir.join("roots"), fs::Permissions::from_mode(0o600))?;
    let mount = format!("type=bind,src={},dst=/shared,options=rbind:rw", dir.display());
    let script = "stat -c %u /shared /shared/roots; cat /shared/roots 2>/dev/null || echo refused; \
        chown 5:6 /shared/roots 2>/dev/null || echo refused; touch /shared/mine && chown 1000:2000 /shared/mine";
    let seen = t.sh(&with(&["--mount", &mount]), script)?;
    ensure!(seen == "0\n65534\nrefused\nrefused", "saw {seen:?}");
    let mine = dir.join("mine").metadata()?;
    ensure!((mine.uid(), mine.gid()) == (FIRST + 1000, FIRST + 2000), "{}:{}", mine.uid(), mine.gid());
    Ok(())
}

/// A specification in a user namespace; its root belongs to it.
fn mapped_spec(t: &Context, spec: &mut Value) -> Result<()> {
    let chown = Command::new("chown").args(["-Rh", "100000:100000"]).arg(t.rootfs()?).status()?;
    ensure!(chown.success());
    let map = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
    spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "user"}));
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    Ok(())
}

fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    let ids = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
    json!({
        "destination": destination, "type": "bind", "source": source, "options": options,
        "uidMappings": ids, "gidMappings": ids,
    })
}

fn binds_with_mapped_owners(t: &mut Context) -> Result<()> {
    let dir = t.dir().join("volume");
    fs::create_dir(&dir)?;
    fs::write(dir.join("old"), "old")?;
    fs::set_permissions(dir.join("old"), fs::Permissions::from_mode(0o600))?;
    let file = t.write("file", "text")?;
    let script = "stat -c %u /volume /volume/old /file; cat /volume/old; touch /volume/new; \
        chown 1000:2000 /volume/new; echo x 2>/dev/null > /file || echo refused; touch /read/x 2>/dev/null || echo refused";
    let mut made = Ok(());
    let run = t.run_spec("c", &["sh", "-c", script], |spec| {
        made = mapped_spec(t, spec);
        let mounts = spec["mounts"].as_array_mut().expect("a list");
        mounts.push(bind(&dir, "/volume", &["rbind", "rw"]));
        mounts.push(bind(&file, "/file", &["bind", "ro"]));
        mounts.push(bind(&dir, "/read", &["rbind", "ro", "ridmap"]));
    })?;
    made?;
    let seen = run.output()?.ok()?.out();
    ensure!(seen == "0\n0\n0\noldrefused\nrefused", "saw {seen:?}");
    let owner = |name: &str| dir.join(name).metadata().map(|m| (m.uid(), m.gid()));
    ensure!(owner("old")? == (0, 0) && owner("new")? == (1000, 2000), "{:?}", owner("new"));
    Ok(())
}

/// The layers stay as they are, and belong to the container's root all the same.
fn snapshot_with_mapped_layers(t: &mut Context) -> Result<()> {
    let script = "stat -c %u:%g / /bin/busybox /home/alice /etc/passwd; echo more >> /etc/passwd; \
        stat -c %u /etc/passwd; touch /new; stat -c %u /new";
    let seen = t.sh(&with(&["--remap-labels"]), script)?;
    ensure!(seen == "0:0\n0:0\n1000:1000\n0:0\n0\n0", "saw {seen:?}");
    Ok(())
}

fn one_kind_of_ids(t: &mut Context) -> Result<()> {
    let run = t.run_spec("c", &["true"], |spec| {
        spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "user"}));
        spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
    })?;
    run.output()?.expect_failure()?;
    Ok(())
}

fn unmapped_user(t: &mut Context) -> Result<()> {
    let output = t.run_rm(&with(&["--user", "70000"]), &["true"])?.expect_failure()?;
    output.expect_stderr(&["process.user.uid: 70000 is not mapped in the user namespace"])?;
    t.start_sleeper(&MAPPED, "c")?;
    let run = t.ctr().args(["task", "exec", "--exec-id", "u", "--user", "70000", "c", "true"]);
    run.output()?.expect_failure()?.expect_stderr(&["70000 is not mapped"])?;
    t.remove("c")
}
