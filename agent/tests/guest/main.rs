//! The agent in a real guest, driven as the shim drives it.
//!
//! Needs root, QEMU, and in the environment: BULKHEAD_TEST_KERNEL, BULKHEAD_TEST_VIRTIOFSD,
//! BULKHEAD_TEST_VHOST_VSOCK, BULKHEAD_TEST_BUSYBOX (a static one). Then:
//! `cargo test -p bulkhead-agent --test guest -- --ignored --test-threads 2`.

mod host;
mod vm;

use host::{Host, spec};

#[tokio::test]
#[ignore = "boots a machine"]
async fn it_says_hello_and_runs_a_container() {
    let mut host = Host::start().await;
    println!("boot {:?}, guest clock {:?}", host.vm.boot, std::time::Duration::from_nanos(host.vm.hello.uptime_nanos));
    let root = host.vm.rootfs("c");
    let begin = std::time::Instant::now();
    let answer = host.run("c", &spec(&root, &["sh", "-c", "cat; echo oops >&2; exit 7"]), b"hello\n").await;
    println!("run {:?}", begin.elapsed());
    println!("{}", host.vm.console());
    assert_eq!(answer, (7, "hello\n".into(), "oops\n".into()));
}
