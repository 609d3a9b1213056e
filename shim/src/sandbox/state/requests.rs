//! What containerd asks: each request is refused, answered, or begins a job.

use std::time::SystemTime;

use super::*;

impl Sandbox {
    pub(super) fn request(&mut self, ticket: Ticket, request: Request) -> Result<(), Fault> {
        match request {
            Request::Pod(request) => self.pod_request(ticket, request),
            Request::Create(create) => self.create(ticket, create),
            Request::Start(key) => self.start(ticket, &key),
            Request::Exec { container, exec, io, process } => self.exec(ticket, container, exec, io, process),
            Request::State(key) => self.state(ticket, &key),
            Request::Kill { key, signal, all } => self.kill(ticket, key, signal, all),
            Request::Wait(key) => self.wait(ticket, &key),
            Request::Delete(key) => self.delete(ticket, &key),
            Request::Connect(id) => {
                let pid = self.containers.get(&id).map_or(0, |c| c.init.pid);
                self.reply(ticket, Ok(Reply::Connect(pid)));
                Ok(())
            }
            Request::CloseIo(key) => {
                self.find(&key)?;
                self.out.push(Effect::CloseStdin(key));
                self.reply(ticket, Ok(Reply::Empty));
                Ok(())
            }
            Request::ResizePty { key, width, height } => self.resize(ticket, key, width, height),
            Request::Pause(id) => {
                self.running(&id, "paused")?;
                self.ask(ticket, Ask::Pause(id))
            }
            Request::Resume(id) => {
                let container = self.container_mut(&id)?;
                if !container.paused {
                    return Err(Fault::new(
                        Kind::FailedPrecondition,
                        format!("container {id} is not paused"),
                    ));
                }
                self.ask(ticket, Ask::Resume(id))
            }
            Request::Update { container, resources } => {
                self.alive(&container, "updated")?;
                self.ask(ticket, Ask::Update(container, resources))
            }
            Request::Stats(id) => {
                // Also of one that has ended: containerd wants to know whether it was for want of memory.
                if matches!(
                    self.container_mut(&id)?.init.phase,
                    Phase::Creating { .. } | Phase::Releasing { .. }
                ) {
                    let text = format!("container {id} is not running and cannot be measured");
                    return Err(Fault::new(Kind::FailedPrecondition, text));
                }
                self.ask(ticket, Ask::Stats(id))
            }
            Request::Pids(id) => self.pids(ticket, id),
            // A pod of the sandbox API has a Shutdown of its own, and may be without containers.
            Request::Shutdown if self.pod.is_there() => {
                self.reply(ticket, Ok(Reply::Empty));
                Ok(())
            }
            Request::Shutdown => {
                self.shutdown.push(ticket);
                self.shut_down_when_empty();
                Ok(())
            }
        }
    }

    fn ask(&mut self, ticket: Ticket, ask: Ask) -> Result<(), Fault> {
        self.out.push(Effect::Start(Job::Ask(ticket, ask)));
        Ok(())
    }

    fn alive(&mut self, id: &ContainerId, verb: &str) -> Result<(), Fault> {
        if self.container_mut(id)?.init.is_alive() {
            return Ok(());
        }
        Err(Fault::new(
            Kind::FailedPrecondition,
            format!("container {id} is not running and cannot be {verb}"),
        ))
    }

    fn running(&mut self, id: &ContainerId, verb: &str) -> Result<(), Fault> {
        if self.container_mut(id)?.init.phase == Phase::Running {
            return Ok(());
        }
        Err(Fault::new(
            Kind::FailedPrecondition,
            format!("container {id} is not running and cannot be {verb}"),
        ))
    }

    /// containerd asks when it comes back, and takes a task without pids for one whose creation it never
    /// saw through: it ends it, and its exit status with it. So only a container that is being created has
    /// none, and one that has ended is an error, as with runc.
    fn pids(&mut self, ticket: Ticket, id: ContainerId) -> Result<(), Fault> {
        let init = &self.container_mut(&id)?.init;
        let known = match init.phase {
            Phase::Creating { .. } => Vec::new(),
            Phase::Draining => vec![(init.pid.unsigned_abs(), String::new())],
            _ if init.is_alive() => return self.ask(ticket, Ask::Pids(id)),
            _ => return Err(Fault::new(Kind::FailedPrecondition, format!("container {id} has ended"))),
        };
        self.reply(ticket, Ok(Reply::Pids(known)));
        Ok(())
    }

    fn create(&mut self, ticket: Ticket, request: Box<CreateRequest>) -> Result<(), Fault> {
        if let Machine::Ended(end) = &self.machine {
            let text = format!("the sandbox's machine has ended: {}", end.reason);
            return Err(Fault::new(Kind::FailedPrecondition, text));
        }
        if self.tearing_down {
            return Err(Fault::new(Kind::FailedPrecondition, "the sandbox is shutting down"));
        }
        if self.containers.contains_key(&request.id) {
            let text = format!("container {} already exists", request.id);
            return Err(Fault::new(Kind::AlreadyExists, text));
        }
        if self.pod.is_there() && !self.machine_lives() {
            return Err(Fault::new(Kind::FailedPrecondition, "the sandbox was not started"));
        }
        let phase = Phase::Creating { ticket, prepared: false, killed: false };
        let init = Process::new(phase, request.io.clone());
        if matches!(self.machine, Machine::Absent) {
            self.machine = Machine::Booting;
            self.out.push(Effect::Start(Job::Boot(request.clone())));
        }
        self.out.push(Effect::Start(Job::Prepare(request.clone())));
        let container = Container {
            request: request.clone(),
            role: Role::Alone,
            init,
            execs: BTreeMap::new(),
            paused: false,
        };
        self.containers.insert(request.id, container);
        Ok(())
    }

    fn start(&mut self, ticket: Ticket, key: &ProcessKey) -> Result<(), Fault> {
        let paused = self.container_mut(&key.container)?.paused;
        let init_runs = self.container_mut(&key.container)?.init.phase == Phase::Running;
        let process = self.find(key)?;
        let job = match (&mut process.phase, &key.exec) {
            (Phase::Created, None) => Job::GuestStart(key.container.clone()),
            (Phase::Added { .. }, _) if !init_runs => {
                return Err(not_now(key, "its container is not running"));
            }
            (Phase::Added { .. }, _) if paused => return Err(not_now(key, "its container is paused")),
            (Phase::Added { process: spec, size }, _) => Job::GuestExec {
                key: key.clone(),
                io: process.io.clone(),
                process: std::mem::take(spec),
                size: *size,
            },
            (Phase::Starting { .. } | Phase::Running, _) => {
                return Err(not_now(key, "it was started already"));
            }
            (Phase::Draining | Phase::Stopped, _) => return Err(not_now(key, "it has ended")),
            _ => return Err(not_now(key, "it is not ready")),
        };
        process.phase = Phase::Starting { ticket };
        self.out.push(Effect::Start(job));
        Ok(())
    }

    fn exec(
        &mut self,
        ticket: Ticket,
        container: ContainerId,
        exec: ExecId,
        io: Io,
        process: Opaque,
    ) -> Result<(), Fault> {
        let key = ProcessKey { container: container.clone(), exec: Some(exec.clone()) };
        let owner = self.container_mut(&container)?;
        if owner.execs.contains_key(&exec) {
            return Err(Fault::new(Kind::AlreadyExists, format!("{key} already exists")));
        }
        if owner.init.phase != Phase::Running {
            let text = format!("cannot exec in container {container}: it is not running");
            return Err(Fault::new(Kind::FailedPrecondition, text));
        }
        owner.execs.insert(exec, Process::new(Phase::Added { process, size: None }, io));
        self.out.push(Effect::Publish(Event::ExecAdded(key)));
        self.reply(ticket, Ok(Reply::Empty));
        Ok(())
    }

    fn state(&mut self, ticket: Ticket, key: &ProcessKey) -> Result<(), Fault> {
        let container = self.container_mut(&key.container)?;
        let (bundle, paused) = (container.request.bundle.clone(), container.paused);
        let process = self.find(key)?;
        let reply = Reply::State {
            bundle,
            pid: process.pid,
            status: status_of(process, paused),
            io: process.io.clone(),
            exit: process.exit.filter(|_| !matches!(process.phase, Phase::Draining)),
        };
        self.reply(ticket, Ok(reply));
        Ok(())
    }

    fn kill(&mut self, ticket: Ticket, key: ProcessKey, signal: u32, all: bool) -> Result<(), Fault> {
        let process = self.find(&key)?;
        match &mut process.phase {
            // The guest has nothing to signal yet; the wish is kept.
            Phase::Creating { killed, .. } => {
                *killed |= signal == SIGKILL;
                self.reply(ticket, Ok(Reply::Empty));
                Ok(())
            }
            Phase::Created | Phase::Starting { .. } | Phase::Running => {
                if signal == SIGKILL && key.exec.is_none() {
                    self.out.push(Effect::Arm(Deadline::Killed(key.container.clone())));
                }
                self.ask(ticket, Ask::Signal { key, signal, all })
            }
            Phase::Added { .. } => Err(Fault::new(Kind::NotFound, format!("{key} was not started"))),
            _ => Err(already_finished(&key)),
        }
    }

    /// As kill(2) to the first process of a container on the host; one that has ended feels nothing.
    pub(super) fn signalled(&mut self, id: &ContainerId, signal: u32) {
        if self.containers.get(id).is_some_and(|c| c.init.is_alive()) {
            let key = ProcessKey::init(id);
            if signal == SIGKILL {
                self.out.push(Effect::Arm(Deadline::Killed(id.clone())));
            }
            self.out.push(Effect::Start(Job::Ask(NOBODY, Ask::Signal { key, signal, all: false })));
        }
    }

    fn wait(&mut self, ticket: Ticket, key: &ProcessKey) -> Result<(), Fault> {
        let process = self.find(key)?;
        match (&process.phase, process.exit) {
            (Phase::Stopped | Phase::Releasing { .. }, Some(exit)) => {
                self.reply(ticket, Ok(Reply::Exit(exit)))
            }
            _ => process.waiters.push(ticket),
        }
        Ok(())
    }

    fn resize(&mut self, ticket: Ticket, key: ProcessKey, width: u32, height: u32) -> Result<(), Fault> {
        let process = self.find(&key)?;
        if !process.io.terminal {
            return Err(Fault::new(Kind::FailedPrecondition, format!("{key} has no terminal")));
        }
        if let Phase::Added { size, .. } = &mut process.phase {
            *size = Some((width, height));
            self.reply(ticket, Ok(Reply::Empty));
            return Ok(());
        }
        if !process.is_alive() {
            return Err(already_finished(&key));
        }
        self.ask(ticket, Ask::ResizePty(key, width, height))
    }

    fn delete(&mut self, ticket: Ticket, key: &ProcessKey) -> Result<(), Fault> {
        let guest = self.machine_lives();
        let process = self.find(key)?;
        match (&mut process.phase, process.exit, &key.exec) {
            (Phase::Releasing { tickets, .. }, _, _) => {
                tickets.push(ticket);
                Ok(())
            }
            // Whoever asked for it has gone: a containerd that came back takes back what it did not finish.
            (Phase::Creating { .. }, _, _) => {
                let text = format!("container {} was deleted while it was being created", key.container);
                self.fail_create(&key.container, Fault::new(Kind::FailedPrecondition, text));
                if let Phase::Releasing { tickets, .. } = &mut self.find(key)?.phase {
                    tickets.push(ticket);
                }
                Ok(())
            }
            (Phase::Added { .. }, _, Some(exec)) => {
                let exec = exec.clone();
                self.container_mut(&key.container)?.execs.remove(&exec);
                // Never ran: nothing ended, so there is no status to tell but zero (runc's answer too).
                let exit = ExitInfo { status: 0, at: SystemTime::UNIX_EPOCH };
                self.reply(ticket, Ok(Reply::Deleted { pid: 0, exit }));
                Ok(())
            }
            (Phase::Stopped, Some(exit), Some(exec)) => {
                let (exec, pid) = (exec.clone(), process.pid);
                self.container_mut(&key.container)?.execs.remove(&exec);
                self.out.push(Effect::Publish(Event::Delete(key.clone(), pid, exit)));
                self.reply(ticket, Ok(Reply::Deleted { pid, exit }));
                Ok(())
            }
            (Phase::Stopped, Some(_), None) => {
                process.phase = Phase::Releasing { tickets: vec![ticket], failed: None, preparing: false };
                self.out.push(Effect::Start(Job::Release { container: key.container.clone(), guest }));
                Ok(())
            }
            _ => Err(Fault::new(
                Kind::FailedPrecondition,
                format!("{key} must be stopped before it is deleted"),
            )),
        }
    }

    pub(super) fn shut_down_when_empty(&mut self) {
        if self.tearing_down || (self.shutdown.is_empty() && !self.end_when_empty) {
            return;
        }
        if self.containers.is_empty() {
            self.tearing_down = true;
            self.out.push(Effect::Start(Job::Teardown));
            return;
        }
        // Asked while containers remain: said yes and ignored, as containerd expects of a group's shim. But
        // for a pod it asks once, after it has deleted the pod: then the last container ends it.
        self.end_when_empty |= self.pod_deleted && !self.shutdown.is_empty();
        for ticket in std::mem::take(&mut self.shutdown) {
            self.reply(ticket, Ok(Reply::Empty));
        }
    }
}

fn not_now(key: &ProcessKey, why: &str) -> Fault {
    Fault::new(Kind::FailedPrecondition, format!("{key} cannot be started: {why}"))
}
