//! Processes of containers: streams, terminals, signals, ends.

use std::time::{Duration, Instant};

use bulkhead_proto::agent::{ResizePtyRequest, event::Kind};
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
    let (stdio, _io) = host.stdio(false, false);
    let script = "trap 'exit 3' TERM; sleep 1000 & wait";
    host.create("c", &spec(&root, &["sh", "-c", script]), stdio).await.unwrap();
    host.start_container("c").await.unwrap();
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
    keys.write_all(b"stty size; tty; ls -l $(tty) /dev/console | cut -c1-10\n").await.unwrap();
    expect!("50 132");
    // Job control: an interrupt ends the command in the foreground, not the shell.
    keys.write_all(b"sleep 1000; echo status=$?\n").await.unwrap();
    expect!("status=$?");
    wait_for_process(&host, "c", 2).await;
    keys.write_all(b"\x03").await.unwrap();
    keys.write_all(b"echo after=$?\n").await.unwrap();
    expect!("after=130");
    keys.write_all(b"sleep 1000\n").await.unwrap();
    wait_for_process(&host, "c", 2).await;
    keys.write_all(b"\x1a").await.unwrap();
    expect!("Stopped");
    keys.write_all(b"kill -9 %1; wait %1; echo gone\n").await.unwrap();
    expect!("\ngone");
    keys.write_all(b"exit 9\n").await.unwrap();
    assert_eq!(host.exit("c", "").await, 9);
}

/// Waits until a container has so many processes; a shell starts them in its own time.
async fn wait_for_process(host: &Host, id: &str, count: usize) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let pids = host.vm.client.pids(context(), &request(id)).await.unwrap().processes;
        if pids.len() == count {
            return;
        }
        assert!(Instant::now() < deadline, "{} processes, not {count}", pids.len());
        tokio::task::yield_now().await;
    }
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
