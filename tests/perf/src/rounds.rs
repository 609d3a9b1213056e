//! The measurements that are taken in rounds, both runtimes in each, taking turns at going first.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::time::UNIX_EPOCH;

use anyhow::{Context, bail};

use crate::ctr::{Ctr, Run, Runtime};
use crate::memory;
use crate::timeline::{self, Span};

/// Names of the stages that are clocked here, around those of the shim.
pub(crate) const OUTER: [&str; 2] = ["ctr run", "to first byte"];

/// Seconds, one a round.
#[derive(Debug, Default)]
pub(crate) struct Times {
    pub(crate) runc: Vec<f64>,
    pub(crate) bulkhead: Vec<f64>,
}

impl Times {
    pub(crate) fn of(&mut self, runtime: Runtime) -> &mut Vec<f64> {
        match runtime {
            Runtime::Runc => &mut self.runc,
            Runtime::Bulkhead => &mut self.bulkhead,
        }
    }
}

/// Everything about starts.
#[derive(Debug, Default)]
pub(crate) struct Starts {
    pub(crate) total: Times,
    pub(crate) first_byte: Times,
    pub(crate) launch_to_hello: Vec<f64>,
    /// By their time to the first byte.
    timelines: Vec<(f64, Vec<Span>)>,
    /// Containers whose output never arrived, by runtime.
    pub(crate) silent: Vec<&'static str>,
}

impl Starts {
    /// The stages of the start whose first byte took the median time.
    pub(crate) fn timeline(&self) -> Vec<Span> {
        let mut sorted: Vec<_> = self.timelines.iter().collect();
        sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
        sorted.get(sorted.len() / 2).map(|(_, spans)| spans.clone()).unwrap_or_default()
    }
}

/// A client and what it has started.
pub(crate) struct Bench {
    ctr: Ctr,
    counter: Cell<usize>,
    /// Every id that was used.
    ids: RefCell<Vec<String>>,
    /// Those whose containers have not been removed.
    live: RefCell<Vec<String>>,
}

impl Bench {
    pub(crate) fn new(ctr: Ctr) -> Self {
        Self { ctr, counter: Cell::new(0), ids: RefCell::default(), live: RefCell::default() }
    }

    /// The client.
    pub(crate) fn ctr(&self) -> &Ctr {
        &self.ctr
    }

    /// A name that nobody else uses.
    fn id(&self, runtime: Runtime) -> String {
        self.counter.set(self.counter.get() + 1);
        let id = format!("perf-{}-{}-{}", std::process::id(), runtime.name(), self.counter.get());
        self.ids.borrow_mut().push(id.clone());
        id
    }

    /// One container from start to end.
    async fn once(&self, runtime: Runtime, command: &[&str]) -> anyhow::Result<Run> {
        let id = self.id(runtime);
        self.live.borrow_mut().push(id.clone());
        let run = self.ctr.run(runtime, &id, command).await?;
        self.live.borrow_mut().retain(|live| *live != id);
        Ok(run)
    }

    /// A container that idles until it is removed.
    pub(crate) async fn detached(&self, runtime: Runtime) -> anyhow::Result<String> {
        let id = self.id(runtime);
        self.live.borrow_mut().push(id.clone());
        self.ctr.run_detached(runtime, &id, &["sleep", "100000"]).await?;
        Ok(id)
    }

    /// The same with a folder of the host at `at`.
    pub(crate) async fn detached_with_folder(
        &self,
        runtime: Runtime,
        folder: &Path,
        at: &str,
    ) -> anyhow::Result<String> {
        let id = self.id(runtime);
        self.live.borrow_mut().push(id.clone());
        self.ctr.run_with_folder(runtime, &id, folder, at).await?;
        Ok(id)
    }

    pub(crate) async fn remove(&self, id: &str) -> anyhow::Result<()> {
        self.ctr.remove(id).await?;
        self.live.borrow_mut().retain(|live| live != id);
        Ok(())
    }

    /// Removes what is still there; says what could not be removed.
    pub(crate) async fn remove_all(&self) -> Vec<String> {
        let live = self.live.take();
        let mut kept = Vec::new();
        for id in live {
            if let Err(error) = self.ctr.remove(&id).await {
                kept.push(format!("container {id}: {error:#}"));
            }
        }
        kept
    }

    /// The shims of these containers.
    pub(crate) fn shims(&self, ids: &[String]) -> Vec<u32> {
        memory::shims(&self.ctr.address.display().to_string(), ids)
    }

    /// Shims of ours that outlived their containers, and state of ours that is listed in `pods` (`bulkhead ps`).
    pub(crate) fn left_behind(&self, pods: &serde_json::Value) -> Vec<String> {
        let ids = self.ids.borrow();
        let shims = self.shims(&ids).into_iter().map(|pid| format!("process {pid}, a shim"));
        let listed = pods.as_array().into_iter().flatten().filter_map(|pod| pod["id"].as_str());
        let listed =
            listed.filter(|id| ids.iter().any(|ours| ours == id)).map(|id| format!("state of the pod {id}"));
        shims.chain(listed).collect()
    }

    /// Whole lives of containers. After a failure `starts` holds what was measured before it.
    pub(crate) async fn starts(
        &self,
        rounds: usize,
        trace: &Path,
        starts: &mut Starts,
    ) -> anyhow::Result<()> {
        for runtime in Runtime::ALL {
            // Not counted: it warms the caches for both.
            self.once(runtime, &["true"]).await?;
        }
        for round in 0..rounds {
            for runtime in order(round) {
                let run = self.once(runtime, &["true"]).await?;
                starts.total.of(runtime).push(run.total.as_secs_f64());
            }
            for runtime in order(round) {
                let (run, first) = self.until_heard(runtime, trace, &mut starts.silent).await?;
                starts.first_byte.of(runtime).push(first);
                if runtime == Runtime::Bulkhead {
                    let spans = timeline::read(trace)?;
                    starts.launch_to_hello.extend(timeline::between(&spans, "launch", "hello"));
                    starts.timelines.push((first, around(&run, spans)));
                }
            }
        }
        Ok(())
    }

    /// A start until its first byte, in seconds. ctr loses the output of a container that ends at once every now and
    /// then, with either runtime: such a start is repeated, and counted.
    async fn until_heard(
        &self,
        runtime: Runtime,
        trace: &Path,
        silent: &mut Vec<&'static str>,
    ) -> anyhow::Result<(Run, f64)> {
        const ATTEMPTS: usize = 5;
        for _ in 0..ATTEMPTS {
            // A file for this start alone; a shim opens it when it starts.
            if let Err(error) = std::fs::remove_file(trace)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                return Err(error).with_context(|| format!("cannot remove {}", trace.display()));
            }
            let run = self.once(runtime, &["echo", "x"]).await?;
            if let Some(first) = run.first_byte {
                return Ok((run, first.as_secs_f64()));
            }
            silent.push(runtime.name());
        }
        bail!("{ATTEMPTS} containers of {} in a row printed nothing", runtime.name())
    }

    /// One more process in a running container.
    pub(crate) async fn execs(&self, rounds: usize) -> anyhow::Result<Times> {
        let mut times = Times::default();
        let mut ids = Vec::new();
        for runtime in Runtime::ALL {
            let id = self.detached(runtime).await?;
            self.ctr.exec(&id, "warm", &["true"]).await?;
            ids.push((runtime, id));
        }
        for round in 0..rounds {
            for runtime in order(round) {
                let id = ids.iter().find(|(other, _)| *other == runtime).map(|(_, id)| id.as_str());
                let id = id.context("both runtimes have a container")?;
                let run = self.ctr.exec(id, &format!("exec-{round}"), &["true"]).await?;
                times.of(runtime).push(run.total.as_secs_f64());
            }
        }
        for (_, id) in &ids {
            self.remove(id).await?;
        }
        Ok(times)
    }

    /// What the agent keeps resident in a guest whose only container looks at the guest's memory.
    pub(crate) async fn agent_resident(&self) -> anyhow::Result<Option<f64>> {
        let run = self.once(Runtime::Bulkhead, &["cat", "/proc/meminfo", "/proc/self/status"]).await?;
        Ok(memory::agent_resident(&run.stdout).map(|bytes| bytes as f64))
    }
}

/// A B, then B A: neither always follows the other.
pub(crate) fn order(round: usize) -> [Runtime; 2] {
    let [a, b] = Runtime::ALL;
    if round.is_multiple_of(2) { [a, b] } else { [b, a] }
}

/// The shim's stages with the user's clock around them.
fn around(run: &Run, spans: Vec<Span>) -> Vec<Span> {
    let start = run.began.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    let outer = |name: &str, length: std::time::Duration| Span {
        name: name.into(),
        start_unix_nanos: start,
        end_unix_nanos: start + length.as_nanos() as u64,
    };
    let mut all = vec![outer(OUTER[0], run.total)];
    all.extend(run.first_byte.map(|first| outer(OUTER[1], first)));
    all.extend(spans);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_pods_are_left_behind() {
        let bench = Bench::new(Ctr {
            program: "/ctr".into(),
            address: "/s".into(),
            namespace: "default".into(),
            image: "i".into(),
        });
        let ours = bench.id(Runtime::Bulkhead);
        let pods = serde_json::json!([{ "id": ours }, { "id": "somebody's" }]);
        assert_eq!(bench.left_behind(&pods), [format!("state of the pod {ours}")]);
        assert!(bench.left_behind(&serde_json::json!([])).is_empty());
    }

    #[test]
    fn the_timeline_is_the_median_starts() {
        let stage = |name: &str| vec![Span { name: name.into(), start_unix_nanos: 0, end_unix_nanos: 1 }];
        let mut starts = Starts::default();
        assert!(starts.timeline().is_empty());
        starts.timelines = vec![(3.0, stage("slow")), (1.0, stage("fast")), (2.0, stage("median"))];
        assert_eq!(starts.timeline()[0].name, "median");
    }

    #[test]
    fn the_runtimes_take_turns() {
        assert_ne!(order(0), order(1));
        assert_eq!(order(0), order(2));
    }
}
