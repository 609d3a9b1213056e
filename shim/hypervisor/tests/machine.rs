//! Real machines: QEMU, virtiofsd, vhost-device-vsock, a kernel, and a PID 1 made for these tests
//! (`examples/test_guest.rs`). They are run by `make test`, which provides the parts:
//!
//! ```text
//! BULKHEAD_TEST_KERNEL=…/vmlinux BULKHEAD_TEST_VIRTIOFSD=…/virtiofsd \
//! BULKHEAD_TEST_VSOCK=…/vhost-device-vsock cargo test -p bulkhead-hypervisor -- --include-ignored
//! ```

mod rig;

use std::{
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use bulkhead_hypervisor::{
    Exit,
    qemu::{MINIMUM_MEMORY, QEMU},
};
use bulkhead_vmm_spec::{BlockBinding, BlockShape};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::rig::{Rig, backend, within};

#[tokio::test]
#[ignore = "needs the parts"]
async fn a_machine_boots_shares_files_and_ends() {
    let rig = Rig::new();
    let mut running = rig.boot().await;
    let parts: Vec<_> = running.machine.processes().into_iter().map(|(name, _)| name).collect();
    assert_eq!(parts, rig::parts());
    assert_eq!(running.machine.processes()[0].1, running.machine.pid());

    // A guest that must count ticks is slow, coarse and never idle.
    running.command("mount sysfs sysfs /sys").await;
    let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    if !rig::on_kvm() && std::fs::read_to_string(clock).unwrap().trim() == "tsc" {
        // Called tsc-early in the first second.
        let found = running.command(&format!("read {clock}")).await;
        assert!(found.starts_with("tsc"), "{found}");
    }

    if rig::on_kvm() {
        let found = running.command(&format!("read {clock}")).await;
        assert!(["kvm-clock", "tsc"].contains(&found.trim()), "{found}");
    }

    running.command("mount virtiofs share /share").await;
    std::fs::write(rig.share().join("from-host"), "one").unwrap();
    assert_eq!(running.command("read /share/from-host").await, "one");
    // What the host writes later is what the guest reads, though it has read the file before.
    std::fs::write(rig.share().join("from-host"), "another").unwrap();
    assert_eq!(running.command("read /share/from-host").await, "another");
    std::fs::write(rig.share().join("second"), "").unwrap();
    assert_eq!(running.command("list /share").await, "from-host second");
    std::fs::remove_file(rig.share().join("second")).unwrap();
    assert_eq!(running.command("list /share").await, "from-host");
    running.command("write /share/from-guest back").await;
    assert_eq!(std::fs::read_to_string(rig.share().join("from-guest")).unwrap(), "back");

    running.send("restart").await;
    let end = running.end().await;
    assert!(end.is_guest_shutdown(rig::parts()[0]), "{end}");
    assert!(!end.asked);
    running.machine.kill().await;
    assert!(running.machine.processes().is_empty());
    rig.assert_nothing_left();
}

#[tokio::test]
#[ignore = "needs the parts"]
async fn a_panic_of_the_guest_is_told() {
    let rig = Rig::new();
    let mut running = rig.boot().await;
    running.send("panic").await;
    let end = running.end().await;
    let panic = end.panic.as_deref().expect("the end names the panic");
    assert!(panic.contains("Attempted to kill init"), "{end}");
    // What a program writes to the console arrives with what the kernel says.
    assert!(end.console.iter().any(|line| line.ends_with("test guest: here it ends")), "{end}");
    assert!(!end.is_guest_shutdown(rig::parts()[0]));
    running.machine.kill().await;
    rig.assert_nothing_left();
}

#[tokio::test]
#[ignore = "needs the parts"]
async fn the_part_that_dies_is_named() {
    for &part in rig::parts() {
        let rig = Rig::new();
        let mut running = rig.boot().await;
        running.command("mount virtiofs share /share").await;
        kill(running.pid_of(part), Signal::SIGKILL).unwrap();
        let end = running.end().await;
        assert_eq!((end.part.as_str(), end.exit, end.asked), (part, Exit::Signal(9), false), "{end}");
        running.machine.kill().await;
        assert_eq!(running.end().await, end, "the end stays the same");
        rig.assert_nothing_left();
    }
}

#[tokio::test]
#[ignore = "needs the parts"]
async fn a_kill_is_told_from_a_death_and_drop_leaves_nothing() {
    let rig = Rig::new();
    let mut running = rig.boot().await;
    running.machine.kill().await;
    running.machine.kill().await;
    let end = running.end().await;
    assert!(end.asked, "{end}");
    rig.assert_nothing_left();

    // Also while the guest boots.
    let machine = backend().launch(&rig.shape, &rig.bindings, &rig.journal).await.unwrap();
    drop(machine);
    for (name, pid) in rig.journal.0.lock().unwrap().iter() {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{name} {pid} is left");
    }
}

#[tokio::test]
#[ignore = "needs the parts"]
async fn block_devices_come_in_order_with_their_serials() {
    let mut rig = Rig::new();
    for (name, read_only) in [("first", true), ("second", false)] {
        let path = rig.dir.path().join(name);
        std::fs::write(&path, vec![0; 4 << 20]).unwrap();
        // QEMU must not need more rights on a read-only base than to read it.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
        rig.shape.blocks.push(BlockShape { serial: format!("serial-{name}"), read_only });
        rig.bindings.blocks.push(BlockBinding { path });
    }
    let mut running = rig.boot().await;
    running.command("mount sysfs sysfs /sys").await;
    assert_eq!(running.command("read /sys/block/vda/serial").await, "serial-first");
    assert_eq!(running.command("read /sys/block/vdb/serial").await, "serial-second");
    assert_eq!(running.command("read /sys/block/vda/ro").await.trim(), "1");
    assert_eq!(running.command("read /sys/block/vdb/ro").await.trim(), "0");
    running.machine.kill().await;
}

#[tokio::test]
#[ignore = "needs the parts"]
async fn the_smallest_memory_boots_and_several_processors_are_seen() {
    let mut rig = Rig::new();
    rig.shape.memory = MINIMUM_MEMORY;
    (rig.shape.vcpus, rig.shape.max_vcpus) = (2, 2);
    let mut running = rig.boot().await;
    running.command("mount sysfs sysfs /sys").await;
    assert_eq!(running.command("read /sys/devices/system/cpu/online").await.trim(), "0-1");
    running.machine.kill().await;
}

#[tokio::test]
#[ignore = "needs the parts"]
async fn a_kernel_that_is_none_is_an_end_with_words() {
    let mut rig = Rig::new();
    rig.bindings.kernel = rig.dir.path().join("no-elf");
    std::fs::write(&rig.bindings.kernel, "not a kernel").unwrap();
    let launched = backend().launch(&rig.shape, &rig.bindings, &rig.journal).await;
    if rig::on_kvm() {
        // Our own VMM loads it before it answers.
        let error = launched.err().expect("it is no kernel").to_string();
        assert!(
            error.contains("not an uncompressed x86-64 ELF") && error.contains("hypervisor.kernel"),
            "{error}"
        );
        return rig.assert_nothing_left();
    }
    let mut machine = launched.unwrap();
    let end = within(machine.ended()).await;
    assert_eq!(end.part, QEMU, "{end}");
    assert_ne!(end.exit, Exit::Code(0));
    assert!(end.to_string().contains("no-elf") || !end.messages.is_empty(), "{end}");
    machine.kill().await;
    rig.assert_nothing_left();
}

/// Set in the process that is killed by the test below.
const ROLE: &str = "BULKHEAD_TEST_ROLE";

#[test]
#[ignore = "needs the parts"]
fn every_part_dies_with_us_even_by_sigkill() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    if std::env::var_os(ROLE).is_some() {
        return runtime.block_on(async {
            let rig = Rig::new();
            let mut running = rig.boot().await;
            // virtiofsd has given up its rights by now, which must not have made it forget its parent.
            running.command("mount virtiofs share /share").await;
            running.command("write /share/file text").await;
            println!("\nmachine {} {:?}", rig.dir.path().display(), running.machine.processes());
            std::future::pending::<()>().await;
        });
    }
    // What the other process leaves is ours to reap, and that is an event.
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let mut other = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "every_part_dies_with_us_even_by_sigkill", "--nocapture", "--include-ignored"])
        .env(ROLE, "parent")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(other.stdout.take().unwrap()).lines();
    let line =
        lines.map_while(Result::ok).find_map(|l| Some(l.strip_prefix("machine ")?.to_owned())).unwrap();
    let (dir, parts) = line.split_once(' ').unwrap();
    let pids: Vec<i32> =
        parts.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
    assert_eq!(pids.len(), rig::parts().len(), "{parts}");
    other.kill().unwrap();
    other.wait().unwrap();
    runtime.block_on(async {
        for pid in pids {
            let reaped = tokio::task::spawn_blocking(move || waitpid(Pid::from_raw(pid), None).unwrap());
            let status = within(reaped).await.unwrap();
            assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "{parts}: {status:?}");
        }
    });
    std::fs::remove_dir_all(dir).unwrap();
}
