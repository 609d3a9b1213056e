//! Processes of containers: streams, terminals, signals, ends.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use bulkhead_proto::agent::{ExecRequest, ResizePtyRequest, event::Kind};
use futures::future::try_join_all;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::host::{Host, context, request, spec};

fn process(args: &[&str]) -> Value {
    let mut process = spec("/", args)["process"].clone();
    process["user"] = json!({"uid": 1000, "gid": 1000});
    process
}

/// A container that lives until it is killed.
async fn sleeper(host: &mut Host, id: &str) -> u32 {
    let root = host.vm.rootfs(id);
    let (stdio, _io) = host.stdio(false, false);
    let pid = host.create(id, &spec(&root, &["sleep", "100000"]), stdio).await.unwrap();
    host.start_container(id).await.unwrap();
    pid
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_hundred_megabytes_arrive_whole() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let (stdio, io) = host.stdio(false, false);
    let script = "head -c 104857600 /dev/zero | tr '\\0' 'x'";
    host.create("c", &spec(&root, &["sh", "-c", script]), stdio).await.unwrap();
    let begin = Instant::now();
    host.start_container("c").await.unwrap();
    let (out, _) = host.talk(io, b"").await;
    println!("100 MiB out in {:?}", begin.elapsed());
    assert_eq!(out.len(), 104857600);
    assert!(out.iter().all(|b| *b == b'x'));
    assert_eq!(host.exit("c", "").await, 0);
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn input_arrives_whole_and_ends() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let input: Vec<u8> = (0..5_000_000u32).map(|n| (n.wrapping_mul(2654435761) >> 24) as u8).collect();
    let (status, out, err) = host.run("c", &spec(&root, &["sha256sum"]), &input).await;
    let expected: String = Sha256::digest(&input).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!((status, out, err.as_str()), (0, format!("{expected}  -\n"), ""));
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn execs_run_with_the_users_rights() {
    let mut host = Host::start().await;
    let init = sleeper(&mut host, "c").await;
    let script = "id -u; id -g; echo $HOME; pwd; grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/self/status; echo again > /dev/stdout; exit 5";
    let (status, out, err) = host.run_exec("c", "e", &process(&["sh", "-c", script])).await;
    assert_eq!((status, err.as_str()), (5, ""));
    let fields: Vec<_> = out.split_whitespace().collect();
    assert_eq!(fields[..4], ["1000", "1000", "/home/user", "/"]);
    // A user other than root keeps no capability over execve; the bounding set is the specification's.
    assert_eq!(
        fields[4..12],
        ["CapEff:", "0000000000000000", "CapBnd:", "00000000000000eb", "NoNewPrivs:", "1", "Seccomp:", "0"]
    );
    assert_eq!(fields[12], "again");

    // The id can be used again, and is visible while it runs.
    let (stdio, _io) = host.stdio(false, false);
    let pid = host.exec("c", "e", &process(&["sleep", "1000"]), stdio).await.unwrap();
    let pids = host.vm.client.pids(context(), &request("c")).await.unwrap().processes;
    let mut pids: Vec<_> = pids.into_iter().map(|p| (p.pid, p.exec_id)).collect();
    pids.sort();
    assert_eq!(pids, [(init, String::new()), (pid, "e".into())]);
    let (stdio, _io) = host.stdio(false, false);
    let twice = host.exec("c", "e", &process(&["true"]), stdio).await.unwrap_err();
    assert!(twice.to_string().contains("exists already"), "{twice}");

    host.signal("c", "e", libc::SIGTERM, false).await.unwrap();
    assert_eq!(host.exit("c", "e").await, 143);
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn init_ends_last() {
    let mut host = Host::start().await;
    sleeper(&mut host, "c").await;
    for n in 0..5 {
        let (stdio, _io) = host.stdio(false, false);
        host.exec("c", &format!("e{n}"), &process(&["sleep", "1000"]), stdio).await.unwrap();
    }
    host.signal("c", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(host.exit("c", "").await, 137);
    let ends: Vec<_> = host
        .events()
        .into_iter()
        .filter_map(|event| match event {
            Kind::Exit(exit) => Some((exit.exec_id, exit.status)),
            _ => None,
        })
        .collect();
    assert_eq!(ends.len(), 6, "{ends:?}");
    assert_eq!(ends.last(), Some(&(String::new(), 137)));
    assert!(ends.iter().all(|(_, status)| *status == 137));
    let late = host.signal("c", "", libc::SIGTERM, false).await.unwrap_err();
    assert!(late.to_string().contains("has ended"), "{late}");
    let (stdio, _io) = host.stdio(false, false);
    let late = host.exec("c", "x", &process(&["true"]), stdio).await.unwrap_err();
    assert!(late.to_string().contains("container c is stopped"), "{late}");
    host.delete("c").await.unwrap();
    host.delete("c").await.unwrap();
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn signals_reach_all_or_one() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let (stdio, io) = host.stdio(false, false);
    let script = "trap 'exit 3' TERM; echo set; sleep 1000 & wait";
    host.create("c", &spec(&root, &["sh", "-c", script]), stdio).await.unwrap();
    host.start_container("c").await.unwrap();
    // An init ignores what it has no handler for yet.
    assert_eq!(host.first_line(io).await, "set");
    let (stdio, _io) = host.stdio(false, false);
    host.exec("c", "e", &process(&["sleep", "1000"]), stdio).await.unwrap();
    // Real-time signals are signals too.
    host.signal("c", "e", 40, false).await.unwrap();
    assert_eq!(host.exit("c", "e").await, 168);
    host.signal("c", "", libc::SIGTERM, true).await.unwrap();
    assert_eq!(host.exit("c", "").await, 3);
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_background_process_keeps_the_stream_open() {
    let mut host = Host::start().await;
    sleeper(&mut host, "c").await;
    let (stdio, io) = host.stdio(false, false);
    host.exec("c", "e", &process(&["sh", "-c", "(sleep 2; echo late) & echo early"]), stdio).await.unwrap();
    assert_eq!(host.exit("c", "e").await, 0);
    let (out, _) = host.talk(io, b"").await;
    assert_eq!(String::from_utf8(out).unwrap(), "early\nlate\n");
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_terminal_is_one() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let (stdio, io) = host.stdio(true, true);
    let mut spec = spec(&root, &["sh", "-i"]);
    spec["process"]["terminal"] = json!(true);
    spec["process"]["env"] = json!(["PATH=/bin", "PS1=$ "]);
    host.create("c", &spec, stdio).await.unwrap();
    host.start_container("c").await.unwrap();
    let (mut keys, mut screen) = host.terminal(io).await;
    let mut seen = String::new();
    let mut buffer = [0; 4096];
    macro_rules! expect {
        ($text:expr) => {
            while !seen.contains($text) {
                let n = tokio::time::timeout(Duration::from_secs(30), screen.read(&mut buffer))
                    .await
                    .unwrap_or_else(|_| panic!("no {:?} in {seen:?}", $text))
                    .unwrap();
                assert_ne!(n, 0, "the stream ended: {seen:?}");
                seen += &String::from_utf8_lossy(&buffer[..n]);
            }
            seen.clear();
        };
    }
    expect!("$ ");
    keys.write_all(b"stty size\n").await.unwrap();
    expect!("31 91");
    let resize = ResizePtyRequest { container_id: "c".into(), width: 132, height: 50, ..Default::default() };
    host.vm.client.resize_pty(context(), &resize).await.unwrap();
    // Written in two parts, since the shell echoes what is typed; nothing else runs once it is seen whole.
    keys.write_all(b"stty size; echo do''ne\n").await.unwrap();
    expect!("50 132\r\ndone");
    // Job control: an interrupt ends the command in the foreground, not the shell. A command that has written
    // is in the foreground.
    keys.write_all(b"sh -c 'echo star\"\"ted; exec sleep 1000'\n").await.unwrap();
    expect!("started");
    keys.write_all(b"\x03").await.unwrap();
    keys.write_all(b"echo after=$?\n").await.unwrap();
    expect!("after=130");
    keys.write_all(b"sh -c 'echo star\"\"ted; exec sleep 1000'\n").await.unwrap();
    expect!("started");
    keys.write_all(b"\x1a").await.unwrap();
    expect!("Stopped");
    // A shell that has stopped jobs wants to be told twice.
    keys.write_all(b"exit 9\nexit 9\n").await.unwrap();
    assert_eq!(host.exit("c", "").await, 9);
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn many_execs_leave_nothing_behind() {
    let mut host = Host::start().await;
    sleeper(&mut host, "c").await;
    let begin = Instant::now();
    const ROUNDS: u32 = 20;
    for n in 0..ROUNDS {
        let (status, out, _) = host.run_exec("c", &format!("e{n}"), &process(&["echo", "x"])).await;
        assert_eq!((status, out.as_str()), (0, "x\n"));
    }
    println!("an exec takes {:?}", begin.elapsed() / ROUNDS);
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_slow_reader_loses_nothing() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let (stdio, io) = host.stdio(false, false);
    host.create("c", &spec(&root, &["seq", "1", "400000"]), stdio).await.unwrap();
    host.start_container("c").await.unwrap();
    // Nobody reads until every buffer on the way is full: the container's process must stand still, then go on.
    let pids = || async { host.vm.client.pids(context(), &request("c")).await.unwrap().processes.len() };
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(pids().await, 1, "the process waits for its reader");
    }
    let (out, _) = host.talk(io, b"").await;
    let expected: String = (1..=400000).map(|n| format!("{n}\n")).collect();
    assert!(out == expected.as_bytes(), "{} bytes instead of {}", out.len(), expected.len());
    assert_eq!(host.exit("c", "").await, 0);
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn an_input_that_nobody_reads_is_closed() {
    let mut host = Host::start().await;
    sleeper(&mut host, "c").await;
    let (stdio, io) = host.stdio(true, false);
    host.exec("c", "e", &process(&["sh", "-c", "exec <&-; sleep 1000"]), stdio).await.unwrap();
    let mut stdin = io.stdin.unwrap().await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(30), stdin.read(&mut [0])).await;
    assert!(matches!(read.expect("the agent closes it"), Ok(0) | Err(_)));
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn many_execs_at_once_each_end_with_their_own_status() {
    let mut host = Host::start().await;
    sleeper(&mut host, "c").await;
    let calls = (0..16).map(|n: u32| {
        let request = ExecRequest {
            container_id: "c".into(),
            exec_id: format!("e{n}"),
            process: process(&["sh", "-c", &format!("exit {n}")]).to_string().into_bytes(),
            ..Default::default()
        };
        let client = host.vm.client.clone();
        async move { client.exec(context(), &request).await.map(|answer| answer.pid) }
    });
    let pids: HashSet<_> = try_join_all(calls).await.unwrap().into_iter().collect();
    assert_eq!(pids.len(), 16);
    for n in 0..16 {
        host.expect_from_start("c", &format!("e{n}"));
        assert_eq!(host.exit("c", &format!("e{n}")).await, n);
    }
}
