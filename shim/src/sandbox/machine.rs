//! Owns the running machine: watches for its end, ends it when told, and says how it was.
//! Does not know what runs inside.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bulkhead_hypervisor::{Drives, Exit, Growth, Machine, MachineEnd as Ended, Meter, Processors};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tracing::{error, info};

use super::model::{Input, MachineEnd};
use crate::{cgroup, tasks};

/// Exit status of processes whose machine was killed: 128 + SIGKILL.
const STATUS_KILLED: u32 = 137;
/// Exit status of processes whose machine went away in any other way.
const STATUS_LOST: u32 = 255;
/// How long ending a machine may take; it is a SIGKILL to a handful of processes.
const KILL: Duration = Duration::from_secs(5);

/// The machine of a sandbox, while it lives and after.
pub(super) struct Running {
    pid: i32,
    processes: Vec<(String, i32)>,
    meter: Option<Arc<dyn Meter>>,
    processors: Option<Arc<dyn Processors>>,
    growth: Option<Growth>,
    drives: Option<Arc<dyn Drives>>,
    ended: watch::Receiver<Option<MachineEnd>>,
    kill: mpsc::UnboundedSender<String>,
    task: JoinHandle<()>,
}

impl Running {
    /// Watches `machine`. Its end is told to `inputs`.
    pub(super) fn watch(
        machine: Box<dyn Machine>,
        cgroup: Option<String>,
        inputs: mpsc::UnboundedSender<Input>,
    ) -> Self {
        let (pid, processes, meter) = (machine.pid(), machine.processes(), machine.meter());
        let (processors, growth, drives) = (machine.processors(), machine.growth(), machine.drives());
        let (tell, ended) = watch::channel(None);
        let (kill, wishes) = mpsc::unbounded_channel();
        let task = tasks::spawn(run(machine, cgroup, wishes, tell, inputs));
        Self { pid, processes, meter, processors, growth, drives, ended, kill, task }
    }

    /// The VMM's process on the host.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it runs.
    pub(super) fn lives(&self) -> bool {
        self.ended.borrow().is_none()
    }

    /// What it was started as: names and pids.
    pub(super) fn processes(&self) -> &[(String, i32)] {
        &self.processes
    }

    /// By which its VMM is asked for what it counts, if it counts.
    pub(super) fn meter(&self) -> Option<Arc<dyn Meter>> {
        self.meter.clone()
    }

    /// By which its processors are held, if they are.
    pub(super) fn processors(&self) -> Option<Arc<dyn Processors>> {
        self.processors.clone()
    }

    /// How its memory can change, if it can.
    pub(super) fn growth(&self) -> Option<Growth> {
        self.growth.clone()
    }

    /// By which it is given disks, if it has room for any.
    pub(super) fn drives(&self) -> Option<Arc<dyn Drives>> {
        self.drives.clone()
    }

    /// Tells how the machine ended, once it has.
    pub(super) fn ended(&self) -> watch::Receiver<Option<MachineEnd>> {
        self.ended.clone()
    }

    /// Ends the machine; `why` is for the log.
    pub(super) fn kill(&self, why: &str) {
        let _ = self.kill.send(why.to_owned());
    }

    /// Ends the machine and waits until nothing of it runs.
    pub(super) async fn stop(self, why: &str) {
        self.kill(why);
        if tokio::time::timeout(KILL, self.task).await.is_err() {
            error!("the machine did not end within {} s", KILL.as_secs());
        }
    }
}

async fn run(
    mut machine: Box<dyn Machine>,
    cgroup: Option<String>,
    mut wishes: mpsc::UnboundedReceiver<String>,
    tell: watch::Sender<Option<MachineEnd>>,
    inputs: mpsc::UnboundedSender<Input>,
) {
    let end = tokio::select! {
        ended = machine.ended() => {
            let oom = cgroup.as_deref().is_some_and(|path| cgroup::oom_kills(path) > 0);
            let end = describe(&ended, oom);
            error!(oom, "the machine ended: {}", end.reason);
            end
        }
        Some(why) = wishes.recv() => {
            info!("ending the machine: {why}");
            MachineEnd { reason: why, status: STATUS_KILLED, oom: false, at: SystemTime::now() }
        }
    };
    // The first death of a part is the end of the machine: whatever is left goes with it.
    machine.kill().await;
    tell.send_replace(Some(end.clone()));
    let _ = inputs.send(Input::MachineEnded(end));
}

/// An end that nobody asked for is never a success.
fn describe(ended: &Ended, oom: bool) -> MachineEnd {
    let killed = matches!(ended.exit, Exit::Signal(9));
    let status = if killed { STATUS_KILLED } else { STATUS_LOST };
    MachineEnd { reason: ended.to_string(), status, oom: oom && killed, at: SystemTime::now() }
}
