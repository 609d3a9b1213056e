//! Pods with users of their own, which Kubernetes calls `hostUsers: false`.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use anyhow::{Result, ensure};
use harness::{Context, Test};
use serde_json::{Value, json};

use crate::SLEEPER;

pub(crate) const TESTS: &[Test] = &[
    Test::common("userns::containers_share_the_pods_users", shared_users),
    Test::common("userns::volumes_belong_to_who_they_should", volumes),
    Test::bulkhead("userns::a_mapping_without_root_is_refused", "runc says it in other words", without_root),
];

const FIRST: u32 = 100_000;

fn options(container: u32) -> Value {
    let ids = json!([{"container_id": container, "host_id": FIRST, "length": 65536}]);
    json!({"namespace_options": {"pid": 1, "userns_options": {"mode": 0, "uids": ids, "gids": ids}}})
}

fn mapped(config: &mut Value) {
    config["linux"]["security_context"] = options(0);
}

fn shared_users(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", mapped)?;
    let a = t.create_in(&pod, "a", SLEEPER, mapped)?;
    let b = t.create_in(&pod, "b", SLEEPER, mapped)?;
    for id in [&a, &b] {
        t.crictl_ok(&["start", id])?;
    }
    let seen = t.exec_in(&a, "tr -s ' ' < /proc/1/uid_map; cat /proc/self/gid_map | tr -s ' '; id -u")?;
    ensure!(seen.trim_start() == "0 100000 65536\n 0 100000 65536\n0", "saw {seen:?}");
    for kind in ["user", "net", "ipc", "uts"] {
        let look = format!("readlink /proc/1/ns/{kind}; readlink /proc/self/ns/{kind}");
        let (a, b) = (t.exec_in(&a, &look)?, t.exec_in(&b, &look)?);
        ensure!(a == b && a.lines().collect::<BTreeSet<_>>().len() == 1, "{kind}: {a} and {b}");
    }
    // The image, what is made in it, and what the pod has in /etc, belong to root.
    let owners =
        "touch /new; stat -c %u:%g / /bin/busybox /home/alice /new /etc/hosts /etc/resolv.conf /etc/hostname";
    let seen = t.exec_in(&a, owners)?;
    // containerd 1 maps the owners of no bind mount.
    let etc = if t.settings().is_containerd_1() { "65534:65534" } else { "0:0" };
    ensure!(seen == format!("0:0\n0:0\n1000:1000\n0:0\n{etc}\n{etc}\n{etc}"), "saw {seen:?}");
    ensure!(t.exec_in(&a, "hostname; echo note > /dev/shm/note")? == "p");
    ensure!(t.exec_in(&b, "cat /dev/shm/note")? == "note");
    // Its root may do in the pod's network what root may.
    let serve = "(echo hello | nc -l -p 80) >/dev/null 2>&1 & until netstat -ltn | grep -q ':80 '; do sleep 0.1; done";
    t.exec_in(&a, serve)?;
    ensure!(
        t.exec_in(&b, "nc 127.0.0.1 80 </dev/null; ping -c 1 127.0.0.1 >/dev/null && echo heard")?
            == "hello\nheard"
    );
    ensure!(t.exec_in(&b, "ip -4 -o addr show eth0 | grep -c '10.88.0.'")? == "1");
    t.remove_pod(&pod)
}

fn volumes(t: &mut Context<'_>) -> Result<()> {
    let volume = t.dir().join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("old"), "old")?;
    fs::set_permissions(volume.join("old"), fs::Permissions::from_mode(0o600))?;
    let pod = t.pod("p", mapped)?;
    let ids = json!([{"container_id": 0, "host_id": FIRST, "length": 65536}]);
    // As the kubelet says it.
    let a = t.create_in(&pod, "a", SLEEPER, |c| {
        mapped(c);
        c["mounts"] = json!([
            {"container_path": "/volume", "host_path": volume, "uidMappings": ids, "gidMappings": ids},
        ]);
    });
    if t.settings().is_containerd_1() {
        let refused = a.err().map(|e| format!("{e:#}")).unwrap_or_default();
        ensure!(refused.contains("idmap mounts not yet supported"), "{refused:?}");
        return t.remove_pod(&pod);
    }
    let a = a?;
    t.crictl_ok(&["start", &a])?;
    let script =
        "stat -c %u /volume /volume/old; cat /volume/old; touch /volume/new; chown 1000:2000 /volume/new";
    let seen = t.exec_in(&a, script)?;
    ensure!(seen == "0\n0\nold", "saw {seen:?}");
    let new = volume.join("new").metadata()?;
    ensure!((new.uid(), new.gid()) == (1000, 2000), "{}:{}", new.uid(), new.gid());
    t.remove_pod(&pod)
}

fn without_root(t: &mut Context<'_>) -> Result<()> {
    let config = t.pod_config("p", |p| p["linux"]["security_context"] = options(1))?;
    t.runp("p", &config)?.0.output()?.expect_failure()?.expect_stderr(&["uidMappings without id 0"])?;
    ensure!(t.crictl_ok(&["pods", "-q"])?.is_empty(), "it is not there");
    Ok(())
}
