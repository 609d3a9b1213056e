//! What the kernel saw of a machine: its tracepoints, read from a buffer of our own (Documentation/trace/ftrace.rst).
//! Knows lines of a trace; knows no machine.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

const INSTANCES: &str = "/sys/kernel/tracing/instances";
/// Large enough that a boot fits: what is overwritten would be missed silently, so it is checked.
const BUFFER_KB: &str = "32768";
/// The number of ioctl on x86-64.
const SYS_IOCTL: u32 = 16;
/// The ioctl by which a processor runs (KVM_RUN), as the trace writes it.
const KVM_RUN: &str = "ae80,";
/// The number of execve.
const SYS_EXECVE: u32 = 59;
/// What the stop-clock writes into the trace.
const STOP: &str = "bulkhead-hello";

/// A trace buffer; it goes with this value.
pub(crate) struct Tracer(PathBuf);

/// What happened until the stop-clock, or until the end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    /// From the first entry into the guest to the stop-clock, in nanoseconds of the host's clock.
    pub(crate) nanos: u64,
    /// Exits from the guest by reason.
    pub(crate) exits: BTreeMap<String, u64>,
    /// Of them, those that the VMM had to handle, by reason.
    pub(crate) to_userspace: BTreeMap<String, u64>,
    /// Accesses of ports and of devices' memory that KVM did not answer, by direction and address.
    pub(crate) accesses: BTreeMap<String, u64>,
    /// System calls of the VMM until the stop-clock, by number.
    pub(crate) calls: BTreeMap<u32, u64>,
    /// Calls of ioctl until then that let a processor run.
    pub(crate) runs: u64,
    /// Distinct system calls of a whole life, on all threads.
    pub(crate) life: BTreeSet<u32>,
    /// Distinct system calls of a whole life on a processor's thread.
    pub(crate) life_cpu: BTreeSet<u32>,
}

impl Counts {
    /// Calls of ioctl until the stop-clock that do not let a processor run: what it takes to make a machine.
    pub(crate) fn ioctls_to_make(&self) -> u64 {
        self.calls.get(&SYS_IOCTL).copied().unwrap_or(0) - self.runs
    }
}

/// One line.
struct Line<'a> {
    thread: i32,
    comm: &'a str,
    nanos: u64,
    event: &'a str,
    rest: &'a str,
}

impl<'a> Line<'a> {
    /// `<comm>-<tid> [<cpu>] <flags> <seconds>: <event>: <rest>`; a comm may hold anything but is padded.
    fn parse(line: &'a str) -> Option<Self> {
        let (who, rest) = line.split_once(" [")?;
        let (comm, thread) = who.trim().rsplit_once('-')?;
        let (_, rest) = rest.split_once("] ")?;
        let (_flags, rest) = rest.trim_start().split_once(' ')?;
        let (stamp, rest) = rest.trim_start().split_once(": ")?;
        let (event, rest) = rest.split_once(": ").unwrap_or((rest, ""));
        let (seconds, micros) = stamp.split_once('.')?;
        let nanos = seconds.parse::<u64>().ok()? * 1_000_000_000 + micros.parse::<u64>().ok()? * 1000;
        Some(Self { thread: thread.parse().ok()?, comm, nanos, event, rest })
    }

    /// The word behind `name`.
    fn word(&self, name: &str) -> Option<&'a str> {
        let mut words = self.rest.split_ascii_whitespace();
        words.find(|w| *w == name)?;
        words.next()
    }
}

impl Tracer {
    /// A buffer that is recording `events` (`system/event`).
    pub(crate) fn start(events: &[&str]) -> io::Result<Self> {
        let dir = Path::new(INSTANCES).join(format!("bulkhead-{}", std::process::id()));
        fs::create_dir(&dir)?;
        let tracer = Self(dir);
        // Of an old kernel's text the time is the field before the colon in any case.
        for (file, value) in [("trace_clock", "mono"), ("buffer_size_kb", BUFFER_KB)] {
            tracer.set(file, value)?;
        }
        for event in events {
            tracer.set(&format!("events/{event}/enable"), "1")?;
        }
        Ok(tracer)
    }

    fn set(&self, file: &str, value: &str) -> io::Result<()> {
        let path = self.0.join(file);
        fs::write(&path, value).map_err(|e| io::Error::other(format!("{}: {e}", path.display())))
    }

    /// Stops the clock.
    pub(crate) fn stop_clock(&self) -> io::Result<()> {
        self.set("trace_marker", STOP)
    }

    /// What was recorded, of which `threads` are the VMM's.
    /// The text itself is kept at `keep`, if that is given.
    pub(crate) fn counts(self, threads: &BTreeSet<i32>, keep: Option<&Path>) -> io::Result<Counts> {
        self.set("tracing_on", "0")?;
        self.nothing_lost()?;
        let text = fs::read_to_string(self.0.join("trace"))?;
        if let Some(path) = keep {
            fs::write(path, &text)?;
        }
        let mut counts = Counts::default();
        let (mut first, mut stopped) = (None, false);
        for line in text.lines().filter(|l| !l.starts_with('#')).filter_map(Line::parse) {
            if line.event == "tracing_mark_write" && line.rest.trim() == STOP {
                counts.nanos = line.nanos - first.unwrap_or(line.nanos);
                stopped = true;
            }
            if !threads.contains(&line.thread) {
                continue;
            }
            if line.event == "kvm_entry" {
                first.get_or_insert(line.nanos);
            }
            if line.event == "sys_enter" {
                counts.called(&line, stopped);
            }
            if !stopped {
                counts.happened(&line);
            }
        }
        if !stopped || first.is_none() {
            return Err(io::Error::other("the trace holds no entry into a guest, or no hello"));
        }
        Ok(counts)
    }

    fn nothing_lost(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.0.join("per_cpu"))? {
            let text = fs::read_to_string(entry?.path().join("stats"))?;
            let lost = text.lines().filter(|l| l.starts_with("overrun:") || l.starts_with("dropped events:"));
            if lost.clone().any(|l| !l.trim().ends_with(" 0")) {
                return Err(io::Error::other(format!(
                    "the trace buffer was too small: {:?}",
                    lost.collect::<Vec<_>>()
                )));
            }
        }
        Ok(())
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("the trace buffer {} stays: {error}", self.0.display());
        }
    }
}

impl Counts {
    fn happened(&mut self, line: &Line<'_>) {
        let one = |map: &mut BTreeMap<String, u64>, key: &str| *map.entry(key.to_owned()).or_default() += 1;
        match line.event {
            "kvm_exit" => one(&mut self.exits, line.word("reason").unwrap_or("?")),
            "kvm_userspace_exit" => one(&mut self.to_userspace, line.word("reason").unwrap_or("?")),
            "kvm_pio" => {
                let words: Vec<_> = line.rest.split_ascii_whitespace().take(3).collect();
                one(&mut self.accesses, &words.join(" "));
            }
            "kvm_msr" => one(&mut self.accesses, line.rest.split(" = ").next().unwrap_or("?")),
            "kvm_cpuid" => one(&mut self.accesses, &format!("cpuid {}", line.word("func").unwrap_or("?"))),
            "kvm_mmio" => {
                let kind = line.word("mmio").unwrap_or("?");
                if kind != "unsatisfied-read" {
                    one(&mut self.accesses, &format!("{kind} {}", line.word("gpa").unwrap_or("?")));
                }
            }
            _ => {}
        }
    }

    fn called(&mut self, line: &Line<'_>, stopped: bool) {
        let Some(number) = line.word("NR").and_then(|n| n.parse().ok()) else { return };
        if number == SYS_EXECVE {
            // What came before was our own child on its way to become the VMM.
            (self.life, self.calls, self.runs) = Default::default();
        }
        self.life.insert(number);
        if line.comm.starts_with("cpu") {
            self.life_cpu.insert(number);
        }
        if !stopped {
            *self.calls.entry(number).or_default() += 1;
            // `NR 16 (<fd>, <command>, …)`
            self.runs += u64::from(number == SYS_IOCTL && line.rest.split(' ').nth(3) == Some(KVM_RUN));
        }
    }
}
