//! Pods of CRI, by crictl, as the kubelet makes them: with a network, a log and a container that stays.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use serde_json::json;
use tokio::process::Command;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::ctr::{Run, Runtime, call};
use crate::rounds::{Times, order};

/// Pods that are made at once.
pub(crate) const AT_ONCE: usize = 8;
/// Says a word and stays; ends when it is asked to.
const SCRIPT: &str = "trap 'exit 0' TERM; echo up; sleep 100000 & wait";

/// Seconds of each step, one a round.
#[derive(Debug, Default)]
pub(crate) struct Pods {
    /// `runp`.
    pub(crate) ready: Times,
    /// From `create` to the first byte in the container's log.
    pub(crate) first_byte: Times,
    /// `exec --sync`.
    pub(crate) exec: Times,
    /// `stop`, `rm`, `stopp` and `rmp`.
    pub(crate) end: Times,
    /// `runp` of [`AT_ONCE`], until the last one is ready.
    pub(crate) at_once: Times,
}

/// A client and what it has made.
pub(crate) struct Crictl {
    program: PathBuf,
    image: String,
    folder: PathBuf,
    /// Names given.
    count: Mutex<usize>,
    /// Pods that have not been removed.
    live: Mutex<Vec<String>>,
}

impl Crictl {
    /// A client with its own configuration of where containerd is; files of pods lie in `folder`.
    pub(crate) fn new(program: &Path, image: &str, folder: &Path) -> Arc<Self> {
        Arc::new(Self {
            program: program.to_owned(),
            image: image.to_owned(),
            folder: folder.join("pods"),
            count: Mutex::default(),
            live: Mutex::default(),
        })
    }

    async fn call(&self, arguments: &[&str]) -> anyhow::Result<Run> {
        call(Command::new(&self.program), "crictl", arguments).await
    }

    /// Writes what a new pod is; its file and its folder for logs.
    fn describe(&self) -> anyhow::Result<(String, PathBuf)> {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count += 1;
        let name = format!("perf-{}-{count}", std::process::id());
        let logs = self.folder.join(&name);
        std::fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
        let pod = json!({
            "metadata": { "name": name, "uid": name, "namespace": "perf" },
            "log_directory": logs,
            "linux": {},
        });
        let file = logs.join("pod.json");
        std::fs::write(&file, pod.to_string()).with_context(|| format!("cannot write {}", file.display()))?;
        Ok((file.display().to_string(), logs))
    }

    /// A pod that is ready: its id and what that took.
    async fn ready(&self, runtime: Runtime, file: &str) -> anyhow::Result<(String, Duration)> {
        let run = self.call(&["runp", "--runtime", runtime.name(), file]).await?;
        let id = run.stdout.trim().to_owned();
        ensure!(!id.is_empty(), "`crictl runp` names no pod");
        self.live.lock().unwrap_or_else(PoisonError::into_inner).push(id.clone());
        Ok((id, run.total))
    }

    async fn remove(&self, id: &str) -> anyhow::Result<()> {
        self.call(&["stopp", id]).await?;
        self.call(&["rmp", id]).await?;
        self.live.lock().unwrap_or_else(PoisonError::into_inner).retain(|live| live != id);
        Ok(())
    }

    /// Removes what is still there; says what could not be removed.
    pub(crate) async fn remove_all(&self) -> Vec<String> {
        let live = std::mem::take(&mut *self.live.lock().unwrap_or_else(PoisonError::into_inner));
        let mut kept = Vec::new();
        for id in live {
            if let Err(error) = self.call(&["rmp", "--force", &id]).await {
                kept.push(format!("pod {id}: {error:#}"));
            }
        }
        if let Err(error) = std::fs::remove_dir_all(&self.folder)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            kept.push(format!("{}: {error}", self.folder.display()));
        }
        kept
    }

    /// Whole lives of pods. After a failure `pods` holds what was measured before it.
    pub(crate) async fn lives(&self, rounds: usize, pods: &mut Pods) -> anyhow::Result<()> {
        for runtime in Runtime::ALL {
            // Not counted: it warms the caches for both.
            self.life(runtime, &mut Pods::default()).await?;
        }
        for round in 0..rounds {
            for runtime in order(round) {
                self.life(runtime, pods).await?;
            }
        }
        Ok(())
    }

    async fn life(&self, runtime: Runtime, pods: &mut Pods) -> anyhow::Result<()> {
        let (file, logs) = self.describe()?;
        let (pod, took) = self.ready(runtime, &file).await?;
        pods.ready.of(runtime).push(took.as_secs_f64());

        let config = logs.join("container.json");
        let container = json!({
            "metadata": { "name": "c" },
            "image": { "image": self.image },
            "command": ["sh", "-c", SCRIPT],
            "log_path": "c.log",
            "linux": {},
        });
        std::fs::write(&config, container.to_string()).context("cannot write container.json")?;
        let heard = first_byte(logs.join("c.log"))?;
        let clock = Instant::now();
        let made = self.call(&["create", &pod, &config.display().to_string(), &file]).await?;
        let id = made.stdout.trim().to_owned();
        let start = ["start", id.as_str()];
        let (started, heard) = tokio::join!(self.call(&start), heard);
        started?;
        pods.first_byte.of(runtime).push(heard?.duration_since(clock).as_secs_f64());

        let exec = self.call(&["exec", "--sync", &id, "true"]).await?;
        pods.exec.of(runtime).push(exec.total.as_secs_f64());

        let clock = Instant::now();
        self.call(&["stop", "--timeout", "10", &id]).await?;
        self.call(&["rm", &id]).await?;
        self.remove(&pod).await?;
        pods.end.of(runtime).push(clock.elapsed().as_secs_f64());
        Ok(())
    }

    /// Several pods at once, until the last one is ready.
    pub(crate) async fn at_once(self: &Arc<Self>, rounds: usize, pods: &mut Pods) -> anyhow::Result<()> {
        for round in 0..rounds {
            for runtime in order(round) {
                let files = (0..AT_ONCE).map(|_| self.describe()).collect::<Result<Vec<_>, _>>()?;
                let clock = Instant::now();
                let mut making = JoinSet::new();
                for (file, _) in files {
                    let crictl = self.clone();
                    making.spawn(async move { crictl.ready(runtime, &file).await });
                }
                let made = making.join_all().await.into_iter().collect::<Result<Vec<_>, _>>()?;
                pods.at_once.of(runtime).push(clock.elapsed().as_secs_f64());
                for (id, _) in made {
                    self.remove(&id).await?;
                }
            }
        }
        Ok(())
    }
}

/// Tells the moment of the first byte in a log that need not be there yet, once it has come.
///
/// # Errors
/// Nobody can listen, or nothing comes for a minute.
fn first_byte(log: PathBuf) -> anyhow::Result<impl Future<Output = anyhow::Result<Instant>>> {
    let folder = log.parent().context("a log lies in a folder")?;
    let news = inotify::init(inotify::CreateFlags::CLOEXEC).context("inotify")?;
    let what = inotify::WatchFlags::CREATE | inotify::WatchFlags::MODIFY;
    inotify::add_watch(&news, folder, what).with_context(|| format!("watch {}", folder.display()))?;
    let (tell, told) = oneshot::channel();
    // The clock stops here, whatever the other tasks do.
    std::thread::spawn(move || {
        let mut events = [0; 4096];
        while !tell.is_closed() {
            if std::fs::metadata(&log).is_ok_and(|log| log.len() > 0) {
                tell.send(Instant::now()).ok();
                return;
            }
            let mut ready = [PollFd::new(&news, PollFlags::IN)];
            let second = Timespec { tv_sec: 1, tv_nsec: 0 };
            if poll(&mut ready, Some(&second)).is_ok_and(|count| count > 0) {
                rustix::io::read(&news, &mut events).ok();
            }
        }
    });
    Ok(async {
        let told = tokio::time::timeout(Duration::from_secs(60), told).await;
        told.context("the log stayed empty for 60 s")?.context("nobody listens to the log")
    })
}
