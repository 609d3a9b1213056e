//! Many pods in a row and many at once, and many containers in one pod: nothing grows, and nothing is left. Run it
//! with `tests/run endurance`; `BULKHEAD_TEST_ROW` says how many make a row.

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Pod, Proc, Test};

const TESTS: &[Test] = &[
    Test::common("endurance::pods_one_after_another", pods_in_a_row),
    Test::common("endurance::pods_at_once", pods_at_once),
    Test::common("endurance::containers_of_one_pod_one_after_another", containers_in_a_row),
];

/// Runs until it is told to end, and then ends well.
const SLEEPER: &str = "trap 'exit 0' TERM; sleep 1000 & wait";
/// What a process keeps open for the next time (connections, pools) has been opened after so many.
const WARM: usize = 5;
/// How many descriptors more than then are no growth: those of what happens at the moment of the count, and those of
/// the files of the container that went last, which the guest gives back in its own time.
const SLACK: usize = 40;
/// How many pods at once.
const AT_ONCE: usize = 20;

fn main() -> ExitCode {
    harness::run_suite_with_pods("endurance", TESTS)
}

fn row() -> Result<usize> {
    match std::env::var("BULKHEAD_TEST_ROW") {
        Ok(text) => text.parse().with_context(|| format!("BULKHEAD_TEST_ROW={text} is no number")),
        Err(_) => Ok(200),
    }
}

/// How many descriptors a process has open.
fn descriptors(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd")).with_context(|| format!("look at process {pid}"))?.count())
}

/// The descriptors of each process, by its name and pid.
type Figures = Vec<(String, u32, usize)>;

fn figures(processes: impl IntoIterator<Item = (String, u32)>) -> Result<Figures> {
    processes.into_iter().map(|(name, pid)| Ok((name, pid, descriptors(pid)?))).collect()
}

/// Fails if a process that is in both has grown.
fn compare(before: &Figures, after: &Figures) -> Result<()> {
    println!("    descriptors when warm: {before:?}\n    descriptors at the end: {after:?}");
    for (name, pid, now) in after {
        let Some((_, _, then)) = before.iter().find(|(_, known, _)| known == pid) else { continue };
        ensure!(*now <= then + SLACK, "{name} ({pid}) had {then} descriptors open and has {now}");
    }
    Ok(())
}

fn pods_in_a_row(t: &mut Context<'_>) -> Result<()> {
    let (rounds, started, mut warm) = (row()?, Instant::now(), Figures::new());
    let containerd = t.node().pid().context("containerd does not run")?;
    for round in 0..rounds {
        let pod = t.pod("p", |_| {})?;
        let a = t.run_in(&pod, "a", SLEEPER)?;
        ensure!(t.exec_in(&a, "hostname")? == "p");
        t.remove_pod(&pod).with_context(|| format!("pod {round} of {rounds}"))?;
        if round == WARM.min(rounds - 1) {
            warm = figures([("containerd".to_owned(), containerd)])?;
        }
    }
    println!("    {rounds} pods, {:.2} s each", started.elapsed().as_secs_f64() / rounds as f64);
    compare(&warm, &figures([("containerd".to_owned(), containerd)])?)
}

fn pods_at_once(t: &mut Context<'_>) -> Result<()> {
    let started = Instant::now();
    let mut making = Vec::new();
    for name in (0..AT_ONCE).map(|n| format!("p{n}")) {
        let config = t.pod_config(&name, |_| {})?;
        let (run, config) = t.runp(&name, &config)?;
        making.push((name, run.deadline(600).spawn()?, config));
    }
    let mut pods = Vec::new();
    for (name, run, config) in making {
        pods.push((name, Pod::made(run.wait()?.ok()?.out(), config)));
    }
    println!("    {AT_ONCE} pods are ready after {:.1} s", started.elapsed().as_secs_f64());
    for (name, pod) in &pods {
        let a = t.run_in(pod, &format!("{name}-a"), SLEEPER)?;
        ensure!(t.exec_in(&a, "hostname")? == *name, "it is another one's");
    }
    for verb in ["stopp", "rmp"] {
        let all = pods.iter().map(|(_, pod)| t.crictl()?.args([verb, &pod.id]).deadline(600).spawn());
        for removed in all.collect::<Result<Vec<Proc>>>()? {
            removed.wait()?.ok()?;
        }
    }
    println!("    and gone after {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn containers_in_a_row(t: &mut Context<'_>) -> Result<()> {
    let (rounds, mut warm) = (row()?, Figures::new());
    let pod = t.pod("p", |_| {})?;
    let of_pod = |t: &Context<'_>| figures(t.processes().into_iter().map(|p| (p.name, p.pid)));
    for round in 0..rounds {
        let a = t.run_in(&pod, "a", SLEEPER)?;
        ensure!(t.exec_in(&a, "hostname")? == "p");
        t.crictl_ok(&["rm", "--force", &a]).with_context(|| format!("container {round} of {rounds}"))?;
        if round == WARM.min(rounds - 1) {
            warm = of_pod(t)?;
        }
    }
    compare(&warm, &of_pod(t)?)?;
    t.remove_pod(&pod)
}
