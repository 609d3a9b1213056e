//! The agent in a real guest, driven as the shim drives it.
//!
//! Needs root, QEMU, and in the environment: BULKHEAD_TEST_KERNEL, BULKHEAD_TEST_VIRTIOFSD,
//! BULKHEAD_TEST_VHOST_VSOCK, BULKHEAD_TEST_BUSYBOX (a static one). Then:
//! `cargo test -p bulkhead-agent --test guest -- --ignored --test-threads 2`.

mod host;
mod limits;
mod processes;
mod refusals;
mod users;
mod vm;

use std::time::{Duration, Instant};

use host::{Host, context, spec};

#[tokio::test]
#[ignore = "boots a machine"]
async fn it_says_hello_and_runs_a_container() {
    let mut host = Host::start().await;
    println!("boot {:?}, guest clock {:?}", host.vm.boot, Duration::from_nanos(host.vm.hello.uptime_nanos));
    let root = host.vm.rootfs("c");
    let begin = Instant::now();
    let answer = host.run("c", &spec(&root, &["sh", "-c", "cat; echo oops >&2; exit 7"]), b"hello\n").await;
    println!("run {:?}", begin.elapsed());
    assert_eq!(answer, (7, "hello\n".into(), "oops\n".into()));
    assert_eq!(host.vm.console().trim(), "", "a healthy guest says nothing");
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn the_guest_is_what_configure_says() {
    let mut host = Host::unconfigured().await;
    let root = "/nowhere";
    let early = host.create("early", &spec(root, &["true"]), Default::default()).await.unwrap_err();
    assert!(early.to_string().contains("not configured yet"), "{early}");
    host.configure().await.unwrap();
    let again = host.configure().await.unwrap_err();
    assert!(again.to_string().contains("configured already"), "{again}");

    let root = host.vm.rootfs("c");
    let mut plain = spec(
        &root,
        &[
            "sh",
            "-c",
            "hostname; cat /proc/sys/net/core/somaxconn /proc/sys/kernel/shmmni; date +%s; ip -o addr show lo",
        ],
    );
    plain["hostname"] = serde_json::Value::Null;
    let (status, out, err) = host.run("c", &plain, b"").await;
    let lines: Vec<_> = out.lines().collect();
    assert_eq!((status, err.as_str(), &lines[..3]), (0, "", ["pod", "321", "123"].as_slice()));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let guest: u64 = lines[3].parse().unwrap();
    assert!(guest.abs_diff(now) <= 5, "the guest's clock is at {guest}, the host's at {now}");
    assert!(out.contains("127.0.0.1/8"), "{out}");
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn the_agent_is_small() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    // Without a pid namespace of its own a container sees the guest's processes.
    let script = "for p in 1 $(grep -l zygote /proc/[0-9]*/comm | cut -d/ -f3); do grep -E '^(Name|VmRSS|RssAnon|RssFile|RssShmem|Threads):' /proc/$p/status; done; free -k; sleep 1000 &";
    let mut spec = spec(&root, &["sh", "-c", script]);
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "pid");
    let (status, out, err) = host.run("c", &spec, b"").await;
    println!("{out}");
    assert_eq!((status, err.as_str()), (0, ""));
    let kib = |key: &str| -> u64 {
        let line = out.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    assert!(kib("RssAnon:") <= 6 << 10, "{out}");
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn the_machine_ends_when_the_host_hangs_up() {
    let host = Host::start().await;
    let mut machine = host.hang_up();
    let ended = tokio::time::timeout(Duration::from_secs(60), machine.qemu.wait()).await;
    assert!(ended.expect("the machine ends by itself").unwrap().success());
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn shutdown_ends_every_container() {
    let mut host = Host::start().await;
    for id in ["a", "b"] {
        let root = host.vm.rootfs(id);
        let (stdio, _io) = host.stdio(false, false);
        host.create(id, &spec(&root, &["sleep", "1000"]), stdio).await.unwrap();
        host.start_container(id).await.unwrap();
    }
    host.vm.client.shutdown(context(), &Default::default()).await.unwrap();
    assert_eq!((host.exit("a", "").await, host.exit("b", "").await), (137, 137));
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn the_loss_of_the_launcher_ends_the_machine_visibly() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    // Without a pid namespace of its own, and with CAP_KILL, a container can end what is the agent's.
    let script = "kill -9 $(grep -l zygote /proc/[0-9]*/comm | cut -d/ -f3)";
    let mut spec = spec(&root, &["sh", "-c", script]);
    spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
    let (stdio, _io) = host.stdio(false, false);
    host.create("c", &spec, stdio).await.unwrap();
    let _ = host.start_container("c").await;
    let ended = tokio::time::timeout(Duration::from_secs(60), host.vm.qemu.wait()).await;
    ended.expect("the machine ends by itself").unwrap();
    let console = host.vm.console();
    assert!(console.contains("bulkhead-agent: the launcher has ended"), "{console}");
}
