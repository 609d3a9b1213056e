//! Statements D and I: cleaning up after a shim, and what the runtime is.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::{self, DeleteResponse};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedOutputStream, Message};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use harness::{Context, Run, Test};
use rustix::mount::{MountFlags, mount};
use serde_json::json;

use crate::fake::{Answer, Fake, Input};
use crate::task::{kill_shim, member, output_of, sleeper};

pub(crate) const TESTS: &[Test] = &[
    Test::common("d1_delete_answers_in_protobuf", d1_delete_answers_in_protobuf),
    Test::common(
        "d2_delete_unmounts_the_rootfs_and_succeeds_twice",
        d2_delete_unmounts_the_rootfs_and_succeeds_twice,
    ),
    Test::common("d2_delete_kills_what_a_dead_shim_left", d2_delete_kills_what_a_dead_shim_left),
    Test::common("d4_delete_in_an_empty_bundle", d4_delete_in_an_empty_bundle),
    Test::common("d4_delete_where_start_never_ran_spares_the_pod", |t| spares_the_pod(t, false)),
    Test::common("d4_delete_where_start_has_run_spares_the_pod", |t| spares_the_pod(t, true)),
    Test::common("i1_info_names_the_runtime", i1_info_names_the_runtime),
    Test::common("i1_info_takes_the_runtimes_options", i1_info_takes_the_runtimes_options),
    Test::common("i2_features_are_json_of_the_right_type", i2_features_are_json_of_the_right_type),
    Test::common("i3_no_mounts_are_asked_for_raw", i3_no_mounts_are_asked_for_raw),
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

fn d4_delete_in_an_empty_bundle(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = t.dir().join("empty");
    std::fs::create_dir(&bundle)?;
    ensure!(run_delete(&fake, "never-seen", &bundle)?.exit_status == 137, "another status");
    Ok(())
}

/// `delete` of a container of a live pod. containerd runs it where the container's connection is lost, and after
/// its restart: in a bundle where `start` has run with version 2 and has not with version 3.
fn spares_the_pod(t: &mut Context, start_has_run: bool) -> Result<()> {
    let fake = Fake::start(t)?;
    let pod = fake.bundle("pod", &member(t, "pod")?)?;
    let shim = fake.shim("pod", &pod)?;
    let pid = shim.connect_rpc("pod")?.shim_pid;
    let container = fake.bundle("c1", &member(t, "c1")?)?;
    let neighbour = fake.bundle("c2", &member(t, "c2")?)?;
    if start_has_run {
        let answer = fake.run_start("c1", &container, &Input::Bootstrap { socket_dir: None })?.ok()?;
        ensure!(Answer::parse(&answer)?.address == shim.address, "it is in no pod");
    }
    for (id, bundle) in [("pod", &pod), ("c1", &container), ("c2", &neighbour)] {
        shim.create(id, bundle)?;
        shim.start(id, "")?;
    }
    let boot = |exec: &str| output_of(t, &shim, "c2", exec, "cat /proc/sys/kernel/random/boot_id");
    let before = boot("e1")?;
    for _ in 0..2 {
        run_delete(&fake, "c1", &container)?;
    }
    ensure!(fake.connect(&shim.address)?.connect_rpc("pod")?.shim_pid == pid, "the pod's shim is another");
    for id in ["pod", "c2"] {
        let state = shim.state(id, "")?;
        ensure!(state.status.value() == api::Status::RUNNING as i32, "{id}: {state:?}");
    }
    ensure!(boot("e2")? == before, "the pod's machine is another");
    for id in ["c1", "c2", "pod"] {
        shim.end(id)?;
    }
    Ok(())
}

/// `-info`, which gets `stdin` to read.
fn info(t: &mut Context, stdin: &[u8]) -> Result<RuntimeInfo> {
    let fake = Fake::start(t)?;
    let mut asked = Run::new(fake.shim_program()).arg("-info").env_clear().stdin_open().spawn()?;
    asked.write_stdin(stdin)?;
    asked.close_stdin();
    let output = asked.wait()?.ok()?;
    ensure!(output.stderr.is_empty(), "{output}");
    RuntimeInfo::parse_from_bytes(&output.stdout).with_context(|| format!("not protobuf\n{output}"))
}

fn i1_info_names_the_runtime(t: &mut Context) -> Result<()> {
    let info = info(t, &[])?;
    ensure!(info.name == "io.containerd.bulkhead.v2", "{info:?}");
    ensure!(!info.version.version.is_empty(), "{info:?}");
    Ok(())
}

/// CRI writes what its configuration has for the runtime. More than a pipe holds: who does not read it breaks it.
fn i1_info_takes_the_runtimes_options(t: &mut Context) -> Result<()> {
    let mut value = Vec::new();
    let mut options = CodedOutputStream::vec(&mut value);
    // containerd's api/types/runtimeoptions/v1/api.proto, which no crate has: config_body.
    options.write_string(3, &"# a table of options\n".repeat(10_000))?;
    options.flush()?;
    drop(options);
    let any = Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Default::default() };
    let told = info(t, &any.write_to_bytes()?)?;
    let usual = info(t, &[])?;
    ensure!(told == usual, "with options it is {told:?}, without {usual:?}");
    Ok(())
}

/// Where it is named, containerd leaves mounts of these types to the shim, which mounts what the kernel knows.
fn i3_no_mounts_are_asked_for_raw(t: &mut Context) -> Result<()> {
    let info = info(t, &[])?;
    ensure!(!info.annotations.contains_key("containerd.io/runtime-allow-mounts"), "{info:?}");
    Ok(())
}

fn i2_features_are_json_of_the_right_type(t: &mut Context) -> Result<()> {
    let info = info(t, &[])?;
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
