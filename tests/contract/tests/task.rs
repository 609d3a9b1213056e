//! Statements T and M: the task service.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::Code;
use harness::{Context, Run, Test, signal_process, wait_for_exit};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::fake::{Answer, Failure, Fake, Input, Shim, V2, V3};

pub(crate) const TESTS: &[Test] = &[
    Test::common("m6_the_rootfs_is_mounted_and_unmounted", m6_the_rootfs_is_mounted_and_unmounted),
    Test::common("t1_both_versions_on_one_socket", t1_both_versions_on_one_socket),
    Test::common("t2_a_whole_life_by_version_2", t2_a_whole_life_by_version_2),
    Test::common("t3_containers_of_a_pod_share_a_machine", t3_containers_of_a_pod_share_a_machine),
    Test::common("t4_shutdown_is_refused_while_tasks_remain", t4_shutdown_is_refused_while_tasks_remain),
    Test::common("t4_shutdown_of_the_last_ends_the_shim", t4_shutdown_of_the_last_ends_the_shim),
    Test::common("t4_shutdown_before_the_first_ends_the_shim", t4_shutdown_before_the_first_ends_the_shim),
    Test::common("t6_create_gives_a_pid_that_connect_repeats", t6_create_gives_a_pid_that_connect_repeats),
    Test::common("t6_create_under_a_taken_id", t6_create_under_a_taken_id),
    Test::common("t6_a_failed_create_leaves_nothing", t6_a_failed_create_leaves_nothing),
    Test::common("t7_unknown_ids_are_not_found", t7_unknown_ids_are_not_found),
    Test::common("t7_connect_succeeds_for_an_unknown_id", t7_connect_succeeds_for_an_unknown_id),
    Test::common("t8_pids_of_a_live_task", t8_pids_of_a_live_task),
    Test::common("t9_state_tells_the_life", t9_state_tells_the_life),
    Test::common("t10_wait_answers_many", t10_wait_answers_many),
    Test::common("t10_kill_after_exit_is_not_found", t10_kill_after_exit_is_not_found),
    Test::common("t10_delete_of_a_running_task_is_refused", t10_delete_of_a_running_task_is_refused),
    Test::common("t10_a_taken_exec_id", t10_a_taken_exec_id),
    Test::common("t10_exec_after_exit_is_refused", t10_exec_after_exit_is_refused),
    Test::common("t10_checkpoint_is_unimplemented", t10_checkpoint_is_unimplemented),
    Test::common("t10_a_kill_during_create_is_answered", t10_a_kill_during_create_is_answered),
    Test::common("t10_a_delete_during_create_is_answered", t10_a_delete_during_create_is_answered),
    Test::common("t11_stats_are_of_cgroups_v2", t11_stats_are_of_cgroups_v2),
    Test::common("t12_update_changes_the_limits", t12_update_changes_the_limits),
    Test::common("t13_exit_status", t13_exit_status),
    Test::common("t13_a_machine_that_dies_is_no_success", t13_a_machine_that_dies_is_no_success),
];

/// A container that runs until it is ended.
pub(crate) fn sleeper(t: &Context, id: &str) -> Result<Value> {
    t.spec(id, &["sh", "-c", "trap 'exit 0' TERM; sleep 1000 & wait"])
}

/// The same in the pod `pod`, whose pause container has its name.
pub(crate) fn member(t: &Context, id: &str) -> Result<Value> {
    let mut spec = sleeper(t, id)?;
    let kind = if id == "pod" { "sandbox" } else { "container" };
    spec["annotations"] =
        json!({ "io.kubernetes.cri.sandbox-id": "pod", "io.kubernetes.cri.container-type": kind });
    Ok(spec)
}

/// Kills the shim behind a connection with SIGKILL, and waits until it is gone.
pub(crate) fn kill_shim(t: &Context, shim: &Shim) -> Result<()> {
    let pid = shim.connect_rpc("any")?.shim_pid;
    let fd = signal_process(pid, Signal::KILL, |pid| t.processes().iter().any(|p| p.pid == pid))?;
    wait_for_exit(&fd, Duration::from_secs(10))
}

/// A running container, for what is then done with it; it is ended afterwards.
fn with_running(
    t: &mut Context,
    spec: impl FnOnce(&Context) -> Result<Value>,
    check: impl FnOnce(&Context, &Fake, &Shim) -> Result<()>,
) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &spec(t)?)?;
    let shim = fake.shim("c", &bundle)?;
    shim.create("c", &bundle)?;
    shim.start("c", "")?;
    check(t, &fake, &shim)?;
    shim.end("c")
}

/// What a command prints inside a running container.
pub(crate) fn output_of(t: &Context, shim: &Shim, id: &str, exec: &str, script: &str) -> Result<String> {
    let fifo = t.dir().join(format!("out-{id}-{exec}"));
    Run::new("mkfifo").arg(&fifo).output()?.ok()?;
    let reader = Run::new("cat").arg(&fifo).deadline(60).spawn()?;
    shim.exec_to(id, exec, &["sh", "-c", script], &fifo.display().to_string())?;
    shim.start(id, exec)?;
    shim.wait(id, exec)?;
    let text = reader.wait()?.ok()?.out();
    shim.delete(id, exec)?;
    Ok(text)
}

fn m6_the_rootfs_is_mounted_and_unmounted(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let root = t.rootfs()?;
    let mut spec = t.spec("c", &["sh", "-c", "echo written > /made; exit 31"])?;
    spec["root"]["path"] = json!("rootfs");
    let bundle = fake.bundle("c", &spec)?;
    let shim = fake.shim("c", &bundle)?;
    let mount = api::Mount {
        type_: "bind".into(),
        source: root.display().to_string(),
        options: vec!["rbind".into(), "rw".into()],
        ..Default::default()
    };
    let request = api::CreateTaskRequest {
        id: "c".into(),
        bundle: bundle.display().to_string(),
        rootfs: vec![mount],
        ..Default::default()
    };
    shim.call::<api::CreateTaskResponse>("Create", &request)?;
    shim.start("c", "")?;
    ensure!(shim.wait("c", "")? == 31, "another status");
    shim.delete("c", "")?;
    shim.shutdown("c");
    ensure!(std::fs::read_to_string(root.join("made"))? == "written\n", "not written to the mounted root");
    let empty = std::fs::read_dir(bundle.join("rootfs"))?.next().is_none();
    ensure!(empty, "bundle/rootfs is still mounted, or was filled");
    Ok(())
}

fn t1_both_versions_on_one_socket(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    let shim = fake.shim("c", &bundle)?;
    let request = api::ConnectRequest { id: "c".into(), ..Default::default() };
    let mut pids = Vec::new();
    for service in [V2, V3] {
        let call = shim.request::<api::ConnectResponse>(service, "Connect", &request);
        pids.push(fake.block_on(call).with_context(|| service)?.shim_pid);
    }
    shim.shutdown("c");
    ensure!(pids[0] == pids[1] && pids[0] > 1, "{pids:?}");
    Ok(())
}

/// Where containerd falls back all calls are of version 2, to a shim that has said 3.
fn t2_a_whole_life_by_version_2(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &t.spec("c", &["sh", "-c", "exit 5"])?)?;
    let shim = fake.shim("c", &bundle)?;
    let id = || "c".to_string();
    let create =
        api::CreateTaskRequest { id: id(), bundle: bundle.display().to_string(), ..Default::default() };
    let pid = fake.block_on(shim.request::<api::CreateTaskResponse>(V2, "Create", &create))?.pid;
    let connect = api::ConnectRequest { id: id(), ..Default::default() };
    let connected = fake.block_on(shim.request::<api::ConnectResponse>(V2, "Connect", &connect))?;
    ensure!(pid > 0 && connected.task_pid == pid, "{connected:?}, created was {pid}");
    let start = api::StartRequest { id: id(), ..Default::default() };
    fake.block_on(shim.request::<api::StartResponse>(V2, "Start", &start))?;
    let wait = api::WaitRequest { id: id(), ..Default::default() };
    let ended = fake.block_on(shim.request::<api::WaitResponse>(V2, "Wait", &wait))?;
    ensure!(ended.exit_status == 5, "{ended:?}");
    let delete = api::DeleteRequest { id: id(), ..Default::default() };
    let deleted = fake.block_on(shim.request::<api::DeleteResponse>(V2, "Delete", &delete))?;
    ensure!(deleted.exit_status == 5 && deleted.pid == pid, "{deleted:?}");
    let shutdown = api::ShutdownRequest { id: id(), ..Default::default() };
    fake.block_on(shim.request::<api::Empty>(V2, "Shutdown", &shutdown)).ok();
    Ok(())
}

fn t3_containers_of_a_pod_share_a_machine(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let pod = fake.bundle("pod", &member(t, "pod")?)?;
    let shim = fake.shim("pod", &pod)?;
    shim.create("pod", &pod)?;
    shim.start("pod", "")?;
    let bundle = fake.bundle("c1", &member(t, "c1")?)?;
    // Version 3: one more connection, no start.
    let second = fake.connect(&shim.address)?;
    second.create("c1", &bundle)?;
    second.start("c1", "")?;
    let bundle = fake.bundle("c2", &member(t, "c2")?)?;
    second.create("c2", &bundle)?;
    second.start("c2", "")?;
    let boot = |id: &str| output_of(t, &shim, id, "e", "cat /proc/sys/kernel/random/boot_id");
    ensure!(boot("c1")? == boot("c2")?, "each has a machine of its own");
    for id in ["c1", "c2"] {
        second.kill(id, "", 9)?;
        ensure!(second.wait(id, "")? == 137, "another status");
        second.delete(id, "")?;
        second.shutdown(id);
    }
    ensure!(
        shim.state("pod", "")?.status.value() == api::Status::RUNNING as i32,
        "the pod went with its container"
    );
    shim.end("pod")
}

fn t4_shutdown_is_refused_while_tasks_remain(t: &mut Context) -> Result<()> {
    with_running(
        t,
        |t| sleeper(t, "c"),
        |_, _, shim| {
            shim.shutdown("c");
            ensure!(shim.state("c", "")?.status.value() == api::Status::RUNNING as i32, "the task is gone");
            Ok(())
        },
    )
}

/// Shutdown has to end the shim of `bundle`, after `life`.
fn shutdown_ends(fake: &Fake, bundle: &Path, life: impl FnOnce(&Shim) -> Result<()>) -> Result<()> {
    let answer = Answer::parse(&fake.run_start("c", bundle, &Input::Bootstrap { socket_dir: None })?.ok()?)?;
    let shim = fake.connect(&answer.address)?;
    let pid = shim.connect_rpc("c")?.shim_pid;
    let fd = signal_process(pid, Signal::CONT, |_| true)?;
    life(&shim)?;
    ensure!(shim.connect_rpc("c")?.shim_pid == pid, "it has not waited for Shutdown");
    shim.shutdown("c");
    wait_for_exit(&fd, Duration::from_secs(10))?;
    ensure!(!answer.socket().exists(), "its socket is still there");
    Ok(())
}

fn t4_shutdown_of_the_last_ends_the_shim(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &t.spec("c", &["true"])?)?;
    shutdown_ends(&fake, &bundle, |shim| {
        shim.create("c", &bundle)?;
        shim.start("c", "")?;
        ensure!(shim.wait("c", "")? == 0, "another status");
        shim.delete("c", "")?;
        Ok(())
    })
}

fn t4_shutdown_before_the_first_ends_the_shim(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    shutdown_ends(&fake, &bundle, |_| Ok(()))
}

fn t6_create_gives_a_pid_that_connect_repeats(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &sleeper(t, "c")?)?;
    let shim = fake.shim("c", &bundle)?;
    // All three streams empty: no stdio at all (C10).
    let pid = shim.create("c", &bundle)?;
    ensure!(pid > 0, "pid 0");
    let connected = shim.connect_rpc("c")?;
    ensure!(connected.task_pid == pid && connected.shim_pid > 1, "{connected:?}");
    ensure!(shim.start("c", "")? == pid, "Start says another pid");
    shim.end("c")
}

fn t6_create_under_a_taken_id(t: &mut Context) -> Result<()> {
    with_running(
        t,
        |t| sleeper(t, "c"),
        |t, _, shim| {
            let bundle = t.dir().join("b/c").display().to_string();
            let request = api::CreateTaskRequest { id: "c".into(), bundle, ..Default::default() };
            shim.refused("Create", &request, Code::ALREADY_EXISTS)?;
            Ok(())
        },
    )
}

fn t6_a_failed_create_leaves_nothing(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &t.spec("c", &["/no/such/program"])?)?;
    let shim = fake.shim("c", &bundle)?;
    let failure = match shim.create("c", &bundle) {
        Err(failure) => failure,
        Ok(_) => shim.start("c", "").err().context("neither Create nor Start has failed")?,
    };
    ensure!(failure.message.contains("/no/such/program"), "{failure}");
    // containerd then asks for a deletion, which may say that there is nothing.
    shim.delete("c", "").ok();
    shim.shutdown("c");
    Ok(())
}

fn t7_unknown_ids_are_not_found(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    let shim = fake.shim("c", &bundle)?;
    let id = || "nobody".to_string();
    let check = |method: &str, message: &dyn containerd_shim_protos::protobuf::MessageDyn| {
        shim.refused(method, message, Code::NOT_FOUND).map(|_| ())
    };
    check("State", &api::StateRequest { id: id(), ..Default::default() })?;
    check("Start", &api::StartRequest { id: id(), ..Default::default() })?;
    check("Delete", &api::DeleteRequest { id: id(), ..Default::default() })?;
    check("Pids", &api::PidsRequest { id: id(), ..Default::default() })?;
    check("Pause", &api::PauseRequest { id: id(), ..Default::default() })?;
    check("Resume", &api::ResumeRequest { id: id(), ..Default::default() })?;
    check("Kill", &api::KillRequest { id: id(), signal: 9, ..Default::default() })?;
    check("ResizePty", &api::ResizePtyRequest { id: id(), ..Default::default() })?;
    check("CloseIO", &api::CloseIORequest { id: id(), stdin: true, ..Default::default() })?;
    check("Wait", &api::WaitRequest { id: id(), ..Default::default() })?;
    check("Stats", &api::StatsRequest { id: id(), ..Default::default() })?;
    let process = Any { value: br#"{"args":["true"],"cwd":"/"}"#.to_vec(), ..Default::default() };
    let exec = api::ExecProcessRequest {
        id: id(),
        exec_id: "e".into(),
        spec: MessageField::some(process),
        ..Default::default()
    };
    check("Exec", &exec)?;
    let resources = Any { value: b"{}".to_vec(), ..Default::default() };
    check(
        "Update",
        &api::UpdateTaskRequest { id: id(), resources: MessageField::some(resources), ..Default::default() },
    )?;
    shim.shutdown("c");
    Ok(())
}

fn t7_connect_succeeds_for_an_unknown_id(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    let shim = fake.shim("c", &bundle)?;
    let connected = shim.connect_rpc("nobody")?;
    shim.shutdown("c");
    ensure!(connected.shim_pid > 1 && connected.task_pid == 0, "{connected:?}");
    Ok(())
}

fn t8_pids_of_a_live_task(t: &mut Context) -> Result<()> {
    let script = "sleep 1000 & sleep 1000 & wait";
    with_running(
        t,
        |t| t.spec("c", &["sh", "-c", script]),
        |t, _, shim| {
            // Its children may come a moment later: an exec that sees them is the sign.
            output_of(t, shim, "c", "e", "until [ $(pidof sleep | wc -w) = 2 ]; do :; done")?;
            let pids: api::PidsResponse =
                shim.call("Pids", &api::PidsRequest { id: "c".into(), ..Default::default() })?;
            ensure!(pids.processes.len() == 3, "three processes run: {:?}", pids.processes);
            ensure!(pids.processes.iter().all(|p| p.pid > 0), "{:?}", pids.processes);
            Ok(())
        },
    )
}

fn t9_state_tells_the_life(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &t.spec("c", &["sh", "-c", "trap 'exit 19' TERM; sleep 1000 & wait"])?)?;
    let shim = fake.shim("c", &bundle)?;
    let status = |shim: &Shim| -> Result<i32> { Ok(shim.state("c", "")?.status.value()) };
    let pid = shim.create("c", &bundle)?;
    ensure!(status(&shim)? == api::Status::CREATED as i32, "not created");
    shim.start("c", "")?;
    let state = shim.state("c", "")?;
    ensure!(state.status.value() == api::Status::RUNNING as i32 && state.pid == pid, "{state:?}");
    ensure!(state.id == "c" && state.bundle == bundle.display().to_string(), "{state:?}");
    shim.call::<api::Empty>("Pause", &api::PauseRequest { id: "c".into(), ..Default::default() })?;
    ensure!(status(&shim)? == api::Status::PAUSED as i32, "not paused");
    shim.call::<api::Empty>("Resume", &api::ResumeRequest { id: "c".into(), ..Default::default() })?;
    ensure!(status(&shim)? == api::Status::RUNNING as i32, "not running");
    // The shell has set its trap when a second process of the container can be seen.
    let pids = api::PidsRequest { id: "c".into(), ..Default::default() };
    while shim.call::<api::PidsResponse>("Pids", &pids)?.processes.len() < 2 {}
    shim.kill("c", "", 15)?;
    ensure!(shim.wait("c", "")? == 19, "another status");
    let state = shim.state("c", "")?;
    ensure!(state.status.value() == api::Status::STOPPED as i32 && state.exit_status == 19, "{state:?}");
    let deleted = shim.delete("c", "")?;
    ensure!(deleted.exit_status == 19 && deleted.pid == pid, "{deleted:?}");
    let gone = shim.state("c", "").err().context("there is a state after the deletion")?;
    ensure!(gone.code == Code::NOT_FOUND, "{gone}");
    shim.shutdown("c");
    Ok(())
}

fn t10_wait_answers_many(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &sleeper(t, "c")?)?;
    let shim = fake.shim("c", &bundle)?;
    shim.create("c", &bundle)?;
    let before: Vec<_> = (0..3).map(|_| shim.wait_later("c", "")).collect();
    shim.start("c", "")?;
    let other = fake.connect(&shim.address)?;
    let running: Vec<_> = (0..3).map(|_| other.wait_later("c", "")).collect();
    shim.kill("c", "", 9)?;
    for call in before.into_iter().chain(running).chain([shim.wait_later("c", "")]) {
        ensure!(fake.block_on(call)? == 137, "another status");
    }
    shim.delete("c", "")?;
    shim.shutdown("c");
    Ok(())
}

fn t10_kill_after_exit_is_not_found(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &t.spec("c", &["true"])?)?;
    let shim = fake.shim("c", &bundle)?;
    shim.create("c", &bundle)?;
    shim.start("c", "")?;
    ensure!(shim.wait("c", "")? == 0, "another status");
    shim.refused(
        "Kill",
        &api::KillRequest { id: "c".into(), signal: 9, ..Default::default() },
        Code::NOT_FOUND,
    )?;
    shim.delete("c", "")?;
    shim.shutdown("c");
    Ok(())
}

fn t10_delete_of_a_running_task_is_refused(t: &mut Context) -> Result<()> {
    with_running(
        t,
        |t| sleeper(t, "c"),
        |_, _, shim| {
            let request = api::DeleteRequest { id: "c".into(), ..Default::default() };
            shim.refused("Delete", &request, Code::FAILED_PRECONDITION)?;
            shim.exec("c", "e", &["sleep", "1000"])?;
            shim.start("c", "e")?;
            let request = api::DeleteRequest { id: "c".into(), exec_id: "e".into(), ..Default::default() };
            shim.refused("Delete", &request, Code::FAILED_PRECONDITION)?;
            Ok(())
        },
    )
}

fn t10_a_taken_exec_id(t: &mut Context) -> Result<()> {
    with_running(
        t,
        |t| sleeper(t, "c"),
        |_, _, shim| {
            shim.exec("c", "e", &["true"])?;
            let again = shim.exec("c", "e", &["true"]).err().context("the id was taken twice")?;
            ensure!(again.code == Code::ALREADY_EXISTS, "{again}");
            Ok(())
        },
    )
}

fn t10_exec_after_exit_is_refused(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &t.spec("c", &["true"])?)?;
    let shim = fake.shim("c", &bundle)?;
    shim.create("c", &bundle)?;
    shim.start("c", "")?;
    shim.wait("c", "")?;
    let failure = shim.exec("c", "e", &["true"]).err().context("an exec in an ended container")?;
    ensure!(failure.code == Code::FAILED_PRECONDITION, "{failure}");
    shim.delete("c", "")?;
    shim.shutdown("c");
    Ok(())
}

fn t10_checkpoint_is_unimplemented(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    let shim = fake.shim("c", &bundle)?;
    let request = api::CheckpointTaskRequest { id: "c".into(), ..Default::default() };
    let told = shim.refused("Checkpoint", &request, Code::UNIMPLEMENTED);
    shim.shutdown("c");
    told.map(|_| ())
}

/// Create of the container `c`, not waited for.
fn create_later(
    shim: &Shim,
    bundle: &Path,
) -> impl Future<Output = Result<api::CreateTaskResponse, Failure>> + use<> {
    let request =
        api::CreateTaskRequest { id: "c".into(), bundle: bundle.display().to_string(), ..Default::default() };
    shim.request(V3, "Create", &request)
}

/// State, Kill and Delete never depend on a healthy guest: while it boots they are answered, before Create is.
fn t10_a_kill_during_create_is_answered(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &sleeper(t, "c")?)?;
    let shim = fake.shim("c", &bundle)?;
    let state = shim.request::<api::StateResponse>(
        V3,
        "State",
        &api::StateRequest { id: "c".into(), ..Default::default() },
    );
    let kill = shim.request::<api::Empty>(
        V3,
        "Kill",
        &api::KillRequest { id: "c".into(), signal: 9, ..Default::default() },
    );
    let create = create_later(&shim, &bundle);
    let wait = shim.wait_later("c", "");
    let state = fake.block_on(async {
        let mut create = std::pin::pin!(create);
        let questions = async {
            let state = state.await?;
            kill.await?;
            anyhow::Ok(state)
        };
        // Create is the first of them that is sent, and so the first that the shim reads.
        let state = tokio::select! {
            biased;
            _ = &mut create => anyhow::bail!("Create was answered before questions that need no guest"),
            state = tokio::time::timeout(Duration::from_secs(5), questions) => state??,
        };
        create.await?;
        Ok(state)
    })?;
    ensure!(state.status.value() == api::Status::CREATED as i32 && state.pid == 0, "{state:?}");
    // The guest had nothing to kill then; it was not forgotten.
    ensure!(fake.block_on(wait)? == 137, "another status");
    shim.delete("c", "")?;
    shim.shutdown("c");
    fake.wait_event("delete c", 10)?;
    ensure!(fake.story() == ["create c", "exit c 137", "delete c"], "the events were {:?}", fake.story());
    Ok(())
}

/// The deletion of what is being created ends its creation, which else would succeed a moment later.
fn t10_a_delete_during_create_is_answered(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &sleeper(t, "c")?)?;
    let shim = fake.shim("c", &bundle)?;
    let create = create_later(&shim, &bundle);
    let delete = shim.request::<api::DeleteResponse>(
        V3,
        "Delete",
        &api::DeleteRequest { id: "c".into(), ..Default::default() },
    );
    let (created, deleted) = fake.block_on(async {
        let both = async { tokio::join!(biased; create, delete) };
        tokio::time::timeout(Duration::from_secs(5), both).await
    })?;
    let failure = created.err().context("the container was created all the same")?;
    ensure!(
        failure.code == Code::FAILED_PRECONDITION && failure.message.contains("deleted"),
        "Create says: {failure}"
    );
    let failure = deleted.err().context("what never was has been deleted")?;
    ensure!(failure.code == Code::NOT_FOUND, "Delete says: {failure}");
    ensure!(shim.state("c", "").is_err_and(|f| f.code == Code::NOT_FOUND), "something of it is still there");
    ensure!(fake.story().is_empty(), "of what never was there are events: {:?}", fake.story());
    shim.shutdown("c");
    Ok(())
}

fn stats(shim: &Shim) -> Result<Metrics> {
    let response: api::StatsResponse =
        shim.call("Stats", &api::StatsRequest { id: "c".into(), ..Default::default() })?;
    let any = response.stats.into_option().context("no figures")?;
    ensure!(any.type_url == "io.containerd.cgroups.v2.Metrics", "the type is {}", any.type_url);
    Ok(Metrics::parse_from_bytes(&any.value)?)
}

fn t11_stats_are_of_cgroups_v2(t: &mut Context) -> Result<()> {
    with_running(
        t,
        |t| sleeper(t, "c"),
        |_, _, shim| {
            let metrics = stats(shim)?;
            ensure!(metrics.memory.usage > 0 && metrics.cpu.usage_usec > 0, "{metrics:?}");
            ensure!(metrics.pids.current >= 1, "{metrics:?}");
            Ok(())
        },
    )
}

fn t12_update_changes_the_limits(t: &mut Context) -> Result<()> {
    with_running(
        t,
        |t| sleeper(t, "c"),
        |_, _, shim| {
            let resources = Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
                value: br#"{"memory":{"limit":83886080},"pids":{"limit":77}}"#.to_vec(),
                ..Default::default()
            };
            let request = api::UpdateTaskRequest {
                id: "c".into(),
                resources: MessageField::some(resources),
                ..Default::default()
            };
            shim.call::<api::Empty>("Update", &request)?;
            let metrics = stats(shim)?;
            ensure!(metrics.memory.usage_limit == 83_886_080, "{metrics:?}");
            ensure!(metrics.pids.limit == 77, "{metrics:?}");
            Ok(())
        },
    )
}

fn t13_exit_status(t: &mut Context) -> Result<()> {
    with_running(
        t,
        |t| sleeper(t, "c"),
        |_, _, shim| {
            for (exec, script, status) in [
                ("a", "exit 0", 0),
                ("b", "exit 255", 255),
                ("c", "kill -TERM $$", 143),
                ("d", "kill -SEGV $$", 139),
            ] {
                shim.exec("c", exec, &["sh", "-c", script])?;
                shim.start("c", exec)?;
                let got = shim.wait("c", exec)?;
                ensure!(got == status, "{script:?} ended with {got}");
                ensure!(shim.delete("c", exec)?.exit_status == status, "the deletion says something else");
            }
            Ok(())
        },
    )
}

fn t13_a_machine_that_dies_is_no_success(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &sleeper(t, "c")?)?;
    let shim = fake.shim("c", &bundle)?;
    shim.create("c", &bundle)?;
    shim.start("c", "")?;
    let parts = t.parts()?;
    t.kill_part(&parts[0])?;
    let status = shim.wait("c", "")?;
    ensure!(status == 137 || status == 255, "the status is {status}");
    fake.wait_event(&format!("exit c {status}"), 10)?;
    shim.delete("c", "")?;
    shim.shutdown("c");
    Ok(())
}
