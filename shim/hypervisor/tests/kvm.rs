//! What only machines of our own VMM can do, and the wall around them. Run in the node VM (`tests/run node`),
//! with the parts that tests/machine.rs names and `BULKHEAD_TEST_BACKEND=kvm`.

mod rig;

use std::{
    collections::BTreeSet,
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Instant,
};

use bulkhead_hypervisor::{Exit, Growth, Machine, builtin::BuiltinMachine};
use bulkhead_vmm_spec::{
    BlockShape, SizeMib,
    wire::{Answer, Command, Slot},
};

use crate::rig::{Rig, Running};

async fn tell(machine: &BuiltinMachine, command: Command) -> Answer {
    machine.command(command, &[]).await.unwrap()
}

/// A field of /proc/<pid>/status.
fn status(pid: i32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':')).expect(field);
    line.trim().to_owned()
}

fn links(pid: i32, dir: &str) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(format!("/proc/{pid}/{dir}")).unwrap().flatten();
    entries
        .filter_map(|e| Some((e.file_name().into_string().unwrap(), fs::read_link(e.path()).ok()?)))
        .collect()
}

#[tokio::test]
#[ignore = "needs the parts, and KVM"]
async fn the_wall_stands() {
    let rig = Rig::new();
    let mut running = rig.boot_builtin().await;
    let pid = running.machine.pid();
    for ids in ["Uid", "Gid"] {
        let ids: BTreeSet<u32> = status(pid, ids).split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert!(ids.len() == 1 && ids.iter().all(|&id| id > 1_900_000_000), "{ids:?}");
    }
    assert_eq!(status(pid, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!((status(pid, "NoNewPrivs").as_str(), status(pid, "Seccomp").as_str()), ("1", "2"));

    // Every thread has its filter.
    let threads: Vec<String> = fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .flatten()
        .map(|t| fs::read_to_string(t.path().join("status")).unwrap())
        .collect();
    assert!(threads.len() >= 3, "main, a processor, vsock");
    assert!(threads.iter().all(|text| text.contains("Seccomp:\t2")), "{threads:#?}");

    let root = PathBuf::from(format!("/proc/{pid}/root/"));
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0, "the root is empty");
    assert!(fs::write(root.join("file"), "").is_err(), "and stays so");
    let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");

    for (name, namespace) in links(pid, "ns") {
        // The namespaces of time and of the future children are the host's: it makes no children.
        if !name.starts_with("time") {
            let ours = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
            assert_ne!(namespace, ours, "{name} is the host's");
        }
    }
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap(), "", "nobody is anybody in there");

    let given = ["/dev/null", "pipe:", "socket:", "anon_inode:", "/memfd:guest-memory"];
    for (number, target) in links(pid, "fd") {
        let target = target.to_string_lossy();
        assert!(given.iter().any(|prefix| target.starts_with(prefix)), "fd {number}: {target}");
    }
    running.machine.kill().await;
    rig.assert_nothing_left();
}

#[tokio::test]
#[ignore = "needs the parts, and KVM"]
async fn a_paused_machine_stands_still_and_goes_on() {
    let rig = Rig::new();
    let mut running = rig.boot_builtin().await;
    assert_eq!(tell(&running.machine, Command::Pause).await, Answer::Done);
    // Paused twice is paused.
    assert_eq!(tell(&running.machine, Command::Pause).await, Answer::Done);
    let exits = |answer| match answer {
        Answer::Metrics(all) => all["cpus"].clone(),
        other => panic!("{other:?}"),
    };
    let before = exits(tell(&running.machine, Command::Metrics).await);
    running.send("list /").await;
    let after = exits(tell(&running.machine, Command::Metrics).await);
    assert_eq!(before, after, "no processor runs");
    assert_eq!(tell(&running.machine, Command::Resume).await, Answer::Done);
    assert!(!running.answer().await.is_empty(), "what was asked meanwhile is answered");
    running.machine.kill().await;
}

#[tokio::test]
#[ignore = "needs the parts, and KVM"]
async fn what_happens_is_counted() {
    let rig = Rig::new();
    let mut running = rig.boot_builtin().await;
    running.command("mount virtiofs share /share").await;
    let Answer::Metrics(all) = tell(&running.machine, Command::Metrics).await else { panic!("metrics") };
    assert!(all["cpus"]["mmio_writes"] > 0, "{all:?}");
    println!("exits to userspace after a boot and a mount: {:?}", all["cpus"]);
    for device in ["vsock", "share", "rng"] {
        assert_eq!(all[device]["transport_activations"], 1, "{device}: {all:?}");
    }
    running.machine.kill().await;
}

#[tokio::test]
#[ignore = "needs the parts, and KVM"]
async fn disks_come_and_go_while_it_runs() {
    let mut rig = Rig::new();
    rig.shape.spare_slots = 1;
    let mut running = rig.boot_builtin().await;
    running.command("mount sysfs sysfs /sys").await;
    let path = rig.dir.path().join("disk");
    fs::write(&path, vec![0; 4 << 20]).unwrap();
    let attach = |serial: &str| Command::Attach {
        file: Slot(0),
        block: BlockShape { serial: serial.into(), read_only: false },
    };
    for serial in ["first", "again"] {
        let disk = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let answer = running.machine.command(attach(serial), &[disk.as_fd()]).await.unwrap();
        let Answer::Attached { slot, device } = answer else { panic!("{answer:?}") };
        let full = running.machine.command(attach("other"), &[disk.as_fd()]).await.unwrap_err().to_string();
        assert!(full.contains("no spare slot"), "{full}");

        let driver = "/sys/bus/platform/drivers/virtio-mmio";
        running.command(&format!("write {driver}/bind virtio-mmio.{device}")).await;
        assert_eq!(running.command("read /sys/block/vda/serial").await, serial);
        running.command(&format!("write {driver}/unbind virtio-mmio.{device}")).await;
        assert_eq!(tell(&running.machine, Command::Detach { slot }).await, Answer::Done);
    }
    let none = running.machine.command(Command::Detach { slot: 0 }, &[]).await.unwrap_err().to_string();
    assert!(none.contains("slot 0"), "the vsock device is not one that goes: {none}");
    running.machine.kill().await;
    rig.assert_nothing_left();
}

#[tokio::test]
#[ignore = "needs the parts, and KVM"]
async fn nonsense_is_refused_and_the_machine_goes_on() {
    let rig = Rig::new();
    let mut running = rig.boot_builtin().await;
    for command in [
        Command::Detach { slot: 99 },
        Command::Attach { file: Slot(7), block: BlockShape { serial: "s".into(), read_only: true } },
        Command::Resize { growth_bytes: Some(1 << 40), balloon_bytes: None },
        Command::Processors { count: 0 },
        Command::Processors { count: 99 },
    ] {
        assert!(running.machine.command(command.clone(), &[]).await.is_err(), "{command:?}");
    }
    assert!(!running.command("list /").await.is_empty());
    running.machine.kill().await;
}

#[tokio::test]
#[ignore = "needs the parts, and KVM"]
async fn stop_ends_it_in_order() {
    let rig = Rig::new();
    let mut running = rig.boot_builtin().await;
    assert_eq!(tell(&running.machine, Command::Stop).await, Answer::Done);
    let end = running.end().await;
    assert_eq!((end.part.as_str(), end.exit), ("bulkhead-vmm", Exit::Code(0)), "{end}");
    running.machine.kill().await;
    assert!(!Path::new(&rig.bindings.vsock).exists());
    rig.assert_nothing_left();
}

/// MemTotal or MemFree of the guest in MiB.
async fn meminfo(running: &mut Running<BuiltinMachine>, field: &str) -> u64 {
    let text = running.command("read /proc/meminfo").await;
    let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':')).expect(field);
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() >> 10
}

/// Of its memory that devices share, what a process has touched, in MiB.
fn held(pid: i32) -> u64 {
    status(pid, "RssShmem").strip_suffix(" kB").unwrap().parse::<u64>().unwrap() >> 10
}

/// Asks the guest until it has what is wanted. There is no event for it in the guest: each question is a
/// round trip, and the deadline is the test's.
async fn until(running: &mut Running<BuiltinMachine>, field: &str, wanted: impl Fn(u64) -> bool) {
    let give_up = Instant::now() + rig::DEADLINE;
    loop {
        let mib = meminfo(running, field).await;
        if wanted(mib) {
            return;
        }
        assert!(Instant::now() < give_up, "{field} is still {mib} MiB");
    }
}

#[tokio::test]
#[ignore = "needs the parts, and KVM"]
async fn memory_grows_and_shrinks() {
    let mut rig = Rig::new();
    rig.shape.growth = SizeMib(512);
    let mut running = rig.boot_builtin().await;
    running.command("mount proc proc /proc").await;
    let before = meminfo(&mut running, "MemTotal").await;
    let grow = |mib: u64| Command::Resize { growth_bytes: Some(mib << 20), balloon_bytes: None };
    tell(&running.machine, grow(256)).await;
    until(&mut running, "MemTotal", |mib| mib > before + 200).await;
    tell(&running.machine, grow(0)).await;
    until(&mut running, "MemTotal", |mib| mib <= before).await;

    // As the shim does it: who asks hears what the guest has, and the host has back what was given.
    let Some(Growth::Asked(memory)) = running.machine.growth() else { panic!("it cannot grow") };
    assert_eq!(memory.ask(384 << 20, rig::DEADLINE).await.unwrap(), 384 << 20);
    until(&mut running, "MemTotal", |mib| mib > before + 300).await;
    running.command("mount tmpfs tmpfs /grown").await;
    let held = held(running.machine.pid());
    running.command("fill /grown/x 300").await;
    assert!(self::held(running.machine.pid()) > held + 200, "it is taken when it is touched");
    running.command("remove /grown/x").await;
    assert_eq!(memory.ask(0, rig::DEADLINE).await.unwrap(), 0);
    assert!(self::held(running.machine.pid()) < held + 150, "it is given back");
    let error = memory.ask(1 << 40, rig::DEADLINE).await.unwrap_err().to_string();
    assert!(error.contains("whole blocks"), "{error}");
    let Answer::Metrics(all) = tell(&running.machine, Command::Metrics).await else { panic!("metrics") };
    assert!(all["mem"].values().sum::<u64>() > 0, "{all:?}");

    // The balloon takes from what it has.
    let free = meminfo(&mut running, "MemFree").await;
    let blow = |mib: u64| Command::Resize { growth_bytes: None, balloon_bytes: Some(mib << 20) };
    tell(&running.machine, blow(64)).await;
    until(&mut running, "MemFree", |mib| mib + 50 < free).await;
    tell(&running.machine, blow(0)).await;
    until(&mut running, "MemFree", |mib| mib + 20 > free).await;
    running.machine.kill().await;
}

#[tokio::test]
#[ignore = "needs the parts, and KVM"]
async fn processors_come_and_go() {
    let mut rig = Rig::new();
    (rig.shape.vcpus, rig.shape.max_vcpus) = (1, 3);
    let mut running = rig.boot_builtin().await;
    running.command("mount sysfs sysfs /sys").await;
    let cpus = "/sys/devices/system/cpu";
    for (cpu, on, online) in
        [(0, "", "0"), (1, "1", "0-1"), (2, "1", "0-2"), (2, "0", "0-1"), (1, "0", "0"), (1, "1", "0-1")]
    {
        if on == "1" {
            tell(&running.machine, Command::Processors { count: cpu + 1 }).await;
        }
        if !on.is_empty() {
            running.command(&format!("write {cpus}/cpu{cpu}/online {on}")).await;
        }
        assert_eq!(running.command(&format!("read {cpus}/online")).await.trim(), online);
    }
    running.machine.kill().await;
}

/// A guest has no more of them than it was given, whatever it does.
#[tokio::test]
#[ignore = "needs the parts, and KVM"]
async fn a_processor_that_is_held_does_not_start() {
    let mut rig = Rig::new();
    (rig.shape.vcpus, rig.shape.max_vcpus) = (1, 2);
    let mut running = rig.boot_builtin().await;
    running.command("mount sysfs sysfs /sys").await;
    // The kernel waits for ten seconds until it believes it.
    running.send("write /sys/devices/system/cpu/cpu1/online 1").await;
    let refused = running.verdict().await.unwrap_err();
    assert!(refused.contains("Input/output error"), "{refused}");
    assert_eq!(running.command("read /sys/devices/system/cpu/online").await.trim(), "0");
    running.machine.kill().await;
}

/// Ten processors, and with the devices more threads than the C library makes heaps for without asking the system.
#[tokio::test]
#[ignore = "needs the parts, and KVM"]
async fn many_processors() {
    let mut rig = Rig::new();
    (rig.shape.vcpus, rig.shape.max_vcpus) = (10, 10);
    let mut running = rig.boot_builtin().await;
    running.command("mount sysfs sysfs /sys").await;
    assert_eq!(running.command("read /sys/devices/system/cpu/online").await.trim(), "0-9");
    running.machine.kill().await;
    rig.assert_nothing_left();
}
