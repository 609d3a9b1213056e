//! Statements D and I: cleaning up after a shim, and what the runtime is.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use harness::{Context, Run, Test};
use rustix::mount::{MountFlags, mount};
use serde_json::json;

use crate::fake::{Answer, Fake, Input};
use crate::task::{kill_shim, sleeper};

pub(crate) const TESTS: &[Test] = &[
    Test::common("d1_delete_answers_in_protobuf", d1_delete_answers_in_protobuf),
    Test::common(
        "d2_delete_unmounts_the_rootfs_and_succeeds_twice",
        d2_delete_unmounts_the_rootfs_and_succeeds_twice,
    ),
    Test::common("d2_delete_kills_what_a_dead_shim_left", d2_delete_kills_what_a_dead_shim_left),
    Test::common("d4_delete_where_start_never_ran", d4_delete_where_start_never_ran),
    Test::common("d4_delete_of_a_container_spares_the_pod", d4_delete_of_a_container_spares_the_pod),
    Test::common("i1_info_names_the_runtime", i1_info_names_the_runtime),
    Test::common("i2_features_are_json_of_the_right_type", i2_features_are_json_of_the_right_type),
];

fn run_delete(fake: &Fake, id: &str, bundle: &Path) -> Result<DeleteResponse> {
    let flag = bundle.display().to_string();
    let output = fake.binary(id, bundle, &["-bundle", &flag], "delete").output()?.ok()?;
    ensure!(output.took < Duration::from_secs(5), "containerd gives it 5 s\n{output}");
    DeleteResponse::parse_from_bytes(&output.stdout).with_context(|| format!("not protobuf\n{output}"))
}

fn d1_delete_answers_in_protobuf(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    let response = run_delete(&fake, "c", &bundle)?;
    ensure!(response.exit_status == 137, "{response:?}");
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs() as i64;
    let age = now - response.exited_at.seconds;
    ensure!((0..60).contains(&age), "it ended {age} s ago: {response:?}");
    Ok(())
}

fn d2_delete_unmounts_the_rootfs_and_succeeds_twice(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    mount("tmpfs", bundle.join("rootfs"), "tmpfs", MountFlags::empty(), None)?;
    std::fs::write(bundle.join("rootfs/precious"), "a file of the snapshot")?;
    for _ in 0..2 {
        ensure!(run_delete(&fake, "c", &bundle)?.exit_status == 137, "another status");
    }
    ensure!(bundle.join("rootfs").is_dir(), "the mount point is gone");
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo")?;
    ensure!(!mounts.contains("/b/c/rootfs "), "still mounted:\n{mounts}");
    Ok(())
}

fn d2_delete_kills_what_a_dead_shim_left(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &sleeper(t, "c")?)?;
    let shim = fake.shim("c", &bundle)?;
    shim.create("c", &bundle)?;
    shim.start("c", "")?;
    kill_shim(t, &shim)?;
    ensure!(run_delete(&fake, "c", &bundle)?.exit_status == 137, "another status");
    ensure!(run_delete(&fake, "c", &bundle)?.exit_status == 137, "another status the second time");
    Ok(())
}

fn d4_delete_where_start_never_ran(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = t.dir().join("empty");
    std::fs::create_dir(&bundle)?;
    ensure!(run_delete(&fake, "never-seen", &bundle)?.exit_status == 137, "another status");
    Ok(())
}

fn d4_delete_of_a_container_spares_the_pod(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let member = json!({ "annotations": { "io.kubernetes.cri.sandbox-id": "pod" } });
    let pod = fake.bundle("pod", &member)?;
    let input = Input::Bootstrap { socket_dir: None };
    let address = Answer::parse(&fake.run_start("pod", &pod, &input)?.ok()?)?.address;
    let shim = fake.connect(&address)?;
    let pid = shim.connect_rpc("pod")?.shim_pid;
    let container = fake.bundle("c1", &member)?;
    // As version 2 leaves it: start has run for the container, too.
    fake.run_start("c1", &container, &input)?.ok()?;
    run_delete(&fake, "c1", &container)?;
    ensure!(fake.connect(&address)?.connect_rpc("pod")?.shim_pid == pid, "the pod's shim is another");
    shim.shutdown("pod");
    Ok(())
}

fn info(t: &mut Context) -> Result<RuntimeInfo> {
    let fake = Fake::start(t)?;
    let output = Run::new(fake.shim_program()).arg("-info").env_clear().output()?.ok()?;
    ensure!(output.stderr.is_empty(), "{output}");
    RuntimeInfo::parse_from_bytes(&output.stdout).with_context(|| format!("not protobuf\n{output}"))
}

fn i1_info_names_the_runtime(t: &mut Context) -> Result<()> {
    let info = info(t)?;
    ensure!(info.name == "io.containerd.bulkhead.v2", "{info:?}");
    ensure!(!info.version.version.is_empty(), "{info:?}");
    Ok(())
}

fn i2_features_are_json_of_the_right_type(t: &mut Context) -> Result<()> {
    let info = info(t)?;
    let features = info.features.into_option().context("no features")?;
    ensure!(
        features.type_url == "types.containerd.io/opencontainers/runtime-spec/1/features/Features",
        "the type is {}",
        features.type_url
    );
    let value: serde_json::Value = serde_json::from_slice(&features.value)?;
    ensure!(value["ociVersionMin"].is_string() && value["ociVersionMax"].is_string(), "{value:#}");
    let namespaces = value["linux"]["namespaces"].as_array().context("no namespaces")?;
    for name in ["cgroup", "ipc", "mount", "network", "pid", "uts"] {
        ensure!(namespaces.iter().any(|n| n == name), "{name} is missing: {value:#}");
    }
    Ok(())
}
