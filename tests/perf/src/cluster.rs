//! Pods of a Kubernetes, by kubectl: how long until they are ready, and until they are gone. What the kubelet itself
//! says of their starts, and what a machine costs beside the overhead that its RuntimeClass declares.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::ctr::{Runtime, call};
use crate::host::{self, Host, Operator};
use crate::memory::{self, Growth, Point};
use crate::report::{MIB, Measure, Report, Unit};
use crate::rounds::{Times, order};

/// Longer than any number of pods takes here, on a busy machine too.
const DEADLINE: Duration = Duration::from_secs(300);
/// Where each node's containerd listens, in that node.
const CONTAINERD: &str = "/run/containerd/containerd.sock";
/// A line for each change of a pod: what happened, its name, whether it is ready.
const CHANGE: &str = "jsonpath={.type} {.object.metadata.name} \
                      {.object.status.conditions[?(@.type==\"Ready\")].status}{\"\\n\"}";

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Rounds of one pod; each measures both runtimes. Of more pods at once there are half as many
    #[arg(long, default_value_t = 8)]
    rounds: usize,
    /// Numbers of pods that are made at once
    #[arg(long, value_delimiter = ',', default_value = "1,5,10")]
    pods: Vec<usize>,
    /// How long pods are left alone before their memory is measured
    #[arg(long, default_value_t = 30)]
    idle_seconds: u64,
    /// Directory for result.json and table.txt
    #[arg(long)]
    output: PathBuf,
    /// The client `kubectl`, whose environment names the cluster
    #[arg(long)]
    kubectl: PathBuf,
    /// The command that runs another one in a node: `COMMAND NODE PROGRAM…`
    #[arg(long)]
    enter: PathBuf,
    /// The nodes' names
    #[arg(long, value_delimiter = ',', default_value = "node-1,node-2")]
    nodes: Vec<String>,
    /// An image with busybox, which the nodes have
    #[arg(long)]
    image: String,
    /// What is measured, for the record
    #[arg(long, default_value = "unknown")]
    commit: String,
}

/// What was measured of one number of pods at once.
#[derive(Debug, Default)]
struct Batch {
    /// From the start of `kubectl create` until the last pod is ready.
    ready: Times,
    /// From the start of `kubectl delete` until the last pod is gone.
    gone: Times,
}

/// Measures, and writes what was found out.
///
/// # Errors
/// Something could not be measured; the rest was.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let folder = &arguments.output;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let operator = Operator {
        program: arguments.enter.clone(),
        before: vec!["node-1", "bulkhead"],
        environment: Vec::new(),
    };
    let host = Host::look(&operator, &arguments.commit)?;
    let cluster = Cluster::new(arguments);
    let mut report = measure(&cluster, host).await;
    // After failures too: what we made goes with us.
    if let Err(error) = cluster.kubectl(&["delete", "pods", "-l", "perf", "--wait", "--timeout=120s"]).await {
        report.left_behind.push(format!("pods with the label perf: {error:#}"));
    }
    report.save(folder, "")
}

async fn measure(cluster: &Cluster<'_>, host: Host) -> Report {
    let arguments = cluster.arguments;
    let mut problems = Vec::new();
    let mut measures = Vec::new();
    let mut said = Times::default();
    for count in &arguments.pods {
        let rounds = if *count == 1 { arguments.rounds } else { arguments.rounds.div_ceil(2) };
        eprintln!("{count} at once: {rounds} rounds");
        let mut batch = Batch::default();
        if let Err(error) = cluster.rounds(*count, rounds, &mut batch, &mut said).await {
            problems.push(format!("{count} at once: {error:#}"));
        }
        measures.extend(lines(*count, &batch));
    }
    measures
        .push(Measure::beside("kubelet: pod start SLI", Unit::Seconds, &said.runc, &said.bulkhead).with_note(
        "the mean of kubelet_pod_start_sli_duration_seconds over the pods of a round, of all numbers at once",
    ));
    let (declared, growth) = match cluster.memory().await {
        Ok((declared, growth)) => (Some(declared), Some(growth)),
        Err(error) => {
            problems.push(format!("memory: {error:#}"));
            (None, None)
        }
    };
    measures.extend(declared.zip(growth.as_ref()).map(|(declared, growth)| {
        Measure::alone("host memory a pod", Unit::Bytes, &Vec::from_iter(growth.pss_per_pod))
            .at_most(declared, Unit::Bytes)
            .with_note(format!(
                "the target is the overhead that the RuntimeClass declares; slope of PSS over {} pods, {} s idle",
                growth.points.iter().map(|point| point.pods.to_string()).collect::<Vec<_>>().join(", "),
                arguments.idle_seconds
            ))
    }));
    Report {
        host,
        start_state: "warm cache",
        network: "the cluster's, by CNI",
        rounds: arguments.rounds,
        load_after: host::load(),
        measures,
        memory_runc: None,
        memory_bulkhead: growth,
        timeline: Vec::new(),
        problems,
        left_behind: Vec::new(),
    }
}

/// The lines of one number of pods.
fn lines(count: usize, batch: &Batch) -> [Measure; 2] {
    let name = |one, five, ten, other| match count {
        1 => one,
        5 => five,
        10 => ten,
        _ => other,
    };
    let ready =
        name("created to Ready, 1 pod", "- 5 pods at once", "- 10 pods at once", "- more pods at once");
    let gone = name("deleted to gone, 1 pod", "- 5 pods at once", "- 10 pods at once", "- more pods at once");
    let ready = Measure::beside(ready, Unit::Seconds, &batch.ready.runc, &batch.ready.bulkhead);
    let gone = Measure::beside(gone, Unit::Seconds, &batch.gone.runc, &batch.gone.bulkhead);
    let gone = gone.with_note(
        "deleted at the moment when the last pod is ready; the kubelet looks at containers once a second, and begins only \
         when it has looked once more",
    );
    [if count == 1 { ready.at_most(1.5, Unit::SecondsMore) } else { ready }, gone]
}

/// A cluster and how it is reached.
struct Cluster<'a> {
    arguments: &'a Arguments,
}

impl<'a> Cluster<'a> {
    fn new(arguments: &'a Arguments) -> Self {
        Self { arguments }
    }

    /// `kubectl ARGUMENTS`, which must succeed; its standard output.
    async fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        Ok(call(Command::new(&self.arguments.kubectl), "kubectl", arguments).await?.stdout)
    }

    /// Pods of both runtimes in turns. After a failure `batch` and `said` hold what was measured before it.
    async fn rounds(
        &self,
        count: usize,
        rounds: usize,
        batch: &mut Batch,
        said: &mut Times,
    ) -> anyhow::Result<()> {
        for runtime in Runtime::ALL {
            // Not counted: it warms the caches for both.
            self.round(runtime, "warm", count, &mut Batch::default(), &mut Times::default()).await?;
        }
        for round in 0..rounds {
            for runtime in order(round) {
                self.round(runtime, &round.to_string(), count, batch, said).await?;
            }
        }
        Ok(())
    }

    async fn round(
        &self,
        runtime: Runtime,
        round: &str,
        count: usize,
        batch: &mut Batch,
        said: &mut Times,
    ) -> anyhow::Result<()> {
        let label = format!("{}-{count}-{round}", runtime.name());
        let before = self.starts().await?;
        let mut changes = Changes::watch(self, &label).await?;
        let clock = Instant::now();
        self.create(runtime, &label, count).await?;
        changes.until(count, |what, ready| what != "DELETED" && ready).await.context("to be ready")?;
        batch.ready.of(runtime).push(clock.elapsed().as_secs_f64());
        let after = self.starts().await?;
        let [seconds, starts] = [after[0] - before[0], after[1] - before[1]];
        if starts > 0.0 {
            said.of(runtime).push(seconds / starts);
        }
        let clock = Instant::now();
        self.kubectl(&["delete", "pods", "-l", &format!("perf={label}"), "--wait=false"]).await?;
        changes.until(count, |what, _| what == "DELETED").await.context("to be gone")?;
        batch.gone.of(runtime).push(clock.elapsed().as_secs_f64());
        Ok(())
    }

    async fn create(&self, runtime: Runtime, label: &str, count: usize) -> anyhow::Result<()> {
        let pods: Vec<Value> = (0..count).map(|number| self.pod(runtime, label, number)).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": pods}).to_string();
        let mut command = Command::new(&self.arguments.kubectl);
        command.args(["create", "-f", "-"]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("cannot start kubectl")?;
        let mut stdin = child.stdin.take().context("stdin")?;
        stdin.write_all(list.as_bytes()).await.context("write to kubectl")?;
        drop(stdin);
        let output = tokio::time::timeout(DEADLINE, child.wait_with_output()).await;
        let output = output.context("`kubectl create` does not end")??;
        ensure!(
            output.status.success(),
            "`kubectl create`: {}",
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
        Ok(())
    }

    /// It stays until it is asked to end, as soon as which it does.
    fn pod(&self, runtime: Runtime, label: &str, number: usize) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("perf-{label}-{number}"), "labels": {"perf": label}},
            "spec": {
                "runtimeClassName": runtime.name(),
                "containers": [{
                    "name": "main", "image": self.arguments.image, "imagePullPolicy": "IfNotPresent",
                    "command": ["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"],
                }],
            },
        })
    }

    /// Seconds and number of all starts of pods, as the kubelets count them.
    async fn starts(&self) -> anyhow::Result<[f64; 2]> {
        let mut all = [0.0; 2];
        for node in &self.arguments.nodes {
            let text =
                self.kubectl(&["get", "--raw", &format!("/api/v1/nodes/{node}/proxy/metrics")]).await?;
            let [seconds, starts] = sli(&text);
            all = [all[0] + seconds, all[1] + starts];
        }
        Ok(all)
    }

    /// What the RuntimeClass declares, and what ever more idle machines take.
    async fn memory(&self) -> anyhow::Result<(f64, Growth)> {
        let class =
            self.kubectl(&["get", "runtimeclass", "bulkhead", "-o", "jsonpath={.overhead.podFixed.memory}"]);
        let class = class.await?;
        let declared = class.trim().strip_suffix("Mi").and_then(|number| number.parse::<f64>().ok());
        let declared = declared
            .with_context(|| format!("the RuntimeClass declares {class:?}, which is no number of Mi"))?;
        let (mut points, mut there) = (Vec::new(), 0);
        for count in &self.arguments.pods {
            eprintln!("memory: {count} idle pods");
            let label = format!("idle-{count}");
            let mut changes = Changes::watch(self, &label).await?;
            self.create(Runtime::Bulkhead, &label, count - there).await?;
            changes.until(count - there, |what, ready| what != "DELETED" && ready).await?;
            there = *count;
            // Not a wait for something: being left alone is what is measured.
            tokio::time::sleep(Duration::from_secs(self.arguments.idle_seconds)).await;
            let shims = memory::shims(CONTAINERD, &self.sandboxes().await?);
            ensure!(shims.len() == there, "{there} pods have {} shims", shims.len());
            let usage = memory::usage(&shims.into_iter().flat_map(memory::family).collect::<Vec<_>>());
            points.push(Point { pods: there, usage, mem_available: memory::available() });
        }
        Ok((declared * MIB, Growth::of(points)))
    }

    /// The ids of idle pods of ours that are ready, on every node.
    async fn sandboxes(&self) -> anyhow::Result<Vec<String>> {
        let mut ids = Vec::new();
        for node in &self.arguments.nodes {
            let list = [
                "crictl",
                "pods",
                "--no-trunc",
                "--state",
                "Ready",
                "--name",
                "^perf-bulkhead-|^perf-idle-",
                "-q",
            ];
            let arguments: Vec<&str> = std::iter::once(node.as_str()).chain(list).collect();
            let said = call(Command::new(&self.arguments.enter), "k8s-enter", &arguments).await?.stdout;
            ids.extend(said.lines().map(str::to_owned));
        }
        Ok(ids)
    }
}

/// What happens to some pods, as the API server tells it.
struct Changes {
    lines: Lines<BufReader<ChildStdout>>,
    _watch: Child,
}

impl Changes {
    /// From now on, of those with this label.
    async fn watch(cluster: &Cluster<'_>, label: &str) -> anyhow::Result<Self> {
        let mut command = Command::new(&cluster.arguments.kubectl);
        command.args([
            "get",
            "pods",
            "--watch",
            "--output-watch-events",
            "-l",
            &format!("perf={label}"),
            "-o",
            CHANGE,
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut watch = command.spawn().context("cannot start kubectl")?;
        let lines = BufReader::new(watch.stdout.take().context("stdout")?).lines();
        Ok(Self { lines, _watch: watch })
    }

    /// Waits until this is so of `count` pods, of each once.
    async fn until(&mut self, count: usize, fits: impl Fn(&str, bool) -> bool) -> anyhow::Result<()> {
        let mut found = std::collections::BTreeSet::new();
        let all = async {
            while found.len() < count {
                let Some(line) = self.lines.next_line().await? else { bail!("kubectl watches no more") };
                let mut words = line.split_whitespace();
                let (Some(what), Some(name)) = (words.next(), words.next()) else { continue };
                if fits(what, words.next() == Some("True")) {
                    found.insert(name.to_owned());
                }
            }
            Ok(())
        };
        match tokio::time::timeout(DEADLINE, all).await {
            Ok(result) => result,
            Err(_) => bail!("{} of {count} pods within {} s", found.len(), DEADLINE.as_secs()),
        }
    }
}

/// Seconds and number of starts in a kubelet's metrics.
fn sli(text: &str) -> [f64; 2] {
    ["sum", "count"].map(|part| {
        let name = format!("kubelet_pod_start_sli_duration_seconds_{part}");
        text.lines()
            .filter_map(|line| {
                line.strip_prefix(&name)?.trim_start_matches(['{', '}']).trim().parse::<f64>().ok()
            })
            .sum()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubelets_own_figures_are_found() {
        let text = "# TYPE kubelet_pod_start_sli_duration_seconds histogram\n\
                    kubelet_pod_start_sli_duration_seconds_bucket{le=\"+Inf\"} 3\n\
                    kubelet_pod_start_sli_duration_seconds_sum 4.5\n\
                    kubelet_pod_start_sli_duration_seconds_count 3\n";
        assert_eq!(sli(text), [4.5, 3.0]);
        assert_eq!(sli(""), [0.0, 0.0]);
    }

    #[test]
    fn one_pod_has_a_target() {
        let batch = Batch { ready: Times { runc: vec![1.0], bulkhead: vec![2.0] }, ..Batch::default() };
        assert_eq!(lines(1, &batch)[0].verdict(), "met");
        assert_eq!(lines(10, &batch)[0].verdict(), "-");
    }
}
