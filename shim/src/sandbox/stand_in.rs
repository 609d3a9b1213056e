//! The process of the host that stands for a container: from the container's making until it is released.
//! Knows the process and what it tells; what it stands for is the state machine's affair.

use std::{
    ffi::OsString,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use bulkhead_hypervisor::child::{Child, ChildSpec, Network};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use super::model::Input;
use crate::{
    entry::stand_in::{NAME, READY, ROOT_ENV, SIGNAL},
    error::{Fault, Kind},
    ids::ContainerId,
};

const SIGKILL: u32 = libc::SIGKILL as u32;

/// A running stand-in. Dropped, it is killed.
pub(super) struct StandIn {
    pid: i32,
    start_time: u64,
    end: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// Tells when it is where it should be, or why it is not.
#[derive(Debug)]
pub(super) struct Arrival(Option<oneshot::Receiver<Result<(), String>>>);

impl StandIn {
    /// Starts one, in the network namespace `network` and with the root `root`; `command` is for those who list
    /// processes. Signals that it gets, its own SIGKILL among them, go to `inputs`. On the main thread: it dies
    /// with the thread that makes it.
    pub(super) fn start(
        id: &ContainerId,
        command: &[String],
        root: PathBuf,
        network: OwnedFd,
        inputs: mpsc::UnboundedSender<Input>,
    ) -> io::Result<(Self, Arrival)> {
        let (lines, heard) = mpsc::unbounded_channel();
        // The very program that runs, also when another version has been installed meanwhile.
        let mut spec = ChildSpec::new("stand-in", Path::new("/proc/self/exe"));
        spec.argv0 = Some(NAME.into());
        spec.args =
            [id.as_str()].into_iter().chain(command.iter().map(String::as_str)).map(OsString::from).collect();
        spec.env = vec![(ROOT_ENV.into(), root.into())];
        spec.network = Network::Of(network);
        spec.stdout = Box::new(move |line| {
            let _ = lines.send(line.to_owned());
        });
        let child = Child::spawn(spec)?;
        let (pid, start_time) = (child.pid(), child.start_time_ticks());
        let (arrived, arrival) = oneshot::channel();
        let (end, ending) = oneshot::channel();
        let id = id.clone();
        let tell = move |signal| {
            let _ = inputs.send(Input::Signalled(id.clone(), signal));
        };
        let task = tokio::spawn(watch(child, heard, arrived, ending, tell));
        Ok((Self { pid, start_time, end, task }, Arrival(Some(arrival))))
    }

    /// Its pid.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// When it was made, in clock ticks since boot.
    pub(super) fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Ends it.
    pub(super) async fn stop(self) {
        let _ = self.end.send(());
        let _ = self.task.await;
    }
}

/// Waits until it is where it should be; answers at once from then on.
pub(super) async fn arrived(arrival: &mut Arrival) -> Result<(), Fault> {
    let Some(arrival) = arrival.0.take() else { return Ok(()) };
    let why = match arrival.await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(why)) => why,
        Err(_) => "it was ended".into(),
    };
    Err(Fault::new(Kind::Internal, format!("the process that stands for the container did not start: {why}")))
}

async fn watch(
    mut child: Child,
    mut heard: mpsc::UnboundedReceiver<String>,
    arrived: oneshot::Sender<Result<(), String>>,
    mut ending: oneshot::Receiver<()>,
    tell: impl Fn(u32),
) {
    let mut arrived = Some(arrived);
    loop {
        tokio::select! {
            // Also when the one that could say it has been dropped.
            _ = &mut ending => {
                child.kill().await;
                return;
            }
            exit = child.exited() => {
                child.read_rest().await;
                match arrived.take() {
                    Some(arrived) => {
                        let _ = arrived.send(Err(format!("it {exit}: {}", child.last_errors().join("; "))));
                    }
                    // A signal that cannot be told has ended it.
                    None => tell(SIGKILL),
                }
                return;
            }
            Some(line) = heard.recv() => {
                if line == READY {
                    arrived.take().map(|arrived| arrived.send(Ok(())));
                } else if let Some(signal) = line.strip_prefix(SIGNAL).and_then(|n| n.parse().ok()) {
                    tell(signal);
                }
            }
        }
    }
}
