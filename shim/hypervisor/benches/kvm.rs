//! What a machine costs on KVM, as counts that repeat: instructions, exits, ioctls, system calls, memory.
//! Run in a node with `NODE_ICOUNT=1`, whose clock counts instructions, by `make bench-kvm`; elsewhere the
//! counts of exits and calls hold too, and the time is a time. Prints a table and writes JSON; asserts nothing.
//!
//! ```text
//! BULKHEAD_TEST_…=… kvm --initrd FILE [--output FILE] [--memory MIB,MIB] [--room PROCESSORS,MIB] [--qemu PROGRAM] [--net] [--accesses] [--trace FILE] [--append WORDS] [--times ROUNDS] [--deadline SECONDS]
//! ```
//! `--room` measures the first size once more, with room for so many processors and so much more memory.
//! `--accesses` prints what was accessed, `--trace` keeps the last trace. `--times` measures nothing but the time from
//! launch to hello and to the machine's end, of ours and of QEMU's machines in turns; what takes longer than the
//! deadline (60 s each) is told and left out.
//! `--qemu` is a program that runs QEMU's microvm on KVM, for comparison (tests/perf/qemu-kvm).

#[path = "../tests/rig/mod.rs"]
mod rig;
mod trace;

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command as Program,
    time::{Duration, Instant},
};

use bulkhead_hypervisor::{
    Machine,
    builtin::BuiltinMachine,
    qemu::{Qemu, QemuConfig},
};
use bulkhead_vmm_spec::{
    NetBinding, NetShape, SizeMib,
    wire::{Answer, Command},
};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, net::UnixStream};

use crate::{
    rig::{Rig, builtin, within},
    trace::{Counts, Tracer},
};

type Failure = Box<dyn Error>;

/// For the time alone: what is recorded costs instructions too.
const ENTRIES: &[&str] = &["kvm/kvm_entry"];
const KVM_EVENTS: &[&str] = &["kvm/kvm_entry", "kvm/kvm_exit", "kvm/kvm_userspace_exit"];
const ALL_EVENTS: &[&str] = &[
    "kvm/kvm_entry",
    "kvm/kvm_exit",
    "kvm/kvm_userspace_exit",
    "kvm/kvm_pio",
    "kvm/kvm_mmio",
    "kvm/kvm_msr",
    "kvm/kvm_cpuid",
    "raw_syscalls/sys_enter",
];
/// The tap that a network card is measured with.
const TAP: &str = "bh-bench0";

/// What a machine may be given later.
#[derive(Clone, Copy)]
struct Room {
    processors: u32,
    memory: u64,
}

struct Options {
    initrd: Vec<u8>,
    output: Option<PathBuf>,
    memory: Vec<u64>,
    room: Option<Room>,
    qemu: Option<PathBuf>,
    net: bool,
    accesses: bool,
    trace: Option<PathBuf>,
    append: String,
    times: Option<usize>,
    deadline: Duration,
}

fn options() -> Result<Options, Failure> {
    let mut options = Options {
        initrd: Vec::new(),
        output: None,
        memory: vec![512, 2048],
        room: None,
        qemu: None,
        net: false,
        accesses: false,
        trace: None,
        append: String::new(),
        times: None,
        deadline: rig::DEADLINE,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--initrd" => options.initrd = fs::read(value()?)?,
            "--output" => options.output = Some(value()?.into()),
            "--memory" => options.memory = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--room" => {
                let value = value()?;
                let (processors, memory) = value.split_once(',').ok_or("--room wants PROCESSORS,MIB")?;
                options.room = Some(Room { processors: processors.parse()?, memory: memory.parse()? });
            }
            "--qemu" => options.qemu = Some(value()?.into()),
            "--net" => options.net = true,
            "--trace" => options.trace = Some(value()?.into()),
            "--append" => options.append = value()?,
            "--times" => options.times = Some(value()?.parse()?),
            "--deadline" => options.deadline = Duration::from_secs(value()?.parse()?),
            "--accesses" => options.accesses = true,
            // Cargo's own.
            "--bench" => {}
            _ => return Err(format!("unknown option {word}").into()),
        }
    }
    if options.initrd.is_empty() {
        return Err("--initrd must name the guest image with the agent".into());
    }
    Ok(options)
}

fn main() -> Result<(), Failure> {
    let options = options()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match options.times {
        Some(rounds) => runtime.block_on(times(&options, rounds)),
        None => runtime.block_on(measure(&options)),
    }
}

async fn measure(options: &Options) -> Result<(), Failure> {
    let mut all = Vec::new();
    let with_room = options.room.and_then(|room| Some((*options.memory.first()?, Some(room))));
    for (memory, room) in options.memory.iter().map(|&memory| (memory, None)).chain(with_room) {
        let ours = ours(options, memory, room).await?;
        print(&ours, options.accesses);
        all.push(ours.json());
        if let Some(qemu) = options.qemu.as_ref().filter(|_| room.is_none()) {
            let theirs = qemu_microvm(options, memory, qemu).await?;
            print(&theirs, false);
            all.push(theirs.json());
        }
    }
    let program = fs::metadata(rig::part("BULKHEAD_TEST_VMM"))?.len();
    println!("the VMM's program: {:.2} MiB", program as f64 / f64::from(1 << 20));
    if let Some(path) = &options.output {
        let icount = fs::read_to_string("/proc/cpuinfo")?.matches("processor\t").count() == 1;
        let text = json!({ "vmm_bytes": program, "one_processor": icount, "machines": all });
        fs::write(path, serde_json::to_string_pretty(&text)?)?;
    }
    Ok(())
}

/// One machine, measured.
struct Measured {
    what: String,
    /// From the first entry into the guest to the hello, of a boot that was traced least, in nanoseconds.
    nanos: u64,
    /// A boot of which only exits were traced.
    exits: Counts,
    /// One of which everything was traced, to its end.
    calls: Counts,
    memory: Memory,
    /// The VMM's own counters at the hello.
    own: BTreeMap<String, u64>,
}

/// A process's memory in KiB.
#[derive(Debug, Default)]
struct Memory {
    guest: u64,
    /// Of it, in pages of 2 MiB.
    guest_huge: u64,
    /// Beside the guest's: of this process alone.
    private: u64,
    /// Of that, what it has written.
    dirty: u64,
}

impl Measured {
    /// Those that make the machine, and one for each time that the processor runs. These are taken from the run that
    /// was traced less: where all calls are, the guest gets further before the host has the hello.
    fn ioctls(&self) -> u64 {
        self.calls.ioctls_to_make() + self.exits.to_userspace.values().sum::<u64>() + 1
    }

    fn json(&self) -> Value {
        let Measured { what, nanos, exits: seen, calls, memory, own } = self;
        json!({
            "what": what,
            "nanos_to_hello": nanos,
            "exits": seen.exits,
            "exits_total": seen.exits.values().sum::<u64>(),
            "to_userspace": seen.to_userspace,
            "to_userspace_total": seen.to_userspace.values().sum::<u64>(),
            "ioctls": self.ioctls(),
            "calls_to_hello": calls.calls.values().sum::<u64>(),
            "distinct_calls_of_a_life": calls.life.len(),
            "distinct_calls_of_a_processor": calls.life_cpu.len(),
            "own_counters": own,
            "accesses": calls.accesses,
            "memory_kib": {
                "guest": memory.guest, "guest_in_2_mib_pages": memory.guest_huge,
                "private": memory.private, "dirty": memory.dirty,
            },
        })
    }
}

fn print(m: &Measured, accesses: bool) {
    let total = |map: &BTreeMap<String, u64>| map.values().sum::<u64>();
    println!("{}", m.what);
    println!("  to the hello     {:.2} M instructions or ns/1e6", m.nanos as f64 / 1e6);
    println!("  exits            {:>6}  {}", total(&m.exits.exits), by_count(&m.exits.exits));
    println!("  to userspace     {:>6}  {}", total(&m.exits.to_userspace), by_count(&m.exits.to_userspace));
    println!("  own counters     {:?}", m.own);
    println!(
        "  ioctls           {:>6}  {} of them to make the machine",
        m.ioctls(),
        m.calls.ioctls_to_make()
    );
    println!("  system calls     {:>6} to the hello", m.calls.calls.values().sum::<u64>());
    println!(
        "  distinct         {:>6} in a life, {} on a processor's thread",
        m.calls.life.len(),
        m.calls.life_cpu.len()
    );
    println!(
        "  memory KiB       {:>6} private beside the guest's ({} written); guest {} of which {} in 2 MiB pages",
        m.memory.private, m.memory.dirty, m.memory.guest, m.memory.guest_huge
    );
    if accesses {
        println!("{}", by_count(&m.calls.accesses).replace(", ", "\n    "));
        println!("  calls {:?} in a life {:?}", m.calls.calls, m.calls.life);
    }
}

/// The most frequent first.
fn by_count(map: &BTreeMap<String, u64>) -> String {
    let mut list: Vec<_> = map.iter().collect();
    list.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
    list.iter().map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>().join(", ")
}

fn rig(options: &Options, memory: u64) -> Result<Rig, Failure> {
    let mut rig = Rig::with_initrd(&options.initrd);
    rig.shape.memory = SizeMib(memory);
    rig.shape.cmdline = options.append.clone();
    if options.net {
        rig.shape.nets = vec![NetShape { mac: [2, 0, 0, 0, 0, 1], mtu: None }];
        rig.bindings.nets = vec![NetBinding { tap: TAP.into(), netns: None }];
    }
    Ok(rig)
}

/// A tap that goes with this value.
struct Tap;

impl Tap {
    fn new() -> Result<Self, Failure> {
        let made = Program::new("ip").args(["tuntap", "add", "mode", "tap", "vnet_hdr", TAP]).status()?;
        if made.success() { Ok(Self) } else { Err(format!("ip cannot make the tap {TAP}").into()) }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Program::new("ip").args(["link", "delete", TAP]).status();
    }
}

/// Waits for the guest's first bytes.
async fn hello(rig: &Rig, machine: &mut dyn Machine) -> Result<UnixStream, Failure> {
    let dialled = tokio::select! {
        dialled = within(rig.listener.accept()) => dialled,
        end = machine.ended() => return Err(format!("no hello: {end}").into()),
    };
    let (mut stream, _) = dialled?;
    let mut byte = [0];
    within(stream.read_exact(&mut byte)).await?;
    Ok(stream)
}

async fn ours(options: &Options, memory: u64, room: Option<Room>) -> Result<Measured, Failure> {
    let _tap = options.net.then(Tap::new).transpose()?;
    // The first one warms caches.
    boot_ours(options, memory, room, ENTRIES).await?;
    let nanos = boot_ours(options, memory, room, ENTRIES).await?.0.nanos;
    let (exits, ..) = boot_ours(options, memory, room, KVM_EVENTS).await?;
    let (calls, use_of_memory, own) = boot_ours(options, memory, room, ALL_EVENTS).await?;
    let network = if options.net { ", network" } else { "" };
    let room = room.map_or(String::new(), |room| {
        format!(", room for {} processors and {} MiB more", room.processors, room.memory)
    });
    let what = format!("bulkhead-vmm, {memory} MiB{network}{room}");
    Ok(Measured { what, nanos, exits, calls, memory: use_of_memory, own })
}

async fn boot_ours(
    options: &Options,
    memory: u64,
    room: Option<Room>,
    events: &[&str],
) -> Result<(Counts, Memory, BTreeMap<String, u64>), Failure> {
    let mut rig = rig(options, memory)?;
    if let Some(room) = room {
        rig.shape.max_vcpus = room.processors;
        rig.shape.growth = SizeMib(room.memory);
    }
    let tracer = Tracer::start(events)?;
    let mut machine = builtin().launch_builtin(&rig.shape, &rig.bindings, &rig.journal).await?;
    let stream = hello(&rig, &mut machine).await?;
    tracer.stop_clock()?;
    let own = counters(&machine).await?;
    let (threads, memory) = (threads(machine.pid())?, use_of_memory(machine.pid())?);
    drop(stream);
    // The agent ends the machine when the host hangs up: a whole life.
    within(machine.ended()).await;
    machine.kill().await;
    Ok((tracer.counts(&threads, options.trace.as_deref())?, memory, own))
}

/// From launch to hello, and to the end, by the clock, in turns: each kind begins every second round.
async fn times(options: &Options, rounds: usize) -> Result<(), Failure> {
    let qemu = options.qemu.as_deref();
    for &memory in &options.memory {
        // Hellos and whole lives.
        let (mut ours, mut theirs) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
        // The first round warms caches.
        for round in 0..=rounds {
            for of_qemu in if round % 2 == 0 { [false, true] } else { [true, false] } {
                if of_qemu && qemu.is_none() {
                    continue;
                }
                let (kind, seen) =
                    if of_qemu { ("QEMU microvm", &mut theirs) } else { ("bulkhead-vmm", &mut ours) };
                match life(options, memory, qemu.filter(|_| of_qemu)).await {
                    Ok((hello, end)) if round > 0 => {
                        seen.0.push(hello);
                        seen.1.extend(end);
                    }
                    Ok(_) => {}
                    // A busy machine: one round less, not none.
                    Err(e) => println!("round {round}, {kind}: {e}; left out"),
                }
            }
        }
        for (what, ours, theirs) in
            [("launch to hello", ours.0, theirs.0), ("launch to the machine's end", ours.1, theirs.1)]
        {
            compare(&format!("{what}, {memory} MiB"), ours, theirs);
        }
    }
    Ok(())
}

/// Prints two lists of seconds, measured in turns, as a line each.
fn compare(what: &str, mut ours: Vec<f64>, mut theirs: Vec<f64>) {
    if ours.is_empty() {
        return println!("{what}: no round of bulkhead-vmm was in time");
    }
    let (rounds, [low, middle, high]) = (ours.len(), quartiles(&mut ours));
    println!("{what}, {rounds} rounds: bulkhead-vmm {middle:.3} s ({low:.3} .. {high:.3})");
    if !theirs.is_empty() {
        let (rounds, [low, theirs, high]) = (theirs.len(), quartiles(&mut theirs));
        let ratio = theirs / middle;
        println!(
            "  QEMU microvm {theirs:.3} s ({low:.3} .. {high:.3}), {rounds} rounds: {ratio:.2} times ours"
        );
    }
}

/// One machine's life, of our VMM or of the QEMU that `qemu` is: how long until its hello and until its end.
/// QEMU's is killed after its hello: on KVM it did not end in 100 s when the host had hung up.
async fn life(options: &Options, memory: u64, qemu: Option<&Path>) -> Result<(f64, Option<f64>), Failure> {
    let rig = rig(options, memory)?;
    let clock = Instant::now();
    let launch = async {
        let launched: Result<Box<dyn Machine>, Failure> = match qemu {
            Some(program) => {
                let qemu = Qemu::new(QemuConfig { qemu: program.into(), ..rig::config() });
                let launch =
                    bulkhead_hypervisor::Hypervisor::launch(&qemu, &rig.shape, &rig.bindings, &rig.journal);
                Ok(launch.await?)
            }
            None => Ok(Box::new(builtin().launch_builtin(&rig.shape, &rig.bindings, &rig.journal).await?)),
        };
        launched
    };
    let mut machine = in_time(options, "was not launched", launch).await??;
    let times = async {
        let (mut stream, _) = tokio::select! {
            dialled = in_time(options, "did not say hello", rig.listener.accept()) => dialled??,
            end = machine.ended() => return Err(format!("no hello: {end}").into()),
        };
        in_time(options, "did not say hello to its end", stream.read_exact(&mut [0])).await??;
        let hello = clock.elapsed();
        drop(stream);
        let mut end = None;
        if qemu.is_none() {
            in_time(options, "did not end", machine.ended()).await?;
            end = Some(clock.elapsed().as_secs_f64());
        }
        Ok::<_, Failure>((hello.as_secs_f64(), end))
    };
    let times = times.await;
    machine.kill().await;
    times
}

/// What this future answers, or who did not do what within the deadline.
async fn in_time<T>(options: &Options, failed: &str, future: impl Future<Output = T>) -> Result<T, Failure> {
    let limit = options.deadline;
    tokio::time::timeout(limit, future).await.map_err(|_| format!("{failed} within {limit:?}").into())
}

/// Lower quartile, median and upper quartile.
fn quartiles(values: &mut [f64]) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|n| values[(values.len() * n / 4).min(values.len() - 1)])
}

async fn counters(machine: &BuiltinMachine) -> Result<BTreeMap<String, u64>, Failure> {
    match machine.command(Command::Metrics, &[]).await? {
        Answer::Metrics(mut all) => Ok(all.remove("cpus").ok_or("no counters of processors")?),
        other => Err(format!("an answer that was not asked for: {other:?}").into()),
    }
}

async fn qemu_microvm(options: &Options, memory: u64, program: &Path) -> Result<Measured, Failure> {
    let mut runs = Vec::new();
    for events in [ENTRIES, ENTRIES, KVM_EVENTS, ALL_EVENTS] {
        let mut rig = rig(options, memory)?;
        rig.shape.nets.clear();
        rig.bindings.nets.clear();
        let tracer = Tracer::start(events)?;
        let qemu = Qemu::new(QemuConfig { qemu: program.into(), ..rig::config() });
        let mut machine =
            bulkhead_hypervisor::Hypervisor::launch(&qemu, &rig.shape, &rig.bindings, &rig.journal).await?;
        let stream = hello(&rig, &mut *machine).await?;
        tracer.stop_clock()?;
        let (threads, memory) = (threads(machine.pid())?, use_of_memory(machine.pid())?);
        drop(stream);
        within(machine.ended()).await;
        machine.kill().await;
        runs.push((tracer.counts(&threads, options.trace.as_deref())?, memory));
    }
    let (calls, use_of_memory) = runs.pop().ok_or("no run")?;
    let (exits, _) = runs.pop().ok_or("no run")?;
    let nanos = runs.pop().ok_or("no run")?.0.nanos;
    let what = format!("QEMU microvm on KVM, {memory} MiB");
    Ok(Measured { what, nanos, exits, calls, memory: use_of_memory, own: BTreeMap::new() })
}

fn threads(pid: i32) -> Result<BTreeSet<i32>, Failure> {
    let mut all = BTreeSet::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        all.insert(task?.file_name().to_string_lossy().parse()?);
    }
    Ok(all)
}

/// Sums a process's smaps: the guest's memory is the mappings of a memfd.
fn use_of_memory(pid: i32) -> Result<Memory, Failure> {
    let mut sum = Memory::default();
    let mut guest = false;
    for line in fs::read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        let Some(kib) = value.trim().strip_suffix(" kB").and_then(|v| v.parse::<u64>().ok()) else {
            // A line that begins a mapping holds colons too (the device's number), and its file's name.
            if line.contains('-') {
                guest = line.contains("memfd:");
            }
            continue;
        };
        match (name, guest) {
            ("Rss", true) => sum.guest += kib,
            ("ShmemPmdMapped", true) => sum.guest_huge += kib,
            ("Private_Clean", false) => sum.private += kib,
            ("Private_Dirty", false) => {
                sum.private += kib;
                sum.dirty += kib;
            }
            _ => {}
        }
    }
    Ok(sum)
}
