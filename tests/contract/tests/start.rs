//! Statements N and S: how the binary is started.

use std::fs::Permissions;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use harness::{Context, Run, Test, signal_process, wait_for_exit};
use rustix::process::{Signal, Uid};
use rustix::thread::set_thread_res_uid;
use serde_json::json;

use crate::fake::{Answer, Fake, Input, Shim};
use crate::logs::log_fifo;
use crate::task::sleeper;

pub(crate) const TESTS: &[Test] = &[
    Test::common("n1_the_binary_has_the_runtimes_name", n1_the_binary_has_the_runtimes_name),
    Test::common(
        "s1_the_server_has_a_process_group_of_its_own",
        s1_the_server_has_a_process_group_of_its_own,
    ),
    Test::common("s2_bootstrap_parameters", s2_bootstrap_parameters),
    Test::common(
        "s2_bootstrap_parameters_choose_the_socket_dir",
        s2_bootstrap_parameters_choose_the_socket_dir,
    ),
    Test::common(
        "s2_options_as_any_are_no_bootstrap_parameters",
        s2_options_as_any_are_no_bootstrap_parameters,
    ),
    Test::common("s2_nothing_on_stdin", s2_nothing_on_stdin),
    Test::common("s2_parameters_of_another_shim_are_not_ours", s2_parameters_of_another_shim_are_not_ours),
    Test::common("s3_the_answer_never_reads_as_protobuf", s3_the_answer_never_reads_as_protobuf),
    Test::common("s4_start_writes_nothing_to_stderr", s4_start_writes_nothing_to_stderr),
    Test::common("s4_a_failed_start_says_why", s4_a_failed_start_says_why),
    Test::common("s6_start_again_gives_the_same_address", s6_start_again_gives_the_same_address),
    Test::common("s6_starts_at_once_share_one_server", s6_starts_at_once_share_one_server),
    Test::common("s6_a_dead_servers_socket_is_replaced", s6_a_dead_servers_socket_is_replaced),
    Test::common("s7_containers_of_a_sandbox_share_a_server", s7_containers_of_a_sandbox_share_a_server),
    Test::common("s7_without_a_config_the_id_is_the_group", s7_without_a_config_the_id_is_the_group),
    Test::common("s8_the_socket_is_private_and_short", s8_the_socket_is_private_and_short),
    Test::common("s8_another_user_is_turned_away", s8_another_user_is_turned_away),
    Test::common("s9_the_parent_ends_and_holds_no_pipe", s9_the_parent_ends_and_holds_no_pipe),
    Test::bulkhead("s9_orphans_come_to_the_server", "runc's shim runs no hooks itself", |t| {
        s9_orphans_come_to_the_server(t)
    }),
    Test::common("s10_the_address_is_in_the_bundle", s10_the_address_is_in_the_bundle),
    Test::bulkhead("s11_a_server_without_a_place_is_no_start", "runc's has no directory of its own", |t| {
        s11_a_server_without_a_place_is_no_start(t)
    }),
];

fn with_shim(t: &mut Context, check: impl FnOnce(&Context, &Shim, &Answer) -> Result<()>) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    let output = fake.run_start("c", &bundle, &Input::Bootstrap { socket_dir: None })?.ok()?;
    let answer = Answer::parse(&output)?;
    let shim = fake.connect(&answer.address)?;
    let result = check(t, &shim, &answer);
    shim.shutdown("c");
    result
}

fn n1_the_binary_has_the_runtimes_name(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let output = Run::new(fake.shim_program()).arg("-v").output()?.ok()?;
    ensure!(output.out().contains("containerd-shim-bulkhead-v2"), "{output}");
    ensure!(output.stderr.is_empty(), "{output}");
    Ok(())
}

/// The field of /proc/<pid>/stat with this number, counted from 1 as in proc(5); not the first two.
fn stat(pid: u32, field: usize) -> Result<i64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = text.rsplit_once(')').map_or("", |(_, r)| r);
    Ok(rest.split_whitespace().nth(field - 3).unwrap_or_default().parse()?)
}

fn s1_the_server_has_a_process_group_of_its_own(t: &mut Context) -> Result<()> {
    with_shim(t, |t, shim, _| {
        let pid = shim.connect_rpc("c")?.shim_pid;
        ensure!(stat(pid, 5)? != stat(std::process::id(), 5)?, "it is in our process group");
        let cwd = std::fs::read_link(format!("/proc/{pid}/cwd"))?;
        ensure!(cwd == t.dir().join("b/c"), "it works in {cwd:?}");
        Ok(())
    })
}

fn answer_to(t: &mut Context, input: &Input) -> Result<Answer> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    let answer = Answer::parse(&fake.run_start("c", &bundle, input)?.ok()?)?;
    fake.connect(&answer.address)?.shutdown("c");
    ensure!(answer.protocol == "ttrpc", "{answer:?}");
    Ok(answer)
}

fn s2_bootstrap_parameters(t: &mut Context) -> Result<()> {
    let answer = answer_to(t, &Input::Bootstrap { socket_dir: None })?;
    ensure!(answer.version == 3, "{answer:?}");
    Ok(())
}

fn s2_bootstrap_parameters_choose_the_socket_dir(t: &mut Context) -> Result<()> {
    let dir = t.dir().join("s").display().to_string();
    let answer = answer_to(t, &Input::Bootstrap { socket_dir: Some(dir.clone()) })?;
    ensure!(answer.address.starts_with(&format!("unix://{dir}/")), "{answer:?}");
    std::fs::remove_dir_all(dir).ok();
    Ok(())
}

fn s2_options_as_any_are_no_bootstrap_parameters(t: &mut Context) -> Result<()> {
    let any = Any { type_url: "runtimeoptions.v1.Options".into(), ..Default::default() };
    // 1.7 refuses version 3, and cannot be told from 2.0 to 2.2.
    let answer = answer_to(t, &Input::Options(any))?;
    ensure!(answer.version == 2, "{answer:?}");
    Ok(())
}

fn s2_nothing_on_stdin(t: &mut Context) -> Result<()> {
    let answer = answer_to(t, &Input::Nothing)?;
    ensure!(answer.version == 2, "{answer:?}");
    Ok(())
}

fn s2_parameters_of_another_shim_are_not_ours(t: &mut Context) -> Result<()> {
    // An Any whose bytes also read as parameters, of a shim with another name.
    let answer = answer_to(
        t,
        &Input::Options(Any { type_url: "d".into(), value: b"ns".to_vec(), ..Default::default() }),
    )?;
    ensure!(answer.version == 2, "{answer:?}");
    Ok(())
}

fn s3_the_answer_never_reads_as_protobuf(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    for (id, input) in [("c", Input::Bootstrap { socket_dir: None }), ("d", Input::Nothing)] {
        let bundle = fake.bundle(id, &json!({}))?;
        let output = fake.run_start(id, &bundle, &input)?.ok()?;
        fake.connect(&Answer::parse(&output)?.address)?.shutdown(id);
        // '{' opens the protobuf group 15, which only '|' could close: no decoder gets to the end of it.
        let opens = output.stdout.starts_with(b"{") && !output.stdout.contains(&b'|');
        ensure!(
            opens,
            "containerd 2.3 could read it as protobuf
{output}"
        );
        ensure!(!output.stdout.ends_with(b"\n"), "containerd 2.2 does not trim\n{output}");
    }
    Ok(())
}

fn s4_start_writes_nothing_to_stderr(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    for (id, input) in [("c", Input::Bootstrap { socket_dir: None }), ("d", Input::Nothing)] {
        let bundle = fake.bundle(id, &json!({}))?;
        let output = fake
            .start_command(id, &bundle, &input)?
            .env("RUST_LOG", "trace")
            .env("RUST_BACKTRACE", "1")
            .output()?
            .ok()?;
        fake.connect(&Answer::parse(&output)?.address)?.shutdown(id);
        ensure!(output.stderr.is_empty(), "{output}");
    }
    Ok(())
}

fn s4_a_failed_start_says_why(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    std::fs::write(bundle.join("config.json"), "{ this is no JSON")?;
    let output = fake.run_start("c", &bundle, &Input::Nothing)?.expect_failure()?;
    ensure!(output.stdout.is_empty(), "{output}");
    output.expect_stderr(&["config.json"])?;
    let output = fake.binary("../c", &bundle, &[], "start").output()?.expect_failure()?;
    output.expect_stderr(&["../c"])?;
    Ok(())
}

fn s11_a_server_without_a_place_is_no_start(t: &mut Context) -> Result<()> {
    let place = t.write("a-file", "")?.join("state");
    t.set_config("", "state_dir", place.display().to_string().into())?;
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    let output = fake.run_start("c", &bundle, &Input::Nothing)?.expect_failure()?;
    output.expect_stderr(&[&place.display().to_string(), "Not a directory"])?;
    ensure!(!bundle.join("address").exists(), "containerd is told of nobody");
    Ok(())
}

fn s6_start_again_gives_the_same_address(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    let input = Input::Bootstrap { socket_dir: None };
    let first = Answer::parse(&fake.run_start("c", &bundle, &input)?.ok()?)?;
    let shim = fake.connect(&first.address)?;
    let pid = shim.connect_rpc("c")?.shim_pid;
    let second = Answer::parse(&fake.run_start("c", &bundle, &input)?.ok()?)?;
    ensure!(first.address == second.address, "{first:?} {second:?}");
    ensure!(fake.connect(&second.address)?.connect_rpc("c")?.shim_pid == pid, "another process serves it");
    shim.shutdown("c");
    Ok(())
}

fn s6_starts_at_once_share_one_server(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    let input = Input::Bootstrap { socket_dir: None };
    let running: Result<Vec<_>> = (0..6).map(|_| fake.start_command("c", &bundle, &input)?.spawn()).collect();
    let mut addresses = Vec::new();
    for proc in running? {
        addresses.push(Answer::parse(&proc.wait()?.ok()?)?.address);
    }
    addresses.dedup();
    ensure!(addresses.len() == 1, "{addresses:?}");
    let servers: Vec<_> =
        t.processes().into_iter().filter(|p| p.name.starts_with("containerd-shim")).collect();
    ensure!(servers.len() == 1, "{servers:#?}");
    fake.connect(&addresses[0])?.shutdown("c");
    Ok(())
}

fn s6_a_dead_servers_socket_is_replaced(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    let input = Input::Bootstrap { socket_dir: None };
    let first = Answer::parse(&fake.run_start("c", &bundle, &input)?.ok()?)?;
    crate::task::kill_shim(t, &fake.connect(&first.address)?)?;
    ensure!(first.socket().exists(), "a killed server leaves its socket: the test needs it");
    let second = Answer::parse(&fake.run_start("c", &bundle, &input)?.ok()?)?;
    ensure!(first.address == second.address, "{first:?} {second:?}");
    fake.connect(&second.address)?.shutdown("c");
    Ok(())
}

fn s7_containers_of_a_sandbox_share_a_server(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let input = Input::Bootstrap { socket_dir: None };
    let start = |id: &str, annotations: serde_json::Value| -> Result<String> {
        let bundle = fake.bundle(id, &json!({ "annotations": annotations }))?;
        Ok(Answer::parse(&fake.run_start(id, &bundle, &input)?.ok()?)?.address)
    };
    let pod = start("pod", json!({ "io.kubernetes.cri.sandbox-id": "pod" }))?;
    let member = start("c1", json!({ "io.kubernetes.cri.sandbox-id": "pod" }))?;
    let grouped =
        start("c2", json!({ "io.containerd.runc.v2.group": "pod", "io.kubernetes.cri.sandbox-id": "x" }))?;
    let alone = start("c3", json!({}))?;
    ensure!(pod == member && pod == grouped, "{pod} {member} {grouped}");
    ensure!(pod != alone, "a container without a sandbox is in one");
    fake.connect(&pod)?.shutdown("pod");
    fake.connect(&alone)?.shutdown("c3");
    Ok(())
}

fn s7_without_a_config_the_id_is_the_group(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    std::fs::remove_file(bundle.join("config.json"))?;
    let answer = Answer::parse(&fake.run_start("c", &bundle, &Input::Bootstrap { socket_dir: None })?.ok()?)?;
    fake.connect(&answer.address)?.shutdown("c");
    Ok(())
}

fn s8_the_socket_is_private_and_short(t: &mut Context) -> Result<()> {
    with_shim(t, |_, _, answer| {
        let path = answer.socket();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        ensure!(path.parent() == Some("/run/containerd/s".as_ref()), "{path:?}");
        ensure!(name.len() == 64 && name.chars().all(|c| c.is_ascii_hexdigit()), "{name} is no sha256");
        let mode = |p: &std::path::Path| std::fs::metadata(p).map(|m| m.permissions().mode() & 0o777);
        ensure!(mode(&path)? == 0o600, "the socket has mode {:o}", mode(&path)?);
        ensure!(mode(path.parent().unwrap_or(&path))? == 0o700, "its directory is open");
        ensure!(path.as_os_str().len() <= 106, "{path:?} is too long");
        Ok(())
    })
}

/// Also where the file system would let it in.
fn s8_another_user_is_turned_away(t: &mut Context) -> Result<()> {
    let dir = t.dir().join("s");
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    let mut log = log_fifo(&bundle)?;
    let input = Input::Bootstrap { socket_dir: Some(dir.display().to_string()) };
    let answer = Answer::parse(&fake.run_start("c", &bundle, &input)?.ok()?)?;
    let open = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode));
    open(&dir, 0o755)?;
    open(&answer.socket(), 0o666)?;
    let socket = answer.socket();
    // A thread has a user of its own for the kernel, and ends with it.
    let said = std::thread::spawn(move || -> Result<usize> {
        let nobody = Uid::from_raw(65534);
        set_thread_res_uid(nobody, nobody, nobody)?;
        let mut stream = UnixStream::connect(&socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.read(&mut [0]).context("the other user was not hung up on")
    });
    let said = said.join().map_err(|_| anyhow!("the other user's thread has panicked"))?;
    let shim = fake.connect(&answer.address)?;
    let ours = shim.connect_rpc("c");
    shim.shutdown("c");
    std::fs::remove_dir_all(&dir).ok();
    ensure!(said? == 0, "the other user was told something");
    ensure!(ours?.shim_pid > 1, "its own user is not served");
    let mut text = String::new();
    // There is no end of a fifo that is open for writing, only nothing more.
    log.read_to_string(&mut text).ok();
    ensure!(
        text.contains("connection of another user refused") && text.contains("uid=65534"),
        "the log says {text:?}"
    );
    Ok(())
}

/// What a hook leaves behind is a child of nobody, and so of the server.
fn s9_orphans_come_to_the_server(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let note = t.dir().join("orphan");
    let script = format!("sleep 1000 >/dev/null 2>&1 & echo $! > {}", note.display());
    let mut spec = sleeper(t, "c")?;
    spec["hooks"] = json!({ "createRuntime": [
        { "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] }
    ]});
    let bundle = fake.bundle("c", &spec)?;
    let shim = fake.shim("c", &bundle)?;
    let server = shim.connect_rpc("c")?.shim_pid;
    shim.create("c", &bundle)?;
    let orphan: u32 = std::fs::read_to_string(note)?.trim().parse()?;
    let parent = stat(orphan, 4);
    let ended = signal_process(orphan, Signal::KILL, |_| true)?;
    wait_for_exit(&ended, Duration::from_secs(10))?;
    shim.start("c", "")?;
    shim.end("c")?;
    ensure!(parent? == i64::from(server), "it is not the server's, which is {server}");
    Ok(())
}

fn s9_the_parent_ends_and_holds_no_pipe(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &json!({}))?;
    let output = fake.run_start("c", &bundle, &Input::Bootstrap { socket_dir: None })?.ok()?;
    let shim = fake.connect(&Answer::parse(&output)?.address)?;
    let pid = shim.connect_rpc("c")?.shim_pid;
    let score = |pid: &str| -> Result<i32> {
        Ok(std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim().parse()?)
    };
    let (ours, its) = (score("self")?, score(&pid.to_string())?);
    shim.shutdown("c");
    ensure!(!output.pipes_held, "the server holds the answer's pipe open: containerd would wait for ever");
    ensure!(its == (ours + 1).min(1000), "oom_score_adj is {its}, ours {ours}");
    Ok(())
}

fn s10_the_address_is_in_the_bundle(t: &mut Context) -> Result<()> {
    with_shim(t, |t, _, answer| {
        let text = std::fs::read_to_string(t.dir().join("b/c/address"))?;
        ensure!(text == answer.address, "the file says {text:?}");
        Ok(())
    })
}
