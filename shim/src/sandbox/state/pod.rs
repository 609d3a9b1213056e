//! The pod itself, where containerd makes it by the sandbox API and not as a container.
//!
//! ```text
//! None ──Create──▶ Planning ──Done──▶ Planned ──Start──▶ Starting ──booted──▶ Running ──machine ended──▶ Ended
//!                     └─fault─▶ None     └─────Stop────────────────────────────────────────────────────▲
//! ```
//! Shutdown may come at any time: it ends the machine, takes back every container that is left, and then the
//! sandbox. While there is such a pod, the task service's own Shutdown means nothing.

use super::*;

/// What the books say of the pod.
#[derive(Debug, Default)]
pub(super) struct PodBooks {
    phase: PodPhase,
    /// Who waits for its end.
    waiters: Vec<Ticket>,
    /// Who asked for its end.
    stops: Vec<Ticket>,
    /// Its end was asked for: the machine's is then no failure.
    stopping: bool,
    /// Who asked for the end of everything.
    shutdowns: Vec<Ticket>,
}

#[derive(Debug, Default, PartialEq)]
enum PodPhase {
    #[default]
    None,
    Planning(Ticket),
    Planned,
    Starting(Ticket),
    Running,
    Ended(ExitInfo),
}

impl PodBooks {
    /// Whether containerd has made the pod by the sandbox API.
    pub(super) fn is_there(&self) -> bool {
        self.phase != PodPhase::None
    }

    /// Those who asked for the end of everything, once it has come.
    pub(super) fn take_shutdowns(&mut self) -> Vec<Ticket> {
        std::mem::take(&mut self.shutdowns)
    }
}

impl Sandbox {
    pub(super) fn pod_request(&mut self, ticket: Ticket, request: PodRequest) -> Result<(), Fault> {
        match request {
            PodRequest::Create(create) => self.pod_create(ticket, create),
            PodRequest::Start => self.pod_start(ticket),
            PodRequest::Stop { at } => self.pod_stop(ticket, at),
            PodRequest::Wait => {
                match self.existing_pod()? {
                    PodPhase::Ended(exit) => {
                        let exit = *exit;
                        self.reply(ticket, Ok(Reply::Exit(exit)));
                    }
                    _ => self.pod.waiters.push(ticket),
                }
                Ok(())
            }
            PodRequest::Status => {
                let phase = self.existing_pod()?;
                let (ready, exit) = match phase {
                    PodPhase::Running => (true, None),
                    PodPhase::Ended(exit) => (false, Some(*exit)),
                    _ => (false, None),
                };
                self.reply(ticket, Ok(Reply::PodStatus { ready, pid: self.pod_pid(), exit }));
                Ok(())
            }
            PodRequest::Stats => {
                self.existing_pod()?;
                self.out.push(Effect::Start(Job::Ask(ticket, Ask::PodStats)));
                Ok(())
            }
            PodRequest::Shutdown => {
                self.pod.shutdowns.push(ticket);
                self.end_machine("the pod is shut down");
                Ok(())
            }
        }
    }

    fn existing_pod(&self) -> Result<&PodPhase, Fault> {
        match &self.pod.phase {
            PodPhase::None | PodPhase::Planning(_) => {
                Err(Fault::new(Kind::NotFound, "there is no such sandbox"))
            }
            phase => Ok(phase),
        }
    }

    fn pod_pid(&self) -> i32 {
        match &self.machine {
            Machine::Ready { pid } => *pid,
            _ => 0,
        }
    }

    fn pod_create(&mut self, ticket: Ticket, create: Box<CreatePod>) -> Result<(), Fault> {
        if self.pod.is_there() || !matches!(self.machine, Machine::Absent) {
            return Err(Fault::new(Kind::AlreadyExists, "the sandbox already exists"));
        }
        if self.tearing_down || !self.pod.shutdowns.is_empty() {
            return Err(Fault::new(Kind::FailedPrecondition, "the sandbox is shutting down"));
        }
        self.pod.phase = PodPhase::Planning(ticket);
        self.out.push(Effect::Start(Job::PlanPod(create)));
        Ok(())
    }

    pub(super) fn pod_planned(&mut self, result: Result<(), Fault>) {
        let PodPhase::Planning(ticket) = self.pod.phase else { return };
        self.pod.phase = if result.is_ok() { PodPhase::Planned } else { PodPhase::None };
        self.reply(ticket, result.map(|()| Reply::Empty));
    }

    fn pod_start(&mut self, ticket: Ticket) -> Result<(), Fault> {
        match self.existing_pod()? {
            PodPhase::Planned if matches!(self.machine, Machine::Absent) && !self.pod.stopping => {}
            PodPhase::Planned => return Err(pod_not_now("it is shutting down")),
            PodPhase::Ended(_) => return Err(pod_not_now("it has ended")),
            _ => return Err(pod_not_now("it was started already")),
        }
        self.pod.phase = PodPhase::Starting(ticket);
        self.machine = Machine::Booting;
        self.out.push(Effect::Start(Job::BootPod));
        Ok(())
    }

    /// The machine has booted, or will not.
    pub(super) fn pod_booted(&mut self, result: &Result<i32, Fault>) {
        if result.is_ok() && self.pod.stopping {
            self.out.push(Effect::KillMachine("the pod was stopped while it started".into()));
        }
        let PodPhase::Starting(ticket) = self.pod.phase else { return };
        match result {
            Ok(pid) => {
                self.pod.phase = PodPhase::Running;
                let stopped = || pod_not_now("it was stopped meanwhile");
                self.reply(ticket, if self.pod.stopping { Err(stopped()) } else { Ok(Reply::Pid(*pid)) });
            }
            Err(fault) => {
                self.reply(ticket, Err(fault.clone()));
                // It never ran, so there is no time of its end.
                self.pod_ended(ExitInfo { status: STATUS_LOST, at: std::time::SystemTime::UNIX_EPOCH });
            }
        }
    }

    fn pod_stop(&mut self, ticket: Ticket, at: std::time::SystemTime) -> Result<(), Fault> {
        match self.existing_pod()? {
            PodPhase::Ended(_) => self.reply(ticket, Ok(Reply::Empty)),
            PodPhase::Planned => {
                self.pod_ended(ExitInfo { status: 0, at });
                self.reply(ticket, Ok(Reply::Empty));
            }
            PodPhase::Running if !self.pod.stopping => {
                self.pod.stops.push(ticket);
                self.pod.stopping = true;
                // The guest may write out what is left.
                self.out.push(Effect::Start(Job::Halt));
            }
            _ => {
                self.pod.stops.push(ticket);
                self.end_machine("the pod is stopped");
            }
        }
        Ok(())
    }

    /// Ends the machine at once; one that is booting, as soon as it can be ended.
    fn end_machine(&mut self, why: &str) {
        self.pod.stopping = true;
        if matches!(self.machine, Machine::Booting | Machine::Ready { .. }) {
            self.out.push(Effect::KillMachine(why.into()));
        }
    }

    /// The machine has ended, and the pod with it.
    pub(super) fn pod_lost(&mut self, end: &MachineEnd, fault: &Fault) {
        match self.pod.phase {
            PodPhase::Starting(ticket) => self.reply(ticket, Err(fault.clone())),
            PodPhase::Running => {}
            _ => return,
        }
        let status = if self.pod.stopping { 0 } else { end.status.max(1) };
        self.pod_ended(ExitInfo { status, at: end.at });
    }

    fn pod_ended(&mut self, exit: ExitInfo) {
        self.pod.phase = PodPhase::Ended(exit);
        for waiter in std::mem::take(&mut self.pod.waiters) {
            self.reply(waiter, Ok(Reply::Exit(exit)));
        }
        for stop in std::mem::take(&mut self.pod.stops) {
            self.reply(stop, Ok(Reply::Empty));
        }
    }

    /// After everything that happens: takes the next step towards the end that was asked for. A container that
    /// nobody deletes any more goes like one that was.
    pub(super) fn wind_up_pod(&mut self) {
        let busy = matches!(self.machine, Machine::Booting | Machine::Ready { .. })
            || matches!(self.pod.phase, PodPhase::Planning(_));
        if self.pod.shutdowns.is_empty() || self.tearing_down || busy {
            return;
        }
        let stopped = self.containers.iter().filter(|(_, c)| c.init.phase == Phase::Stopped);
        let stopped: Vec<ContainerId> = stopped.map(|(id, _)| id.clone()).collect();
        for id in stopped {
            if let Some(container) = self.containers.get_mut(&id) {
                container.init.phase =
                    Phase::Releasing { tickets: Vec::new(), failed: None, preparing: false };
            }
            self.out.push(Effect::Start(Job::Release { container: id, guest: false }));
        }
        if self.containers.is_empty() {
            self.tearing_down = true;
            for waiter in std::mem::take(&mut self.pod.waiters) {
                self.reply(waiter, Err(pod_not_now("the sandbox was shut down")));
            }
            self.out.push(Effect::Start(Job::Teardown));
        }
    }
}

fn pod_not_now(why: &str) -> Fault {
    Fault::new(Kind::FailedPrecondition, format!("the sandbox cannot be started: {why}"))
}
