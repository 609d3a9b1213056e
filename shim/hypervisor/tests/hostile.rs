//! The guest is the attacker (`hostile/guest.rs`): it owns its machine and attacks every device from inside,
//! while a neighbour and the host are watched. Run in the node VM, as `tests/kvm.rs`, with
//! `BULKHEAD_TEST_HOSTILE` naming what `tests/parts/hostile-guest` built.

mod rig;

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs,
    os::unix::{fs::FileExt, net::UnixListener},
    path::{Path, PathBuf},
    time::Instant,
};

use bulkhead_hypervisor::{Exit, Machine, builtin::BuiltinMachine};
use bulkhead_vmm_spec::{
    BlockBinding, BlockShape, NetBinding, NetShape, SizeMib,
    wire::{Answer, Command},
};

use crate::rig::{Rig, Running, builtin, within};

type Counts = BTreeMap<String, BTreeMap<String, u64>>;

/// Bytes of the disks that a guest can see, in 8192 sectors as it believes, and bytes behind them: less
/// than a sector, which is no part of the disk.
const DISK: usize = 4 << 20;
const BEHIND: usize = 511;
/// What the disks are made of.
const FILL: u8 = 0x5a;

async fn counts(machine: &BuiltinMachine) -> Counts {
    match machine.command(Command::Metrics, &[]).await.unwrap() {
        Answer::Metrics(all) => all,
        other => panic!("{other:?}"),
    }
}

/// Adds a disk; answers its file.
fn add_disk(rig: &mut Rig, name: &str, read_only: bool) -> PathBuf {
    let path = rig.dir.path().join(name);
    fs::write(&path, vec![FILL; DISK + BEHIND]).unwrap();
    rig.shape.blocks.push(BlockShape { serial: name.into(), read_only });
    rig.bindings.blocks.push(BlockBinding { path: path.clone() });
    path
}

/// Adds a network card; its tap is made by the launch and ends with the machine. `up` has the host's kernel
/// take frames.
fn add_card(rig: &mut Rig) -> impl Fn() + use<> {
    let tap = format!("bhh{}", std::process::id());
    rig.shape.nets.push(NetShape { mac: [2, 0, 0, 0, 0, 9], mtu: None });
    rig.bindings.nets.push(NetBinding { tap: tap.clone(), netns: None });
    move || {
        let up = std::process::Command::new("ip").args(["link", "set", &tap, "up"]).status().unwrap();
        assert!(up.success());
    }
}

/// A number in a thread's status.
fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).expect(name);
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// KiB of the VMM's own private memory: without the guest's, which is by far the largest mapping, and of
/// which a guest has what it touches.
fn own_memory(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let number = |line: &str| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
    let (mut sum, mut size) = (0, 0);
    for line in text.lines() {
        if line.starts_with("Size:") {
            size = number(line);
        } else if line.starts_with("Anonymous:") && size < 128 << 10 {
            sum += number(line);
        }
    }
    sum
}

/// What each thread but the processors has done: its name, the clock ticks of processor time that it has
/// used, and how often it went to sleep.
fn work(pid: i32) -> BTreeMap<String, (u64, u64)> {
    let mut all = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let thread = task.file_name().into_string().unwrap();
        // The kernel's workers for an io_uring come and go; whose absence matters is asked for by name.
        let gone = |e: std::io::Error| {
            let missing = [Some(libc::ENOENT), Some(libc::ESRCH)].contains(&e.raw_os_error());
            assert!(missing, "thread {thread}: {e}");
        };
        let read = |file: &str| fs::read_to_string(task.path().join(file)).map_err(gone);
        let (Ok(stat), Ok(status)) = (read("stat"), read("status")) else { continue };
        let (name, rest) = stat.split_once('(').unwrap().1.rsplit_once(')').unwrap();
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // utime and stime are fields 14 and 15 of the whole line (proc_pid_stat(5)).
        let used = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        let slept = field(&status, "voluntary_ctxt_switches");
        if !name.starts_with("cpu") {
            all.insert(format!("{name} {thread}"), (used, slept));
        }
    }
    all
}

/// Lines that are answered to see what devices do meanwhile.
const LINES: u32 = 50;

/// Nothing of an attack may go on in the devices: what has nothing to do sleeps, and what answers lines
/// sleeps between them.
async fn assert_rest(pid: i32, attacker: &mut Running<BuiltinMachine>) {
    let before = work(pid);
    for n in 0..LINES {
        assert_eq!(attacker.command(&n.to_string()).await, "");
    }
    let after = work(pid);
    for (name, (used, slept)) in &before {
        if !after.contains_key(name) {
            assert!(name.starts_with("iou-wrk"), "{name} ended");
            continue;
        }
        let (used, slept) = (after[name].0 - used, after[name].1 - slept);
        if name.starts_with("vsock") {
            // How often depends on how fast the guest asks; what spins never does.
            assert!(slept > 0, "{name} slept {slept} times: {before:?}, then {after:?}");
        } else {
            assert!(used <= 5, "{name} used {used} ticks for nothing: {before:?}, then {after:?}");
        }
    }
}

/// Threads of the process' own. The kernel's workers for its io_urings come and go; there are at most four
/// for each processor and ring.
fn threads(pid: i32) -> usize {
    work(pid).keys().filter(|name| !name.starts_with("iou-wrk")).count()
}

fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// What the whole attack must have been refused, at least once each.
fn assert_refused(all: &Counts) {
    let count = |device: &str, name: &str| {
        let counts = all.get(device).unwrap_or_else(|| panic!("no {device} in {all:#?}"));
        *counts.get(name).unwrap_or_else(|| panic!("no {name} of {device} in {counts:#?}"))
    };
    for (device, counts) in all.iter().filter(|(device, _)| *device != "cpus") {
        assert!(counts["transport_refused"] > 0, "{device}: {counts:#?}");
        assert!(counts["transport_resets"] > 0, "{device}: {counts:#?}");
    }
    for (device, name) in [
        ("vsock", "faults"),
        ("vsock", "wrong_source"),
        ("vsock", "wrong_destination"),
        ("vsock", "wrong_type"),
        ("vsock", "unknown_operation"),
        ("vsock", "unknown_connection"),
        ("vsock", "malformed"),
        ("rng", "faults"),
        ("balloon", "faults"),
        ("balloon", "skipped"),
        ("mem", "faults"),
        ("mem", "errors"),
        ("block0", "faults"),
        ("block0", "out_of_range"),
        ("block0", "malformed"),
        ("block1", "read_only"),
    ] {
        assert!(count(device, name) > 0, "no {name} of {device} was counted: {all:#?}");
    }
}

#[tokio::test]
#[ignore = "needs the parts, and KVM"]
async fn an_attacker_harms_nobody_and_its_devices_still_serve() {
    let near = Rig::new();
    let mut neighbour = near.boot_by(&builtin()).await;
    neighbour.command("mount virtiofs share /share").await;

    let mut rig = Rig::new();
    rig.attack("pcmrv");
    rig.shape.growth = SizeMib(256);
    let writable = add_disk(&mut rig, "writable", false);
    let read_only = add_disk(&mut rig, "read-only", true);
    let up = add_card(&mut rig);
    // Who listens there never takes anything.
    let silent = rig.dir.path().join("vsock_1025");
    let _silence = UnixListener::bind(&silent).unwrap();
    let started = Instant::now();
    let machine = builtin().launch_builtin(&rig.shape, &rig.bindings, &rig.journal).await.unwrap();
    up();
    let pid = machine.pid();
    // The honest driver that comes after the attack says hello: the device was reset and serves.
    let mut attacker = rig.greeted(Box::new(machine), started).await;
    let before = (own_memory(pid), threads(pid), descriptors(pid));
    assert_refused(&counts(&attacker.machine).await);

    // All of it again, while the neighbour works.
    attacker.send("again").await;
    let attacked = Cell::new(true);
    let works = async {
        let mut n = 0;
        while attacked.get() || n < 3 {
            neighbour.command(&format!("write /share/file {n}")).await;
            assert_eq!(neighbour.command("read /share/file").await, n.to_string());
            n += 1;
        }
    };
    let returns = async {
        let hello = rig.hello(&mut *attacker.machine).await;
        attacked.set(false);
        hello
    };
    let ((session, _), ()) = tokio::join!(returns, works);
    attacker.session = session;
    let after = (own_memory(pid), threads(pid), descriptors(pid));
    assert!(after.0 <= before.0 + 512, "memory grew from {} to {} KiB", before.0, after.0);
    assert_eq!(after.1, before.1, "{before:?} became {after:?}");
    assert!(after.2 <= before.2 + 2, "{before:?} became {after:?}");
    let all = counts(&attacker.machine).await;
    println!("after two attacks: {all:?}; {after:?}");

    assert_rest(pid, &mut attacker).await;

    // The host's files: nothing behind the end, nothing where nothing may be written.
    assert_eq!(fs::read(&read_only).unwrap(), vec![FILL; DISK + BEHIND]);
    let file = fs::File::open(&writable).unwrap();
    assert_eq!(file.metadata().unwrap().len(), (DISK + BEHIND) as u64);
    let mut behind = [0; BEHIND];
    file.read_exact_at(&mut behind, DISK as u64).unwrap();
    assert_eq!(behind, [FILL; BEHIND]);

    attacker.send("restart").await;
    let end = attacker.end().await;
    assert!(end.is_guest_shutdown(rig::parts()[0]), "{end}");
    attacker.machine.kill().await;
    fs::remove_file(silent).unwrap();
    rig.assert_nothing_left();
    assert_eq!(neighbour.command("list /share").await, "file");
    neighbour.machine.kill().await;
    near.assert_nothing_left();
}

#[tokio::test]
#[ignore = "needs the parts, and KVM"]
async fn virtiofsd_may_be_the_end_of_the_attacker_alone() {
    let near = Rig::new();
    let mut neighbour = near.boot_by(&builtin()).await;
    neighbour.command("mount virtiofs share /share").await;

    let mut rig = Rig::new();
    rig.attack("mrv");
    (rig.shape.share_tag, rig.bindings.share) = (Some("share".into()), Some(rig.share()));
    fs::write(rig.share().join("file"), "untouched").unwrap();
    let mut machine = builtin().launch_builtin(&rig.shape, &rig.bindings, &rig.journal).await.unwrap();
    // virtiofsd ends on a chain that it cannot read; that is the machine's end, and it is named.
    let end = tokio::select! {
        _ = rig.listener.accept() => None,
        end = machine.ended() => Some(end),
        () = tokio::time::sleep(rig::DEADLINE) => panic!("neither an end nor a hello"),
    };
    match &end {
        Some(end) => assert_eq!((end.part.as_str(), end.asked), ("virtiofsd", false), "{end}"),
        None => assert!(counts(&machine).await["share"]["transport_refused"] > 0),
    }
    println!("the end: {end:?}");
    machine.kill().await;
    rig.assert_nothing_left();
    assert_eq!(fs::read_to_string(rig.share().join("file")).unwrap(), "untouched");
    assert_eq!(fs::read_dir(rig.share()).unwrap().count(), 1);
    neighbour.command("write /share/file text").await;
    neighbour.machine.kill().await;
}

#[tokio::test]
#[ignore = "needs the parts, and KVM"]
async fn a_guest_ends_itself_by_name() {
    for (attack, exit, words) in [("t", 0, ""), ("pt", 0, ""), ("x", 1, "KVM cannot emulate")] {
        let mut rig = Rig::new();
        rig.attack(attack);
        let mut machine = builtin().launch_builtin(&rig.shape, &rig.bindings, &rig.journal).await.unwrap();
        let end = within(machine.ended()).await;
        assert_eq!(
            (end.part.as_str(), end.exit, end.asked),
            (rig::parts()[0], Exit::Code(exit), false),
            "{end}"
        );
        assert!(end.to_string().contains(words), "{end}");
        machine.kill().await;
        rig.assert_nothing_left();
    }
    // One that stands still for good is none the less told what to do.
    let mut rig = Rig::new();
    rig.attack("h");
    let mut machine = builtin().launch_builtin(&rig.shape, &rig.bindings, &rig.journal).await.unwrap();
    for command in [Command::Pause, Command::Resume, Command::Stop] {
        assert_eq!(machine.command(command, &[]).await.unwrap(), Answer::Done);
    }
    let end = within(machine.ended()).await;
    assert_eq!(end.exit, Exit::Code(0), "{end}");
    machine.kill().await;
    assert!(!Path::new(&rig.bindings.vsock).exists());
    rig.assert_nothing_left();
}
