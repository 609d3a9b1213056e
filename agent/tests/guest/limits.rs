//! What a container may use: memory, time, devices, system calls; and being frozen.

use bulkhead_proto::agent::{UpdateRequest, event::Kind};
use serde_json::json;

use crate::host::{Host, context, request, spec};

#[tokio::test]
#[ignore = "boots a machine"]
async fn want_of_memory_is_told_before_the_end() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let mut spec = spec(&root, &["sh", "-c", "dd if=/dev/zero of=/dev/null bs=200M"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 32 << 20});
    let (status, _, _) = host.run("c", &spec, b"").await;
    assert_eq!(status, 137);
    let events = host.events();
    let oom = events.iter().position(|e| matches!(e, Kind::Oom(oom) if oom.container_id == "c"));
    let exit = events.iter().position(|e| matches!(e, Kind::Exit(_)));
    assert!(oom.is_some() && oom < exit, "{events:?}");
    assert_eq!(events.iter().filter(|e| matches!(e, Kind::Oom(_))).count(), 1);
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn limits_and_numbers_are_the_kernels() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let mut spec = spec(&root, &["sleep", "1000"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
    spec["linux"]["resources"]["pids"] = json!({"limit": 50});
    spec["linux"]["resources"]["cpu"] = json!({"quota": 50000, "period": 100000, "shares": 512});
    let (stdio, _io) = host.stdio(false, false);
    host.create("c", &spec, stdio).await.unwrap();
    host.start_container("c").await.unwrap();
    let text = |files: &std::collections::HashMap<String, Vec<u8>>, name: &str| {
        String::from_utf8(files[name].clone()).unwrap().trim().to_owned()
    };
    let files = host.vm.client.stats(context(), &request("c")).await.unwrap().files;
    assert_eq!(text(&files, "memory.max"), (64 << 20).to_string());
    assert_eq!(text(&files, "pids.max"), "50");
    assert_eq!(text(&files, "pids.current"), "1");
    assert_eq!(text(&files, "cpu.max"), "50000 100000");
    for name in ["cpu.stat", "memory.current", "memory.stat", "memory.events"] {
        assert!(!text(&files, name).is_empty(), "{name}");
    }
    let update = UpdateRequest {
        container_id: "c".into(),
        resources: json!({"memory": {"limit": 128 << 20}}).to_string().into_bytes(),
        ..Default::default()
    };
    host.vm.client.update(context(), &update).await.unwrap();
    let files = host.vm.client.stats(context(), &request("c")).await.unwrap().files;
    assert_eq!(text(&files, "memory.max"), (128 << 20).to_string());
    assert_eq!(text(&files, "pids.max"), "50");
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_paused_container_stands_still() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let (stdio, _io) = host.stdio(false, false);
    host.create("c", &spec(&root, &["sleep", "1000"]), stdio).await.unwrap();
    let early = host.vm.client.pause(context(), &request("c")).await.unwrap_err();
    assert!(early.to_string().contains("created but not started"), "{early}");
    host.start_container("c").await.unwrap();
    host.vm.client.pause(context(), &request("c")).await.unwrap();
    let files = host.vm.client.stats(context(), &request("c")).await.unwrap().files;
    assert!(String::from_utf8_lossy(&files["cgroup.events"]).contains("frozen 1"));
    let (stdio, _io) = host.stdio(false, false);
    let process = spec("/", &["true"])["process"].clone();
    let paused = host.exec("c", "e", &process, stdio).await.unwrap_err();
    assert!(paused.to_string().contains("container c is paused"), "{paused}");
    host.vm.client.resume(context(), &request("c")).await.unwrap();
    assert_eq!(host.run_exec("c", "e", &process).await.0, 0);
    // A frozen container can be killed.
    host.vm.client.pause(context(), &request("c")).await.unwrap();
    let running = host.delete("c").await.unwrap_err();
    assert!(running.to_string().contains("container c is paused: cannot be deleted"), "{running}");
    host.signal("c", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(host.exit("c", "").await, 137);
    host.delete("c").await.unwrap();
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_filter_holds_for_init_and_execs() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    for (id, no_new_privileges) in [("nnp", true), ("priv", false)] {
        let root = if id == "nnp" { root.clone() } else { host.vm.rootfs(id) };
        let mut spec =
            spec(&root, &["sh", "-c", "mkdir /tmp/x; echo $?; grep Seccomp: /proc/self/status; sleep 1000"]);
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
        });
        let (stdio, _io) = host.stdio(false, false);
        host.create(id, &spec, stdio).await.unwrap();
        host.start_container(id).await.unwrap();
        for uid in [0, 1000] {
            let mut process = spec["process"].clone();
            process["args"] =
                json!(["sh", "-c", "mkdir /tmp/y; grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status"]);
            process["user"] = json!({"uid": uid, "gid": uid});
            let (_, out, err) = host.run_exec(id, &format!("e{uid}"), &process).await;
            assert!(err.contains("not implemented"), "{err}");
            assert_eq!(out, format!("NoNewPrivs:\t{}\nSeccomp:\t2\n", u8::from(no_new_privileges)));
        }
    }
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn devices_are_those_of_the_rules() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    // mem exists in no container, but whoever may mknod could make it.
    let script = "echo x > /dev/null && head -c 1 /dev/zero | wc -c; mknod /tmp/mem c 1 1; cat /tmp/mem";
    let mut plain = spec(&root, &["sh", "-c", script]);
    let caps = json!(["CAP_MKNOD", "CAP_SYS_RAWIO", "CAP_DAC_OVERRIDE"]);
    plain["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
    let (status, out, err) = host.run("c", &plain, b"").await;
    assert_eq!((status, out.as_str()), (1, "1\n"), "{err}");
    assert!(err.contains("Operation not permitted"), "{err}");

    let root = host.vm.rootfs("d");
    let mut given = spec(&root, &["sh", "-c", "head -c 1 /dev/mine | wc -c"]);
    given["linux"]["devices"] =
        json!([{"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o666}]);
    assert_eq!(host.run("d", &given, b"").await.1, "1\n");
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn the_file_system_is_the_specifications() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let data = host.vm.share.join("c/mounts/0");
    std::fs::create_dir_all(&data).unwrap();
    std::fs::write(data.join("file"), "from the host").unwrap();
    let source = format!("{}/c/mounts/0", bulkhead_proto::SHARE_DIR);
    let script = "cat /ro/file; echo; cmp /ro/file /etc/hosts; echo x > /ro/file; echo y > /rw/file; echo z > /root/file; \
                  pwd; df -k /big | tail -1 | tr -s ' ' | cut -d' ' -f2; cat /proc/self/cgroup; \
                  ls -d /sys/fs/cgroup/memory.max; head -c 1 /proc/kcore | wc -c; cat /proc/sys/kernel/shmmax; ulimit -n; echo $HOME";
    let mut spec = spec(&root, &["sh", "-c", script]);
    spec["root"]["readonly"] = json!(true);
    spec["process"]["cwd"] = json!("/made/for/us");
    spec["linux"]["sysctl"] = json!({"kernel.shmmax": "4242"});
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/ro", "type": "bind", "source": source, "options": ["rbind", "ro"]}));
    mounts.push(json!({"destination": "/rw", "type": "bind", "source": source, "options": ["rbind", "rw"]}));
    mounts.push(json!({"destination": "/etc/hosts", "type": "bind", "source": format!("{source}/file"), "options": ["bind", "ro"]}));
    mounts
        .push(json!({"destination": "/big", "type": "tmpfs", "source": "tmpfs", "options": ["size=1024k"]}));
    let (_, out, err) = host.run("c", &spec, b"").await;
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(
        lines,
        [
            "from the host",
            "/made/for/us",
            "1024",
            "0::/",
            "/sys/fs/cgroup/memory.max",
            "0",
            "4242",
            "1024",
            "/root"
        ],
        "{err}"
    );
    assert_eq!(err.matches("Read-only file system").count(), 2, "{err}");
    assert_eq!(std::fs::read_to_string(data.join("file")).unwrap(), "y\n");
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_privileged_container_may_do_what_the_guest_can() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    // A loop device of its own needs devices, capabilities, and a sysfs that can be written.
    let script = "grep CapEff /proc/self/status; head -c 1000000 /dev/zero > /tmp/disk; mke2fs -F /tmp/disk >/dev/null && \
                  mknod /dev/loop-control c 10 237 && loop=$(losetup -f) && mknod $loop b 7 ${loop#/dev/loop}; \
                  losetup $loop /tmp/disk && mount -t ext4 $loop /mnt && ls -d /mnt/lost+found; \
                  umount /mnt; losetup -d $loop; mkdir /sys/fs/cgroup/x && echo cgroup; \
                  echo 1 > /proc/sys/net/ipv4/ip_forward && cat /proc/sys/net/ipv4/ip_forward; ls /dev/absent";
    let mut spec = spec(&root, &["sh", "-c", script]);
    let all: Vec<_> = CAPABILITIES.iter().map(|name| format!("CAP_{name}")).collect();
    spec["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
    spec["process"]["noNewPrivileges"] = json!(false);
    spec["linux"]["resources"]["devices"] =
        json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]);
    spec["linux"]["devices"] =
        json!([{"path": "/dev/absent", "type": "c", "major": 240, "minor": 7, "fileMode": 0o666}]);
    spec["linux"]["maskedPaths"] = json!([]);
    spec["linux"]["readonlyPaths"] = json!([]);
    for mount in spec["mounts"].as_array_mut().unwrap() {
        mount["options"].as_array_mut().unwrap().retain(|option| option != "ro");
    }
    std::fs::create_dir(host.vm.share.join("c/rootfs/mnt")).unwrap();
    let (_, out, err) = host.run("c", &spec, b"").await;
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines, ["CapEff:\t000001ffffffffff", "/mnt/lost+found", "cgroup", "1"], "{err}");
    assert_eq!(err, "ls: /dev/absent: No such file or directory\n");
}

const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_hook_runs_in_the_container_before_its_command() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let mut plain = spec(&root, &["cat", "/tmp/state"]);
    plain["hooks"] = json!({"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "cat > /tmp/state; id -u >> /tmp/state"]}]});
    let (status, out, err) = host.run("c", &plain, b"").await;
    assert_eq!(status, 0, "{err}");
    assert!(out.contains(r#""id":"c""#) && out.ends_with("0\n"), "{out}");
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn an_exec_follows_an_init_that_has_made_cgroups() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let script = "cd /sys/fs/cgroup && mkdir own && echo 1 > own/cgroup.procs && echo +pids > cgroup.subtree_control && echo ready; sleep 1000";
    let mut spec = spec(&root, &["sh", "-c", script]);
    for mount in spec["mounts"].as_array_mut().unwrap() {
        mount["options"].as_array_mut().unwrap().retain(|option| option != "ro");
    }
    let (stdio, io) = host.stdio(false, false);
    host.create("c", &spec, stdio).await.unwrap();
    host.start_container("c").await.unwrap();
    assert_eq!(host.first_line(io).await, "ready");
    let process = spec_process(&["cat", "/proc/self/cgroup"]);
    assert_eq!(host.run_exec("c", "e", &process).await, (0, "0::/own\n".into(), String::new()));
    host.signal("c", "", libc::SIGKILL, true).await.unwrap();
    assert_eq!(host.exit("c", "").await, 137);
    host.delete("c").await.unwrap();
}

fn spec_process(args: &[&str]) -> serde_json::Value {
    spec("/", args)["process"].clone()
}
