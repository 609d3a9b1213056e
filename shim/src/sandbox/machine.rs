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
use crate::{
    cgroup,
    error::{Fault, Kind},
    tasks,
};

/// Exit status of processes whose machine was killed: 128 + SIGKILL.
const STATUS_KILLED: u32 = 137;
/// Exit status of processes whose machine went away in any other way.
const STATUS_LOST: u32 = 255;
/// How long ending a machine may take; it is a SIGKILL to a handful of processes.
const KILL: Duration = Duration::from_secs(5);
/// How long the end of the machine is waited for when its guest has hung up: its parts die one after the other.
const SEEN: Duration = Duration::from_secs(2);

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
    let oom = oom && killed;
    let mut reason = ended.to_string();
    if oom {
        reason.push_str(
            "; the limit of memory of its cgroup on the host leaves too little for a machine: with Kubernetes, \
             name a RuntimeClass that states its overhead",
        );
    }
    MachineEnd { reason, status, oom, at: SystemTime::now() }
}

/// Why a call to the guest failed. A guest that hangs up because its machine ends says nothing of that, and the end is
/// seen a moment later: so it is waited for, and tells the reason.
pub(super) async fn explained(fault: Fault, mut ended: watch::Receiver<Option<MachineEnd>>) -> Fault {
    if fault.kind != Kind::Unavailable {
        return fault;
    }
    match tokio::time::timeout(SEEN, ended.wait_for(Option::is_some)).await {
        Ok(Ok(end)) => {
            let reason = end.as_ref().map(|end| end.reason.as_str()).unwrap_or_default();
            Fault::new(Kind::Unavailable, format!("the sandbox's machine has ended: {reason}"))
        }
        // It lives, or nobody watches it any more.
        Ok(Err(_)) | Err(_) => fault,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn killed() -> Ended {
        Ended {
            part: "qemu".into(),
            exit: Exit::Signal(9),
            asked: false,
            panic: None,
            messages: Vec::new(),
            console: Vec::new(),
        }
    }

    #[test]
    fn a_machine_that_the_host_had_no_memory_for_says_what_to_do() {
        let end = describe(&killed(), true);
        assert!(end.oom && end.status == STATUS_KILLED, "{end:?}");
        assert!(end.reason.starts_with("qemu ") && end.reason.contains("RuntimeClass"), "{}", end.reason);
        assert!(!describe(&killed(), false).reason.contains("memory"));
        let left = Ended { exit: Exit::Code(1), ..killed() };
        assert!(!describe(&left, true).oom);
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_hangs_up_is_explained_by_the_end_of_its_machine() {
        let lost = || Fault::new(Kind::Unavailable, "the guest cannot be reached: early eof");
        let (tell, ended) = watch::channel(None);
        let (fault, ()) = tokio::join!(explained(lost(), ended.clone()), async {
            tokio::time::sleep(SEEN / 2).await;
            tell.send_replace(Some(describe(&killed(), true)));
        });
        assert!(
            fault.message.contains("machine has ended") && fault.message.contains("RuntimeClass"),
            "{fault}"
        );
        let own = Fault::new(Kind::NotFound, "no such program");
        assert_eq!(explained(own, ended).await.message, "no such program");
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_hangs_up_while_its_machine_lives_is_told_as_that() {
        let lost = || Fault::new(Kind::Unavailable, "the guest cannot be reached: early eof");
        let (tell, ended) = watch::channel(None);
        assert_eq!(explained(lost(), ended.clone()).await.message, lost().message);
        drop(tell);
        assert_eq!(explained(lost(), ended).await.message, lost().message);
    }
}
