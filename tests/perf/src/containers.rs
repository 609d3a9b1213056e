//! Containers of ctr and pods of CRI, through one containerd; draws one start.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use crate::ctr::{Ctr, Runtime};
use crate::files::{self, Files};
use crate::host::{self, Operator};
use crate::memory::{self, Growth, Point};
use crate::pods::{AT_ONCE, Crictl, Pods};
use crate::report::{MIB, Measure, Report, Unit};
use crate::rounds::{self, Bench, Starts, Times};
use crate::timeline::{self, Span};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Rounds; each measures both runtimes, in turns first
    #[arg(long, default_value_t = 12)]
    rounds: usize,
    /// Rounds of what files of the host cost; 0 skips it
    #[arg(long, default_value_t = 4)]
    file_rounds: usize,
    /// Numbers of idle pods at which memory is measured; none skips it
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8")]
    pods: Vec<usize>,
    /// How long pods are left alone before their memory is measured
    #[arg(long, default_value_t = 30)]
    idle_seconds: u64,
    /// Directory for result.json, table.txt and timeline.svg
    #[arg(long)]
    output: PathBuf,
    /// The client `ctr`
    #[arg(long)]
    ctr: PathBuf,
    /// Socket of containerd
    #[arg(long)]
    address: PathBuf,
    /// The client `crictl`, whose environment names containerd; without it pods of CRI are not measured
    #[arg(long)]
    crictl: Option<PathBuf>,
    /// Namespace of containerd
    #[arg(long, default_value = "default")]
    namespace: String,
    /// An image with busybox
    #[arg(long)]
    image: String,
    /// The configuration that containerd hands to the shims; a trace file is set in it while starts are measured
    #[arg(long)]
    config: PathBuf,
    /// The command `bulkhead`
    #[arg(long)]
    bulkhead: PathBuf,
    /// The program containerd-shim-bulkhead-v2
    #[arg(long)]
    shim: PathBuf,
    /// The guest's kernel
    #[arg(long)]
    kernel: PathBuf,
    /// What is measured, for the record
    #[arg(long, default_value = "unknown")]
    commit: String,
}

/// Measures, and writes what was found out.
///
/// # Errors
/// Something could not be measured; the rest was.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let folder = &arguments.output;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let operator = Operator {
        program: arguments.bulkhead.clone(),
        before: Vec::new(),
        environment: vec![
            ("BULKHEAD_CONFIG", arguments.config.clone()),
            ("CONTAINERD_ADDRESS", arguments.address.clone()),
        ],
    };
    let host = host::Host::look(&operator, &arguments.commit)?;
    let trace = folder.join("trace.jsonl");
    let bench = Bench::new(Ctr {
        program: arguments.ctr.clone(),
        address: arguments.address.clone(),
        namespace: arguments.namespace.clone(),
        image: arguments.image.clone(),
    });
    let mut report = measure(arguments, &bench, host, &trace).await;
    // After failures too: what we started ends with us.
    let kept = bench.remove_all().await;
    report.left_behind.extend(kept);
    let pods = operator.ask("ps")?;
    report.left_behind.extend(bench.left_behind(&pods));

    let drawn = timeline::svg("one start (ctr run … echo), the median of those measured", &report.timeline);
    fs::write(folder.join("timeline.svg"), drawn)?;
    report.save(folder, ", timeline.svg")
}

/// A configuration with a trace file set; as it was before once this is dropped.
///
/// It is the file that containerd's environment names, since a shim starts to write spans before it has seen any
/// option of its container.
struct Traced {
    config: PathBuf,
    before: String,
}

impl Traced {
    fn set(config: &Path, trace: &Path) -> anyhow::Result<Self> {
        let before =
            fs::read_to_string(config).with_context(|| format!("cannot read {}", config.display()))?;
        let rest: String = before
            .lines()
            .filter(|line| !line.starts_with("trace_file"))
            .map(|line| format!("{line}\n"))
            .collect();
        // A key of the top stands before every section.
        replace(config, &format!("trace_file = {trace:?}\n{rest}"))?;
        Ok(Self { config: config.to_owned(), before })
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        if let Err(error) = replace(&self.config, &self.before) {
            eprintln!("bench: {error:#}; remove the key trace_file from it");
        }
    }
}

/// A shim that starts meanwhile reads the old text or the new.
fn replace(file: &Path, text: &str) -> anyhow::Result<()> {
    let next = file.with_extension("next");
    fs::write(&next, text)
        .and_then(|()| fs::rename(&next, file))
        .with_context(|| format!("cannot write {}", file.display()))
}

async fn measure(arguments: &Arguments, bench: &Bench, host: host::Host, trace: &Path) -> Report {
    // What fails leaves a gap in the table, not the table undone.
    let (mut problems, mut left_behind) = (Vec::new(), Vec::new());
    eprintln!("starts: {} rounds", arguments.rounds);
    let mut starts = Starts::default();
    let outcome = traced_starts(arguments, bench, trace, &mut starts).await;
    or_gap(&mut problems, "starts", outcome);
    eprintln!("exec: {} rounds", arguments.rounds);
    let execs = or_gap(&mut problems, "exec", bench.execs(arguments.rounds).await);
    let agent = or_gap(&mut problems, "agent", bench.agent_resident().await);
    let (mut idle_runc, mut idle) = (Idle::default(), Idle::default());
    let outcome = grow(arguments, bench, Runtime::Runc, &mut idle_runc).await;
    or_gap(&mut problems, "memory of runc", outcome);
    let outcome = grow(arguments, bench, Runtime::Bulkhead, &mut idle).await;
    or_gap(&mut problems, "memory of bulkhead", outcome);
    let pods = match &arguments.crictl {
        Some(program) => Some(of_cri(arguments, program, &mut problems, &mut left_behind).await),
        None => None,
    };
    let mut of_files = Files::default();
    if arguments.file_rounds > 0 {
        eprintln!("files: {} rounds", arguments.file_rounds);
        let folder = arguments.output.join("files");
        let outcome = files::measure(bench, &folder, arguments.file_rounds, &mut of_files).await;
        or_gap(&mut problems, "files", outcome);
    }
    let (memory_runc, memory_bulkhead) = (idle_runc.growth(), idle.growth());
    let size = |path: &PathBuf| fs::metadata(path).map(|file| file.len() as f64).ok();
    let growth = |pick: fn(&Growth) -> Option<f64>| {
        let of = |growth: &Option<Growth>| growth.as_ref().and_then(pick).into_iter().collect::<Vec<_>>();
        (of(&memory_runc), of(&memory_bulkhead))
    };
    let slope = |name, pick| {
        let (runc, bulkhead) = growth(pick);
        Measure { ratio: None, ..Measure::beside(name, Unit::Bytes, &runc, &bulkhead) }
    };
    let counts = arguments.pods.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let timeline = starts.timeline();
    let Times { runc, bulkhead } = &starts.total;
    // Of machines on KVM only ratios are promised, for times there are a host's.
    let kvm = host.acceleration.starts_with("hardware");
    let (start, exec) = if kvm { ((2.5, Unit::TimesRunc), 1.2) } else { ((1.5, Unit::Seconds), 2.0) };
    let launch_to_hello = Measure::alone("launch to Hello", Unit::Seconds, &starts.launch_to_hello);
    let idle_memory = slope("host memory a pod", |growth| growth.pss_per_pod).with_note(format!(
        "slope of PSS over {counts} pods, {} s idle{}",
        arguments.idle_seconds,
        memory_bulkhead.as_ref().map(by_program).unwrap_or_default()
    ));
    let mut measures = vec![
        Measure::beside("ctr run --rm … true", Unit::Seconds, runc, bulkhead)
            .at_most(start.0, start.1)
            .with_note(stages(&timeline)),
        Measure::beside("first byte", Unit::Seconds, &starts.first_byte.runc, &starts.first_byte.bulkhead)
            .with_note(silence(&starts.silent)),
        if kvm { launch_to_hello } else { launch_to_hello.at_most(0.7, Unit::Seconds).with_note(kernel(&timeline)) },
        Measure::beside("ctr task exec … true", Unit::Seconds, &execs.runc, &execs.bulkhead)
            .at_most(exec, Unit::TimesRunc),
        Measure { ratio: None, ..Measure::beside("processor time of a start", Unit::Seconds, &idle_runc.cpu, &idle.cpu) }
            .with_note("of the pod's processes until its command runs; other work on the machine changes it little"),
        Measure::alone("shim program", Unit::Bytes, &Vec::from_iter(size(&arguments.shim))).at_most(8.0 * MIB, Unit::Bytes),
        Measure::alone("shim private memory", Unit::Bytes, &idle.shim_private)
            .at_most(12.0 * MIB, Unit::Bytes)
            .with_note("of the shims of idle pods; pages of the program that they share are not counted"),
        Measure::alone("agent resident", Unit::Bytes, &Vec::from_iter(agent))
            .at_most(6.0 * MIB, Unit::Bytes)
            .with_note("agent and launcher together: all anonymous and mapped pages of the guest less the container's"),
        Measure::alone("guest kernel", Unit::DecimalBytes, &Vec::from_iter(size(&arguments.kernel)))
            .at_most(25e6, Unit::DecimalBytes),
        if kvm { idle_memory.at_most(64.0 * MIB, Unit::Bytes) } else { idle_memory },
        slope("- of it guest memory", |growth| growth.pss_memfd_per_pod),
        slope("- by MemAvailable", |growth| growth.available_per_pod),
    ];
    measures.extend(pods.iter().flat_map(|pods| steps(pods, kvm)));
    measures.extend(of_files.lines());
    Report {
        host,
        start_state: "warm cache",
        network: "none",
        rounds: arguments.rounds,
        load_after: host::load(),
        measures,
        memory_runc,
        memory_bulkhead,
        timeline,
        problems,
        left_behind,
    }
}

/// The starts, while shims write their spans.
async fn traced_starts(
    arguments: &Arguments,
    bench: &Bench,
    trace: &Path,
    starts: &mut Starts,
) -> anyhow::Result<()> {
    let _traced = Traced::set(&arguments.config, trace)?;
    bench.starts(arguments.rounds, trace, starts).await
}

/// A result, or nothing and the reason among the problems.
fn or_gap<T: Default>(problems: &mut Vec<String>, what: &str, result: anyhow::Result<T>) -> T {
    result.unwrap_or_else(|error| {
        problems.push(format!("{what}: {error:#}"));
        T::default()
    })
}

/// What idle pods of one runtime showed.
#[derive(Default)]
struct Idle {
    points: Vec<Point>,
    /// Processor seconds of each start.
    cpu: Vec<f64>,
    /// Private memory of each shim, where most pods ran.
    shim_private: Vec<f64>,
}

impl Idle {
    fn growth(&self) -> Option<Growth> {
        (!self.points.is_empty()).then(|| Growth::of(self.points.clone()))
    }
}

/// Starts ever more pods and measures them idle. After a failure `idle` holds what was measured before it.
async fn grow(arguments: &Arguments, bench: &Bench, runtime: Runtime, idle: &mut Idle) -> anyhow::Result<()> {
    let mut ids = Vec::new();
    for pods in &arguments.pods {
        eprintln!("memory: {pods} idle pods of {}", runtime.name());
        while ids.len() < *pods {
            ids.push(bench.detached(runtime).await?);
            idle.cpu.push(memory::cpu_seconds(&families(bench, &ids[ids.len() - 1..])));
        }
        // Not a wait for something: being left alone is what is measured.
        tokio::time::sleep(Duration::from_secs(arguments.idle_seconds)).await;
        let usage = memory::usage(&families(bench, &ids));
        idle.points.push(Point { pods: *pods, usage, mem_available: memory::available() });
        let private = |pid: &u32| memory::private(*pid).ok().map(|bytes| bytes as f64);
        idle.shim_private = bench.shims(&ids).iter().filter_map(private).collect();
    }
    for id in &ids {
        bench.remove(id).await?;
    }
    Ok(())
}

/// The shims of these containers and everything below them.
fn families(bench: &Bench, ids: &[String]) -> Vec<u32> {
    bench.shims(ids).into_iter().flat_map(memory::family).collect()
}

/// Whose output was lost; nothing where none was.
fn silence(silent: &[&str]) -> String {
    match silent.len() {
        0 => String::new(),
        lost => format!(
            "the output of {lost} starts never arrived, and they were repeated: {}",
            silent.join(", ")
        ),
    }
}

/// Which programs a pod's memory belongs to, largest first, where most pods ran.
fn by_program(growth: &Growth) -> String {
    let Some(last) = growth.points.last() else { return String::new() };
    let mut programs: Vec<_> = last.usage.pss_by_program.iter().collect();
    programs.sort_by(|a, b| b.1.cmp(a.1));
    let share = |bytes: u64| bytes as f64 / last.pods as f64 / MIB;
    let shown: Vec<_> =
        programs.iter().map(|(name, bytes)| format!("{name} {:.1}", share(**bytes))).collect();
    format!("; MiB a pod by program: {}", shown.join(", "))
}

/// Where the time of a start goes, longest stage first.
fn stages(spans: &[Span]) -> String {
    let mut longest: Vec<_> =
        spans.iter().filter(|span| !rounds::OUTER.contains(&span.name.as_str())).collect();
    longest.sort_by(|a, b| b.seconds().total_cmp(&a.seconds()));
    let shown: Vec<_> =
        longest.iter().take(6).map(|span| format!("{} {:.3} s", span.name, span.seconds())).collect();
    match shown.is_empty() {
        true => "the shim wrote no spans".into(),
        false => format!("longest stages of the median start: {}", shown.join(", ")),
    }
}

/// Pods of CRI; what is left of them is told.
async fn of_cri(
    arguments: &Arguments,
    program: &Path,
    problems: &mut Vec<String>,
    left_behind: &mut Vec<String>,
) -> Pods {
    let crictl = Crictl::new(program, &arguments.image, &arguments.output);
    let mut pods = Pods::default();
    eprintln!("pods of CRI: {} rounds, then {AT_ONCE} at once", arguments.rounds);
    let outcome = crictl.lives(arguments.rounds, &mut pods).await;
    or_gap(problems, "pods of CRI", outcome);
    // Each round is sixteen pods.
    let outcome = crictl.at_once(arguments.rounds.div_ceil(4), &mut pods).await;
    or_gap(problems, "pods of CRI at once", outcome);
    left_behind.extend(crictl.remove_all().await);
    pods
}

/// The lines of pods of CRI.
fn steps(pods: &Pods, kvm: bool) -> Vec<Measure> {
    let line = |name, times: &Times| Measure::beside(name, Unit::Seconds, &times.runc, &times.bulkhead);
    let ready =
        line("crictl runp", &pods.ready).with_note("with the pod's network, which is the same for both");
    vec![
        if kvm { ready } else { ready.at_most(1.2, Unit::Seconds) },
        line("create, start to first byte", &pods.first_byte),
        line("crictl exec --sync … true", &pods.exec).at_most(1.5, Unit::TimesRunc),
        line("stop, rm, stopp, rmp", &pods.end),
        line("runp of 8 at once", &pods.at_once).with_note("until the last one is ready"),
    ]
}

/// The part of a boot that is the guest's kernel's.
fn kernel(spans: &[Span]) -> String {
    let seconds: f64 = spans.iter().filter(|span| span.name == "kernel").map(Span::seconds).sum();
    format!("the guest's kernel takes {seconds:.3} s of the median start's")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trace_is_set_above_the_sections_and_taken_out_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.toml");
        let before = "state_dir = \"/s\"\ntrace_file = \"/old\"\n[sandbox]\nvcpus = 1\n";
        fs::write(&file, before).unwrap();
        let traced = Traced::set(&file, Path::new("/new")).unwrap();
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(text, "trace_file = \"/new\"\nstate_dir = \"/s\"\n[sandbox]\nvcpus = 1\n");
        drop(traced);
        assert_eq!(fs::read_to_string(&file).unwrap(), before);
    }

    #[test]
    fn memory_is_told_by_program_largest_first() {
        let usage = memory::Usage {
            pss_by_program: [("small", 2 << 20), ("large", 6 << 20)]
                .map(|(name, size)| (name.to_owned(), size))
                .into(),
            ..memory::Usage::default()
        };
        let growth = Growth::of(vec![Point { pods: 2, usage, mem_available: 0 }]);
        assert_eq!(by_program(&growth), "; MiB a pod by program: large 3.0, small 1.0");
    }

    #[test]
    fn the_longest_stages_come_first_without_the_outer_clocks() {
        let span =
            |name: &str, length| Span { name: name.into(), start_unix_nanos: 0, end_unix_nanos: length };
        let text =
            stages(&[span("ctr run", 9_000_000_000), span("plan", 1_000_000), span("kernel", 600_000_000)]);
        assert_eq!(text, "longest stages of the median start: kernel 0.600 s, plan 0.001 s");
        assert_eq!(stages(&[]), "the shim wrote no spans");
    }
}
