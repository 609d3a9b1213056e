//! A pod with users of its own: its containers' root is nobody in the guest.

use std::{os::unix::fs::MetadataExt, process::Command};

use bulkhead_proto::agent::{IdMapping, UserNamespace};
use serde_json::{Value, json};

use crate::host::{Host, context, request, spec};

const FIRST: u32 = 100_000;

fn users() -> UserNamespace {
    let ids = || vec![IdMapping { container: 0, guest: FIRST, size: 65536, ..Default::default() }];
    UserNamespace { uids: ids(), gids: ids(), ..Default::default() }
}

/// A machine whose pod has users, and in it a root that is theirs.
async fn start(id: &str) -> (Host, String) {
    let mut host = Host::unconfigured().await;
    host.configure_with(Some(users())).await.unwrap();
    let root = root(&host, id);
    (host, root)
}

fn root(host: &Host, id: &str) -> String {
    let root = host.vm.rootfs(id);
    let owner = format!("{FIRST}:{FIRST}");
    let chown = Command::new("chown").args(["-Rh", &owner]).arg(host.vm.share.join(id)).status();
    assert!(chown.unwrap().success());
    root
}

/// The usual specification, in the pod's user namespace.
fn mapped(root: &str, script: &str) -> Value {
    let mut spec = spec(root, &["sh", "-c", script]);
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    let map = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    spec
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_container_is_root_among_its_own_only() {
    let (mut host, root) = start("c").await;
    let script = "cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; id -u; stat -c %u:%g /bin /dev /proc/1/ns; \
        touch /tmp/f && chown user /tmp/f && stat -c %U /tmp/f; chown 70000 /tmp/f || echo stranger; \
        mknod /tmp/n c 1 3 || echo no node; echo 1 > /proc/sys/kernel/panic || echo no sysctl; \
        hostname; cat /proc/sys/kernel/shmmni /proc/sys/net/core/somaxconn; ip -o addr show lo | grep -c 127.0.0.1; \
        ls -d /sys/class/net/lo /sys/fs/cgroup/memory.max; echo x > /dev/null && head -c 1 /dev/zero | wc -c";
    let mut spec = mapped(&root, script);
    spec["linux"]["readonlyPaths"] = json!([]);
    let (status, out, err) = host.run("c", &spec, b"").await;
    println!("{out}\n{err}");
    let expected = " 0 100000 65536\n 0 100000 65536\n0\n0:0\n0:0\n0:0\nuser\nstranger\nno node\nno sysctl\nbox\n123\n321\n1\n\
        /sys/class/net/lo\n/sys/fs/cgroup/memory.max\n1\n";
    assert_eq!((status, out.as_str()), (0, expected), "{err}");
    for said in ["Invalid argument", "Operation not permitted"] {
        assert!(err.contains(said), "{err}");
    }
    let made = host.vm.share.join("c/rootfs/tmp/f").metadata().unwrap();
    assert_eq!(made.uid(), FIRST + 1000);
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_further_process_is_mapped_too() {
    let (mut host, root) = start("c").await;
    let (stdio, _io) = host.stdio(false, false);
    let spec = mapped(&root, "sleep 1000");
    host.create("c", &spec, stdio).await.unwrap();
    host.start_container("c").await.unwrap();
    let mut process = spec["process"].clone();
    process["args"] = json!([
        "sh",
        "-c",
        "tr -s ' ' </proc/self/uid_map; id -u; ulimit -Hn; grep CapEff /proc/self/status; \
         echo again > /dev/stdout"
    ]);
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 500_000, "soft": 1024}]);
    for uid in [0, 1000] {
        process["user"] = json!({"uid": uid, "gid": uid, "additionalGids": [5]});
        let (status, out, err) = host.run_exec("c", &format!("e{uid}"), &process).await;
        let caps = if uid == 0 { "00000000000000eb" } else { "0000000000000000" };
        assert_eq!((status, err.as_str()), (0, ""), "{out}");
        assert_eq!(out, format!(" 0 100000 65536\n{uid}\n500000\nCapEff:\t{caps}\nagain\n"));
    }
    // A terminal is of the user, as well.
    process["args"] = json!(["sh", "-c", "stat -c %u:%g $(tty)"]);
    let (stdio, io) = host.stdio(false, true);
    host.exec("c", "t", &process, stdio).await.unwrap();
    assert_eq!(host.first_line(io).await.trim_end(), "1000:5");
    assert_eq!(host.exit("c", "t").await, 0);
    process["user"] = json!({"uid": 70_000, "gid": 0});
    let (stdio, _io) = host.stdio(false, false);
    let said = host.exec("c", "x", &process, stdio).await.unwrap_err().to_string();
    assert!(said.contains("process.user.uid: 70000 is not mapped"), "{said}");
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn containers_of_the_pod_share_its_users_and_processes() {
    let (mut host, first) = start("a").await;
    let second = root(&host, "b");
    let of_pod = |spec: &mut Value| {
        for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
            let kind = namespace["type"].as_str().unwrap().to_owned();
            if ["ipc", "uts", "pid", "user"].contains(&kind.as_str()) {
                namespace["path"] = json!(format!("/run/bulkhead/ns/{kind}"));
            }
        }
    };
    // Without its own words for what the namespace maps, which a specification that joins one need not have.
    let mut a = mapped(&first, "sleep 1234");
    let mut b = mapped(
        &second,
        "ps -o user,comm | grep -E 'pause|sleep' | tr -s ' '; ls /proc/1/root || echo closed; hostname; \
         hostname other && hostname; ping -c 1 127.0.0.1 | grep -c '1 packets received'; nc -l -p 80 </dev/null & \
         until netstat -ltn | grep -q ':80 '; do sleep 0.1; done; kill $!",
    );
    for spec in [&mut a, &mut b] {
        of_pod(spec);
        spec["linux"].as_object_mut().unwrap().remove("uidMappings");
        let more = json!(["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_NET_RAW", "CAP_NET_BIND_SERVICE"]);
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = more.clone();
        }
        spec["hostname"] = Value::Null;
    }
    let (stdio, _io) = host.stdio(false, false);
    host.create("a", &a, stdio).await.unwrap();
    host.start_container("a").await.unwrap();
    let (status, out, err) = host.run("b", &b, b"").await;
    println!("{out}\n{err}");
    assert_eq!(status, 0, "{out}{err}");
    assert_eq!(out, "root pause\nroot sleep\nclosed\npod\nother\n1\n", "{err}");
    assert!(err.contains("/proc/1/root"), "{err}");
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn what_only_the_guest_can_do_is_done_for_the_container() {
    let (mut host, root) = start("c").await;
    let mut spec = mapped(
        &root,
        "stat -c '%t:%T %a %u:%g' /dev/box/full; echo x > /dev/box/full || echo full; stat -c %u /made /made/here; \
         touch /x || echo read-only; ulimit -Hn; ulimit -n; cat /dev/stdin; tty || stat -c %u /proc/self/fd/1; \
         ls -A /data; stat -c %u /data",
    );
    spec["linux"]["devices"] = json!([
        {"path": "/dev/box/full", "type": "c", "major": 1, "minor": 7, "fileMode": 0o640, "uid": 0, "gid": 5},
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666, "uid": 0, "gid": 0},
    ]);
    spec["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 7, "access": "rw"}]);
    spec["root"]["readonly"] = json!(true);
    spec["process"]["cwd"] = json!("/made/here");
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 500_000, "soft": 400_000}]);
    std::fs::create_dir_all(host.vm.share.join("data")).unwrap();
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/data", "type": "bind", "source": "/run/bulkhead/share/data", "options": ["rbind", "ro"],
    }));
    std::fs::create_dir_all(host.vm.share.join("c/rootfs/data")).unwrap();
    let (status, out, err) = host.run("c", &spec, b"in\n").await;
    println!("{out}\n{err}");
    let expected = "1:7 640 0:5\nfull\n0\n0\nread-only\n500000\n400000\nin\nnot a tty\n0\n65534\n";
    assert_eq!((status, out.as_str()), (0, expected), "{err}");
    let mut other = mapped(&root, "true");
    other["linux"]["devices"] = json!([{"path": "/dev/null", "type": "c", "major": 1, "minor": 7}]);
    let (stdio, _io) = host.stdio(false, false);
    let said = host.create("d", &other, stdio).await.unwrap_err().to_string();
    assert!(said.contains("linux.devices: /dev/null is another device in every container"), "{said}");
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn who_asks_for_other_users_than_the_pods_is_refused() {
    let mut host = Host::unconfigured().await;
    let mut rootless = users();
    rootless.uids[0].container = 1;
    let said = host.configure_with(Some(rootless)).await.unwrap_err().to_string();
    assert!(said.contains("users.uids: id 0 of the container is not mapped"), "{said}");
    let mut twice = users();
    twice.gids.push(IdMapping { container: 70_000, guest: FIRST, size: 1, ..Default::default() });
    let said = host.configure_with(Some(twice)).await.unwrap_err().to_string();
    assert!(said.contains("gid_map") && said.contains("70000 100000 1"), "{said}");
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let (stdio, _io) = host.stdio(false, false);
    let said = host.create("c", &mapped(&root, "true"), stdio).await.unwrap_err().to_string();
    assert!(said.contains("linux.namespaces: user: the pod has no user namespace"), "{said}");
    assert_eq!(host.run("c", &spec(&root, &["true"]), b"").await.0, 0);
    host.vm.client.delete_container(context(), &request("c")).await.unwrap();
}
