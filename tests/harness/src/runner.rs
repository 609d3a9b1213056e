//! Runs a suite: chooses tests, gives each worker thread a node, and reports.
//! Takes the arguments of a Rust test program that matter: filters, --exact, --skip, --list, --test-threads.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use crate::context::Context;
use crate::isolate::isolate_thread;
use crate::node::Node;
use crate::settings::Settings;

/// For which runtimes a test holds.
#[derive(Clone, Copy, Debug)]
pub enum Scope {
    /// Every runtime: must pass on runc, which proves the test.
    Common,
    /// Only bulkhead, for this reason.
    Bulkhead(&'static str),
}

/// One test.
#[derive(Clone, Copy)]
pub struct Test {
    /// Its name: `room::what_holds`.
    pub name: &'static str,
    /// For which runtimes it holds.
    pub scope: Scope,
    /// The reason why it cannot run here, if there is one.
    pub not_here: fn(&Settings) -> Option<&'static str>,
    /// The test.
    pub body: fn(&mut Context<'_>) -> Result<()>,
}

impl Test {
    /// A test for every runtime.
    pub const fn common(name: &'static str, body: fn(&mut Context<'_>) -> Result<()>) -> Self {
        Self { name, scope: Scope::Common, not_here: |_| None, body }
    }

    /// A test for bulkhead alone, and why.
    pub const fn bulkhead(
        name: &'static str,
        why: &'static str,
        body: fn(&mut Context<'_>) -> Result<()>,
    ) -> Self {
        Self { name, scope: Scope::Bulkhead(why), not_here: |_| None, body }
    }

    /// The same test with a condition: `not_here` says why it cannot run, or nothing.
    pub const fn unless(mut self, not_here: fn(&Settings) -> Option<&'static str>) -> Self {
        self.not_here = not_here;
        self
    }
}

#[derive(Default)]
struct Arguments {
    filters: Vec<String>,
    skips: Vec<String>,
    exact: bool,
    list: bool,
    threads: Option<usize>,
}

impl Arguments {
    fn parse() -> Result<Self> {
        let mut parsed = Self::default();
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let (name, mut value) = match arg.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name.to_string(), Some(value.to_string())),
                _ => (arg.clone(), None),
            };
            let mut take =
                || value.take().or_else(|| args.next()).with_context(|| format!("{name} needs a value"));
            match name.as_str() {
                "--exact" => parsed.exact = true,
                "--list" => parsed.list = true,
                "--skip" => parsed.skips.push(take()?),
                "--test-threads" => parsed.threads = Some(take()?.parse().context("--test-threads")?),
                "--nocapture" | "--no-capture" => {}
                other if other.starts_with('-') => return Err(anyhow!("unknown option {other}")),
                _ => parsed.filters.push(arg),
            }
        }
        Ok(parsed)
    }

    fn wants(&self, name: &str) -> bool {
        let hit = |pattern: &String| if self.exact { name == pattern } else { name.contains(pattern) };
        (self.filters.is_empty() || self.filters.iter().any(hit)) && !self.skips.iter().any(hit)
    }
}

#[derive(Default)]
struct Report {
    passed: usize,
    skipped: usize,
    failed: Vec<&'static str>,
}

/// What stands at a test's side.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Daemon {
    None,
    Containerd,
    WithCri,
    WithNerdctl,
    Cluster,
}

/// Runs the tests that the command line asks for, each with a containerd at its side.
pub fn run_suite(suite: &str, tests: &[Test]) -> ExitCode {
    run(suite, tests, Daemon::Containerd)
}

/// The same with containerd's CRI, for tests that make pods.
pub fn run_suite_with_pods(suite: &str, tests: &[Test]) -> ExitCode {
    run(suite, tests, Daemon::WithCri)
}

/// The same with what nerdctl needs beside it.
pub fn run_suite_with_nerdctl(suite: &str, tests: &[Test]) -> ExitCode {
    run(suite, tests, Daemon::WithNerdctl)
}

/// The same with a Kubernetes instead, one for all tests: it is brought up again only after one that failed.
pub fn run_suite_with_cluster(suite: &str, tests: &[Test]) -> ExitCode {
    run(suite, tests, Daemon::Cluster)
}

/// The same for tests that play containerd themselves.
pub fn run_suite_without_containerd(suite: &str, tests: &[Test]) -> ExitCode {
    run(suite, tests, Daemon::None)
}

fn run(suite: &str, tests: &[Test], containerd: Daemon) -> ExitCode {
    match try_run(suite, tests, containerd) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("{suite}: {e:#}");
            ExitCode::from(2)
        }
    }
}

fn try_run(suite: &str, tests: &[Test], containerd: Daemon) -> Result<bool> {
    let arguments = Arguments::parse()?;
    let chosen: Vec<Test> = tests.iter().filter(|t| arguments.wants(t.name)).copied().collect();
    if arguments.list {
        for test in &chosen {
            match test.scope {
                Scope::Common => println!("{}: common", test.name),
                Scope::Bulkhead(why) => println!("{}: bulkhead only, {why}", test.name),
            }
        }
        return Ok(true);
    }
    let settings = Arc::new(Settings::from_env(containerd != Daemon::None)?);
    println!(
        "{suite}: {} tests, runtime {}, {} {}",
        chosen.len(),
        if matches!(containerd, Daemon::WithCri | Daemon::Cluster) {
            &settings.handler
        } else {
            &settings.runtime_name
        },
        if containerd == Daemon::None { "no containerd; would be" } else { "containerd" },
        settings.version
    );
    std::panic::set_hook(Box::new(|_| {}));
    let started = Instant::now();
    let root = PathBuf::from(format!("/tmp/bh{}", std::process::id()));
    let mut report = Report::default();
    let mut queue = VecDeque::new();
    for test in chosen {
        let why = match test.scope {
            Scope::Bulkhead(why) if !settings.is_bulkhead() => Some(why),
            _ => (test.not_here)(&settings),
        };
        match why {
            Some(why) => {
                println!("test {} ... skipped: {why}", test.name);
                report.skipped += 1;
            }
            None => queue.push_back(test),
        }
    }
    let most = if containerd == Daemon::Cluster { 1 } else { 2 };
    let threads = arguments.threads.unwrap_or(most).clamp(1, queue.len().max(1));
    let shared = Shared {
        settings,
        containerd,
        root: root.clone(),
        queue: Mutex::new(queue),
        report: Mutex::new(report),
        nodes: AtomicUsize::new(0),
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| shared.supervise());
        }
    });
    std::fs::remove_dir(&root).ok();
    let report = shared.report.into_inner().unwrap_or_else(|e| e.into_inner());
    println!(
        "\n{suite}: {} passed, {} failed, {} skipped in {:.0} s",
        report.passed,
        report.failed.len(),
        report.skipped,
        started.elapsed().as_secs_f64()
    );
    for name in &report.failed {
        println!("    failed: {name}");
    }
    Ok(report.failed.is_empty())
}

struct Shared {
    settings: Arc<Settings>,
    containerd: Daemon,
    root: PathBuf,
    queue: Mutex<VecDeque<Test>>,
    report: Mutex<Report>,
    nodes: AtomicUsize,
}

impl Shared {
    fn next(&self) -> Option<Test> {
        self.queue.lock().unwrap_or_else(|e| e.into_inner()).pop_front()
    }

    /// Runs node after node until no test is left. A failed test ends its node, whose thread takes its
    /// namespaces with it: the next test starts clean.
    fn supervise(&self) {
        while let Some(first) = self.next() {
            std::thread::scope(|scope| {
                scope.spawn(|| self.work(first));
            });
        }
    }

    fn work(&self, first: Test) {
        let number = self.nodes.fetch_add(1, Ordering::Relaxed);
        let dir = self.root.join(number.to_string());
        let mark = format!("bh{}-{number}", std::process::id());
        let start = match self.containerd {
            Daemon::None => Node::bare,
            Daemon::Containerd => Node::start,
            Daemon::WithCri => Node::with_cri,
            Daemon::WithNerdctl => Node::with_nerdctl,
            Daemon::Cluster => Node::with_cluster,
        };
        let node = isolate_thread().and_then(|()| start(Arc::clone(&self.settings), dir, mark));
        let mut node = match node {
            Ok(node) => node,
            Err(e) => {
                return self.record(
                    first.name,
                    Duration::ZERO,
                    Err(e.context("prepare the test's surroundings")),
                );
            }
        };
        let mut next = Some(first);
        while let Some(test) = next {
            let started = Instant::now();
            let result = run_one(&test, &mut node);
            let failed = result.is_err();
            self.record(test.name, started.elapsed(), result);
            if failed {
                break;
            }
            next = self.next();
        }
        if let Err(e) = node.destroy() {
            self.record("the end of containerd", Duration::ZERO, Err(e));
        }
    }

    fn record(&self, name: &'static str, took: Duration, result: Result<()>) {
        let mut report = self.report.lock().unwrap_or_else(|e| e.into_inner());
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {word} ({:.2} s)", took.as_secs_f64());
        match result {
            Ok(()) => report.passed += 1,
            Err(e) => {
                // At once and whole, so that a run that is cut short has told what it knows.
                let why: String = e
                    .chain()
                    .rev()
                    .map(|c| {
                        format!(
                            "    {c}
"
                        )
                    })
                    .collect();
                println!("{}", why.trim_end());
                report.failed.push(name);
            }
        }
    }
}

fn run_one(test: &Test, node: &mut Node) -> Result<()> {
    let mut context = Context::begin(node, test.name)?;
    let result = catch_unwind(AssertUnwindSafe(|| (test.body)(&mut context)))
        .unwrap_or_else(|panic| Err(anyhow!("panicked: {}", panic_text(panic.as_ref()))));
    match result {
        Ok(()) => {
            let tail = context.log_tail();
            context.finish().with_context(|| format!("after the test; containerd's log ends:\n{tail}"))
        }
        Err(e) => {
            let tail = context.log_tail();
            let processes = context.processes();
            let list: Vec<String> = processes.iter().map(ToString::to_string).collect();
            Err(e.context(format!(
                "containerd's log ends:\n{tail}\nprocesses at the time:\n    {}",
                list.join("\n    ")
            )))
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message").to_string()
}
