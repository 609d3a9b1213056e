//! How long a machine takes from its launch to its guest's hello, and what it costs in memory.
//! Prints figures and asserts none. Needs the parts as `tests/machine.rs` does, and
//! `cargo build --example test_guest` before it:
//!
//! ```text
//! BULKHEAD_TEST_…=… cargo bench -p bulkhead-hypervisor --bench launch -- [--rounds N] [--memory MIB] \
//!     [--vcpus N] [--translation-buffer MIB] [--append 'WORDS']
//! ```

#[path = "../tests/rig/mod.rs"]
mod rig;

use std::{error::Error, time::Duration};

use bulkhead_hypervisor::qemu::{Qemu, QemuConfig};
use bulkhead_vmm_spec::SizeMib;

use crate::rig::Rig;

struct Options {
    rounds: usize,
    memory: u64,
    vcpus: u32,
    translation_buffer: Option<u64>,
    append: String,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options =
        Options { rounds: 10, memory: 256, vcpus: 1, translation_buffer: None, append: String::new() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--rounds" => options.rounds = value()?.parse()?,
            "--memory" => options.memory = value()?.parse()?,
            "--vcpus" => options.vcpus = value()?.parse()?,
            "--translation-buffer" => options.translation_buffer = Some(value()?.parse()?),
            "--append" => options.append = value()?,
            // Cargo's own.
            "--bench" => {}
            _ => return Err(format!("unknown option {word}").into()),
        }
    }
    Ok(options)
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = options()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(measure(options))
}

async fn measure(options: Options) -> Result<(), Box<dyn Error>> {
    let mut launched = Vec::new();
    let mut hello = Vec::new();
    let mut uptime = Vec::new();
    let mut memory: Vec<(String, Vec<u64>)> = Vec::new();
    let mut processor = Vec::new();
    for _ in 0..options.rounds {
        let mut rig = Rig::new();
        rig.shape.memory = SizeMib(options.memory);
        rig.shape.vcpus = options.vcpus;
        rig.shape.cmdline = options.append.clone();
        let mut config = QemuConfig { ..rig::config() };
        if let Some(mib) = options.translation_buffer {
            config.translation_buffer = SizeMib(mib);
        }
        let mut running = rig.boot_by(&Qemu::new(config)).await;
        launched.push(running.launched_after);
        hello.push(running.hello_after);
        uptime.push(running.guest_uptime);
        processor.push(processor_time(running.machine.pid())?);
        running.command("mount virtiofs share /share").await;
        for (name, pid) in running.machine.processes() {
            let kib = pss_kib(pid)?;
            match memory.iter_mut().find(|(known, _)| *known == name) {
                Some((_, values)) => values.push(kib),
                None => memory.push((name, vec![kib])),
            }
        }
        running.machine.kill().await;
    }
    println!("rounds {} memory {} MiB vcpus {}", options.rounds, options.memory, options.vcpus);
    let figures = [
        ("launch returned", &mut launched),
        ("launch to hello", &mut hello),
        ("guest's clock", &mut uptime),
        // The figure to compare when the host has other work: it does not count waiting.
        ("QEMU's CPU time", &mut processor),
    ];
    for (what, times) in figures {
        let [low, median, high] = spread(times);
        println!("{what:<16} median {median:>6.1?} ms  ({low:.1?} to {high:.1?})");
    }
    for (name, values) in &mut memory {
        values.sort_unstable();
        println!("{name:<20} PSS {:>7} KiB (median)", values[values.len() / 2]);
    }
    Ok(())
}

/// Smallest, median and largest in milliseconds.
fn spread(times: &mut [Duration]) -> [f64; 3] {
    times.sort_unstable();
    let at = |i: usize| times[i].as_secs_f64() * 1e3;
    [at(0), at(times.len() / 2), at(times.len() - 1)]
}

/// What a process has computed so far, in user and kernel mode.
fn processor_time(pid: i32) -> Result<Duration, Box<dyn Error>> {
    let mut total = Duration::ZERO;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // First field: nanoseconds on a processor (Documentation/scheduler/sched-stats.rst).
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        let nanos = text.split_ascii_whitespace().next().ok_or("schedstat is empty")?;
        total += Duration::from_nanos(nanos.parse()?);
    }
    Ok(total)
}

/// Memory of a process, shared pages divided by their sharers.
fn pss_kib(pid: i32) -> Result<u64, Box<dyn Error>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("Pss:")).ok_or("no Pss in smaps_rollup")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
