//! The life of a pod and of its containers, and what containers of one pod share.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use harness::{
    BY_PATH, BY_PATH_AND_API, Context, OPTIONS_MEMORY_MIB, Pod, Run, Test, WITH_OPTIONS, WITH_OPTIONS_AND_API,
};
use serde_json::{Value, json};

use crate::SLEEPER;

pub(crate) const TESTS: &[Test] = &[
    Test::common("pod::an_empty_pod_is_ready_and_goes", empty),
    Test::common("pod::two_containers_run_log_and_end", two_containers),
    Test::common("pod::containers_share_ipc_name_and_memory_but_not_processes", shared),
    Test::common("pod::containers_share_processes_where_asked", shared_processes),
    Test::common("pod::a_container_is_made_again_after_its_end", again),
    Test::common("pod::removing_it_takes_running_containers_with_it", removed_by_force),
    Test::common("pod::sysctls_hold_in_every_container", sysctls),
    Test::common("pod::etc_files_tell_the_pods_name_and_servers", etc_files),
    Test::common("pod::a_name_is_taken_once", name_taken),
    Test::bulkhead("pod::n4_a_runtime_path_names_the_program", OWN_HANDLER, by_path)
        .unless(|s| (s.handler != "bulkhead-podsandbox").then_some(ITS_OWN)),
    Test::bulkhead("pod::n4_by_the_sandbox_api_only_the_type_does", OWN_HANDLER, by_path_and_api)
        .unless(|s| (s.handler != "bulkhead").then_some(ITS_OWN)),
    Test::bulkhead("pod::each_place_of_a_value_overrides_the_one_before", OWN_HANDLER, places_of_a_value),
];

pub(crate) fn inspect(t: &Context<'_>, verb: &str, id: &str) -> Result<Value> {
    Ok(serde_json::from_str(&t.crictl_ok(&[verb, id])?)?)
}

fn empty(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let status = inspect(t, "inspectp", &pod.id)?;
    ensure!(status["status"]["state"] == "SANDBOX_READY", "{status}");
    ensure!(
        status["status"]["network"]["ip"].as_str().is_some_and(|ip| ip.starts_with("10.88.0.")),
        "{status}"
    );
    t.crictl_ok(&["stopp", &pod.id])?;
    let status = inspect(t, "inspectp", &pod.id)?;
    ensure!(status["status"]["state"] == "SANDBOX_NOTREADY", "{status}");
    // As often as somebody likes.
    t.crictl_ok(&["stopp", &pod.id])?;
    t.crictl_ok(&["rmp", &pod.id])?;
    ensure!(t.crictl_ok(&["pods", "-q"])?.is_empty());
    Ok(())
}

fn two_containers(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let script = |name: &str| format!("echo hello from {name}; trap 'exit 3' TERM; sleep 1000 & wait");
    let a = t.run_in(&pod, "a", &script("a"))?;
    let b = t.run_in(&pod, "b", &script("b"))?;
    let running = t.crictl_ok(&["ps", "-q"])?;
    ensure!(running.lines().count() == 2, "{running}");
    for (id, name) in [(&a, "a"), (&b, "b")] {
        ensure!(t.exec_in(id, "echo $((6 * 7))")? == "42");
        ensure!(t.crictl_ok(&["logs", id])? == format!("hello from {name}"));
    }
    t.crictl_ok(&["stop", "--timeout", "60", &a])?;
    let status = inspect(t, "inspect", &a)?;
    ensure!(status["status"]["state"] == "CONTAINER_EXITED", "{status}");
    ensure!(status["status"]["exitCode"] == 3, "{status}");
    ensure!(t.exec_in(&b, "echo still here")? == "still here", "its neighbour's end is not its own");
    t.crictl_ok(&["rm", &a])?;
    t.remove_pod(&pod)
}

fn shared(t: &mut Context<'_>) -> Result<()> {
    // As the kubelet says it: processes of each container for itself (CONTAINER), the rest of the pod.
    let options = json!({"namespace_options": {"pid": 1}});
    let pod = t.pod("p", |p| p["linux"]["security_context"] = options.clone())?;
    let own = |c: &mut Value| c["linux"]["security_context"] = options.clone();
    let a = t.create_in(&pod, "a", SLEEPER, own)?;
    let b = t.create_in(&pod, "b", SLEEPER, own)?;
    for id in [&a, &b] {
        t.crictl_ok(&["start", id])?;
    }
    let of = |kind: &str| -> Result<(String, String)> {
        let look = format!("readlink /proc/1/ns/{kind}");
        Ok((t.exec_in(&a, &look)?, t.exec_in(&b, &look)?))
    };
    for kind in ["net", "ipc", "uts"] {
        let (a, b) = of(kind)?;
        ensure!(a == b, "{kind}: {a} and {b}");
    }
    for kind in ["pid", "mnt"] {
        let (a, b) = of(kind)?;
        ensure!(a != b, "{kind}: both have {a}");
    }
    ensure!(t.exec_in(&a, "hostname")? == "p" && t.exec_in(&b, "hostname")? == "p");
    t.exec_in(&a, "echo note > /dev/shm/note")?;
    ensure!(t.exec_in(&b, "cat /dev/shm/note")? == "note");
    let size = t.exec_in(&b, "df -k /dev/shm | tail -n 1 | awk '{ print $2 }'")?;
    ensure!(size == "65536", "{size}");
    t.remove_pod(&pod)
}

fn shared_processes(t: &mut Context<'_>) -> Result<()> {
    let options = json!({"namespace_options": {"pid": 0}});
    let pod = t.pod("p", |p| p["linux"]["security_context"] = options.clone())?;
    let with_pods = |c: &mut Value| c["linux"]["security_context"] = options.clone();
    let a = t.create_in(&pod, "a", "sleep 4321 & wait", with_pods)?;
    let b = t.create_in(&pod, "b", SLEEPER, with_pods)?;
    for id in [&a, &b] {
        t.crictl_ok(&["start", id])?;
    }
    let seen = t.exec_in(&b, "ps -o pid,args")?;
    ensure!(seen.contains("sleep 4321") && seen.contains("sleep 1000"), "{seen}");
    // The namespace outlives each of them.
    t.crictl_ok(&["stop", "--timeout", "0", &a])?;
    let seen = t.exec_in(&b, "ps -o pid,args")?;
    ensure!(!seen.contains("sleep 4321") && seen.contains("sleep 1000"), "{seen}");
    t.remove_pod(&pod)
}

fn again(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    for attempt in 0..3 {
        let id = t.create_in(&pod, "a", SLEEPER, |c| c["metadata"]["attempt"] = attempt.into())?;
        t.crictl_ok(&["start", &id])?;
        t.crictl_ok(&["stop", "--timeout", "60", &id])?;
        t.crictl_ok(&["rm", &id])?;
    }
    t.remove_pod(&pod)
}

fn removed_by_force(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    t.run_in(&pod, "a", "sleep 1000")?;
    t.create_in(&pod, "b", SLEEPER, |_| {})?;
    t.crictl_ok(&["rmp", "--force", &pod.id])?;
    Ok(())
}

fn sysctls(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |p| {
        p["linux"]["sysctls"] = json!({"kernel.shm_rmid_forced": "1", "net.ipv4.ip_forward": "1"});
    })?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    let read =
        "cd /proc/sys && cat kernel/shm_rmid_forced net/ipv4/ip_forward net/ipv4/ip_unprivileged_port_start";
    let (seen, expected) = (t.exec_in(&a, read)?, if t.settings().is_containerd_1() { "1024" } else { "0" });
    ensure!(seen == format!("1\n1\n{expected}"), "{seen}");
    t.remove_pod(&pod)
}

fn etc_files(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |p| {
        p["dns_config"] =
            json!({"servers": ["192.0.2.53"], "searches": ["pods.example"], "options": ["ndots:3"]});
    })?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    ensure!(t.exec_in(&a, "cat /etc/hostname")? == "p");
    let resolv = t.exec_in(&a, "cat /etc/resolv.conf")?;
    for line in ["nameserver 192.0.2.53", "search pods.example", "options ndots:3"] {
        ensure!(resolv.lines().any(|l| l == line), "{resolv}");
    }
    ensure!(t.exec_in(&a, "grep -c localhost /etc/hosts")? != "0");
    t.remove_pod(&pod)
}

fn name_taken(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let config = t.pod_config("p", |_| {})?;
    t.runp("p", &config)?.0.output()?.expect_failure()?.expect_stderr(&["reserved"])?;
    t.remove_pod(&pod)
}

const OWN_HANDLER: &str = "the program is bulkhead's";
const ITS_OWN: &str = "it has a handler of its own, which is tried beside the one of its kind";

/// `crictl runp` with a handler of its own, not yet started; `change` alters the pod's configuration.
fn runp_with(t: &Context<'_>, handler: &str, change: impl FnOnce(&mut Value)) -> Result<(Run, PathBuf)> {
    let path = t.write("p.json", t.pod_config("p", change)?.to_string())?;
    Ok((t.crictl()?.args(["runp", "--runtime", handler]).arg(&path), path))
}

fn by_path(t: &mut Context<'_>) -> Result<()> {
    let (run, config) = runp_with(t, BY_PATH, |_| {})?;
    let pod = Pod::made(run.output()?.ok()?.out(), config);
    let a = t.run_in(&pod, "a", SLEEPER)?;
    ensure!(t.exec_in(&a, "echo $((6 * 7))")? == "42");
    t.remove_pod(&pod)
}

fn by_path_and_api(t: &mut Context<'_>) -> Result<()> {
    let output = runp_with(t, BY_PATH_AND_API, |_| {})?.0.output()?.expect_failure()?;
    output.expect_stderr(&["io.containerd.elsewhere.v2", "containerd-shim-elsewhere-v2"])?;
    Ok(())
}

/// The file, containerd's options of the handler, the pod's annotation.
fn places_of_a_value(t: &mut Context<'_>) -> Result<()> {
    let (of_the_file, of_the_pod, reserve) = (300, 500, 100);
    t.set_config("sandbox", "memory_mib", of_the_file.into())?;
    t.set_config("sandbox", "memory_reserve_mib", reserve.into())?;
    t.set_config("annotations", "allowed", vec!["sandbox.memory_mib"].into())?;
    let usual = t.settings().handler.clone();
    let options = if usual == "bulkhead" && !t.settings().is_containerd_1() {
        WITH_OPTIONS_AND_API
    } else {
        WITH_OPTIONS
    };
    let annotated = json!({ "io.bulkhead.sandbox.memory_mib": of_the_pod.to_string() });
    let places = [
        (usual.as_str(), Value::Null, of_the_file),
        (options, Value::Null, OPTIONS_MEMORY_MIB as i64),
        (options, annotated, of_the_pod),
    ];
    for (handler, annotations, wanted) in places {
        let (run, config) = runp_with(t, handler, |p| p["annotations"] = annotations.clone())?;
        let pod = Pod::made(run.output()?.ok()?.out(), config);
        let pods: Value =
            serde_json::from_str(&t.bulkhead(&["ps", "--output", "json"])?.output()?.ok()?.out())?;
        let size = &pods[0]["memory_mib"];
        ensure!(
            *size == wanted + reserve,
            "{handler} with {annotations}: {size} MiB, wanted {wanted} + {reserve}"
        );
        t.remove_pod(&pod)?;
    }
    Ok(())
}
