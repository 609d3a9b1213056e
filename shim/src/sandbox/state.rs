//! Decides what a sandbox does; pure: no clock, no lock, no I/O.
//! Does not know how an effect is carried out, nor what containerd's messages look like.
//!
//! ```text
//! machine    Absent ──Create──▶ Booting ──Done──▶ Ready ──▶ Ended
//!                                  └──────Done(Err), MachineEnded──────▲
//!
//! init       Creating ──guest──▶ Created ──Start──▶ Starting ──▶ Running ──exit──▶ Draining ──▶ Stopped ──Delete──▶ Releasing ──▶ gone
//!                └─fault─▶ Releasing ─▶ gone                        (streams closed or too late,
//!                                                                    execs ended or too late)
//! exec                    Added ──Start──▶ Starting ──▶ Running ──exit──▶ Draining ──▶ Stopped ──Delete──▶ gone
//! ```
//!
//! Promises, each held by a property test below:
//! every ticket is answered exactly once; a process's exit is told exactly once, after its start; the
//! exit of an init comes after those of its execs; a machine that ends leaves no process running and none
//! of them successful.

use std::{collections::BTreeMap, time::SystemTime};

use super::model::*;
use crate::{
    error::{Fault, Kind},
    ids::{ContainerId, ExecId, ProcessKey},
};

const SIGKILL: u32 = 9;
/// Exit status of a process whose machine is gone, when nothing better is known.
const STATUS_LOST: u32 = 255;
/// Exit status of a process that was killed: 128 + SIGKILL.
const STATUS_KILLED: u32 = 137;

#[derive(Debug)]
enum Machine {
    Absent,
    Booting,
    Ready { pid: i32 },
    Ended(MachineEnd),
}

#[derive(Debug, PartialEq)]
enum Phase {
    /// Of an init: `prepared` on the host; a SIGKILL may have come in the meantime.
    Creating { ticket: Ticket, prepared: bool, killed: bool },
    /// Of an exec that was not started.
    Added { process: Vec<u8>, size: Option<(u32, u32)> },
    /// Of an init whose command waits.
    Created,
    Starting { ticket: Ticket },
    Running,
    /// Ended, but not yet told.
    Draining,
    Stopped,
    /// Of an init: being taken apart, once a preparation that is still under way has ended, else it would
    /// make things after they were taken back. `failed` is what Create is to be told.
    Releasing { tickets: Vec<Ticket>, failed: Option<(Ticket, Fault)>, preparing: bool },
}

#[derive(Debug)]
struct Process {
    phase: Phase,
    io: Io,
    pid: i32,
    exit: Option<ExitInfo>,
    /// Output may still come.
    streams_open: bool,
    waiters: Vec<Ticket>,
}

impl Process {
    fn new(phase: Phase, io: Io) -> Self {
        let streams_open = !(io.stdout.is_empty() && io.stderr.is_empty());
        Self { phase, io, pid: 0, exit: None, streams_open, waiters: Vec::new() }
    }

    /// Has a process in the guest that may still be running.
    fn is_alive(&self) -> bool {
        matches!(self.phase, Phase::Created | Phase::Starting { .. } | Phase::Running)
    }
}

#[derive(Debug)]
struct Container {
    request: Box<CreateRequest>,
    init: Process,
    execs: BTreeMap<ExecId, Process>,
    paused: bool,
}

/// One sandbox.
#[derive(Debug)]
pub struct Sandbox {
    machine: Machine,
    containers: BTreeMap<ContainerId, Container>,
    shutdown: Vec<Ticket>,
    tearing_down: bool,
    out: Vec<Effect>,
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

/// A container as `bulkhead ps` tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its id.
    pub id: ContainerId,
    /// Pid on the host.
    pub pid: i32,
    /// Its phase.
    pub status: Status,
}

impl Sandbox {
    /// A sandbox without machine and containers.
    pub fn new() -> Self {
        Self {
            machine: Machine::Absent,
            containers: BTreeMap::new(),
            shutdown: Vec::new(),
            tearing_down: false,
            out: Vec::new(),
        }
    }

    /// Takes one input and answers what is to be done, in order.
    pub fn handle(&mut self, input: Input) -> Vec<Effect> {
        match input {
            Input::Request(ticket, request) => {
                if let Err(fault) = self.request(ticket, request) {
                    self.reply(ticket, Err(fault));
                }
            }
            Input::Done(done) => self.done(done),
            Input::GuestExit(key, exit) => self.guest_exit(&key, exit),
            Input::GuestOom(id) => {
                if self.containers.contains_key(&id) {
                    self.out.push(Effect::Publish(Event::Oom(id)));
                }
            }
            Input::StreamsClosed(key) => {
                if let Some(process) = self.process_mut(&key) {
                    process.streams_open = false;
                    self.settle(&key.container);
                }
            }
            Input::MachineEnded(end) => self.machine_ended(end),
            Input::AgentLost => {
                if self.machine_lives() {
                    self.out.push(Effect::KillMachine("the guest's agent hung up".into()));
                }
            }
            Input::Expired(deadline) => self.expired(deadline),
        }
        std::mem::take(&mut self.out)
    }

    /// The containers, for `bulkhead ps`.
    pub fn summary(&self) -> Vec<Summary> {
        self.containers
            .iter()
            .map(|(id, c)| Summary { id: id.clone(), pid: c.init.pid, status: status_of(&c.init, c.paused) })
            .collect()
    }

    fn reply(&mut self, ticket: Ticket, answer: Result<Reply, Fault>) {
        self.out.push(Effect::Reply(ticket, answer));
    }

    fn container_mut(&mut self, id: &ContainerId) -> Result<&mut Container, Fault> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| Fault::new(Kind::NotFound, format!("container {id} does not exist")))
    }

    fn process_mut(&mut self, key: &ProcessKey) -> Option<&mut Process> {
        let container = self.containers.get_mut(&key.container)?;
        match &key.exec {
            None => Some(&mut container.init),
            Some(exec) => container.execs.get_mut(exec),
        }
    }

    fn find(&mut self, key: &ProcessKey) -> Result<&mut Process, Fault> {
        self.process_mut(key).ok_or_else(|| Fault::new(Kind::NotFound, format!("{key} does not exist")))
    }

    fn machine_lives(&self) -> bool {
        matches!(self.machine, Machine::Ready { .. })
    }

    fn request(&mut self, ticket: Ticket, request: Request) -> Result<(), Fault> {
        match request {
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
                    return Err(Fault::new(Kind::FailedPrecondition, format!("container {id} is not paused")));
                }
                self.ask(ticket, Ask::Resume(id))
            }
            Request::Update { container, resources } => {
                self.alive(&container, "updated")?;
                self.ask(ticket, Ask::Update(container, resources))
            }
            Request::Stats(id) => {
                self.alive(&id, "measured")?;
                self.ask(ticket, Ask::Stats(id))
            }
            Request::Pids(id) => {
                if !self.container_mut(&id)?.init.is_alive() {
                    self.reply(ticket, Ok(Reply::Pids(Vec::new())));
                    return Ok(());
                }
                self.ask(ticket, Ask::Pids(id))
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
        Err(Fault::new(Kind::FailedPrecondition, format!("container {id} is not running and cannot be {verb}")))
    }

    fn running(&mut self, id: &ContainerId, verb: &str) -> Result<(), Fault> {
        if self.container_mut(id)?.init.phase == Phase::Running {
            return Ok(());
        }
        Err(Fault::new(Kind::FailedPrecondition, format!("container {id} is not running and cannot be {verb}")))
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
        let phase = Phase::Creating { ticket, prepared: false, killed: false };
        let init = Process::new(phase, request.io.clone());
        if matches!(self.machine, Machine::Absent) {
            self.machine = Machine::Booting;
            self.out.push(Effect::Start(Job::Boot(request.clone())));
        }
        self.out.push(Effect::Start(Job::Prepare(request.clone())));
        let container = Container { request: request.clone(), init, execs: BTreeMap::new(), paused: false };
        self.containers.insert(request.id, container);
        Ok(())
    }

    fn start(&mut self, ticket: Ticket, key: &ProcessKey) -> Result<(), Fault> {
        let paused = self.container_mut(&key.container)?.paused;
        let init_runs = self.container_mut(&key.container)?.init.phase == Phase::Running;
        let process = self.find(key)?;
        let job = match (&mut process.phase, &key.exec) {
            (Phase::Created, None) => Job::GuestStart(key.container.clone()),
            (Phase::Added { .. }, _) if !init_runs => return Err(not_now(key, "its container is not running")),
            (Phase::Added { .. }, _) if paused => return Err(not_now(key, "its container is paused")),
            (Phase::Added { process: spec, size }, _) => Job::GuestExec {
                key: key.clone(),
                io: process.io.clone(),
                process: std::mem::take(spec),
                size: *size,
            },
            (Phase::Starting { .. } | Phase::Running, _) => return Err(not_now(key, "it was started already")),
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
        process: Vec<u8>,
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

    fn wait(&mut self, ticket: Ticket, key: &ProcessKey) -> Result<(), Fault> {
        let process = self.find(key)?;
        match (&process.phase, process.exit) {
            (Phase::Stopped | Phase::Releasing { .. }, Some(exit)) => self.reply(ticket, Ok(Reply::Exit(exit))),
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
            _ => Err(Fault::new(Kind::FailedPrecondition, format!("{key} must be stopped before it is deleted"))),
        }
    }

    fn shut_down_when_empty(&mut self) {
        if self.shutdown.is_empty() || self.tearing_down {
            return;
        }
        if self.containers.is_empty() {
            self.tearing_down = true;
            self.out.push(Effect::Start(Job::Teardown));
            return;
        }
        // Asked while containers remain: said yes and ignored, as containerd expects of a group's shim.
        for ticket in std::mem::take(&mut self.shutdown) {
            self.reply(ticket, Ok(Reply::Empty));
        }
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Boot(result) => self.booted(result),
            Done::Prepare(id, result) => self.prepared(&id, result),
            Done::GuestCreate(id, result) => self.created(&id, result),
            Done::GuestStart(id, result) => self.started(&ProcessKey::init(&id), result),
            Done::GuestExec(key, result) => self.started(&key, result),
            Done::Release(id) => self.released(&id),
            Done::Ask(ticket, ask, result) => self.answered(ticket, ask, result),
            Done::Teardown(result) => {
                for ticket in std::mem::take(&mut self.shutdown) {
                    self.reply(ticket, result.clone().map(|()| Reply::Empty));
                }
                self.out.push(Effect::Quit);
            }
        }
    }

    fn booted(&mut self, result: Result<i32, Fault>) {
        if !matches!(self.machine, Machine::Booting) {
            return;
        }
        match result {
            Ok(pid) => {
                self.machine = Machine::Ready { pid };
                let waiting: Vec<ContainerId> = self.containers.keys().cloned().collect();
                for id in waiting {
                    self.create_in_guest(&id);
                }
            }
            Err(fault) => {
                self.machine = Machine::Ended(MachineEnd {
                    reason: fault.message.clone(),
                    status: STATUS_LOST,
                    oom: false,
                    at: SystemTime::UNIX_EPOCH,
                });
                let waiting: Vec<ContainerId> = self.containers.keys().cloned().collect();
                for id in waiting {
                    self.fail_create(&id, fault.clone());
                }
            }
        }
    }

    fn prepared(&mut self, id: &ContainerId, result: Result<(), Fault>) {
        let Some(container) = self.containers.get_mut(id) else { return };
        match &mut container.init.phase {
            Phase::Creating { prepared, .. } => {
                *prepared = true;
                match result {
                    Ok(()) => self.create_in_guest(id),
                    Err(fault) => self.fail_create(id, fault),
                }
            }
            Phase::Releasing { preparing, .. } if *preparing => {
                *preparing = false;
                self.release(id);
            }
            _ => {}
        }
    }

    fn create_in_guest(&mut self, id: &ContainerId) {
        if !self.machine_lives() {
            return;
        }
        let Some(container) = self.containers.get(id) else { return };
        if matches!(container.init.phase, Phase::Creating { prepared: true, .. }) {
            self.out.push(Effect::Start(Job::GuestCreate(id.clone())));
        }
    }

    fn created(&mut self, id: &ContainerId, result: Result<(), Fault>) {
        let pid = match &self.machine {
            Machine::Ready { pid } => *pid,
            _ => 0,
        };
        let Some(container) = self.containers.get_mut(id) else { return };
        let Phase::Creating { ticket, killed, .. } = container.init.phase else { return };
        if let Err(fault) = result {
            return self.fail_create(id, fault);
        }
        container.init.phase = Phase::Created;
        container.init.pid = pid;
        self.out.push(Effect::Publish(Event::Create(container.request.clone(), pid)));
        self.reply(ticket, Ok(Reply::Pid(pid)));
        if killed {
            let ask = Ask::Signal { key: ProcessKey::init(id), signal: SIGKILL, all: true };
            self.out.push(Effect::Arm(Deadline::Killed(id.clone())));
            self.out.push(Effect::Start(Job::Ask(NOBODY, ask)));
        }
        // Its end may have overtaken the answer.
        if self.containers[id].init.exit.is_some() {
            self.drain(&ProcessKey::init(id));
        }
    }

    /// Create failed: everything made for the container goes first, then Create is told.
    fn fail_create(&mut self, id: &ContainerId, fault: Fault) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Phase::Creating { ticket, prepared, .. } = container.init.phase else { return };
        let failed = Some((ticket, fault));
        container.init.phase = Phase::Releasing { tickets: Vec::new(), failed, preparing: !prepared };
        if prepared {
            self.release(id);
        }
    }

    fn release(&mut self, id: &ContainerId) {
        let guest = self.machine_lives();
        self.out.push(Effect::Start(Job::Release { container: id.clone(), guest }));
    }

    fn started(&mut self, key: &ProcessKey, result: Result<(), Fault>) {
        let pid = match &self.machine {
            Machine::Ready { pid } => *pid,
            _ => self.containers.get(&key.container).map_or(0, |c| c.init.pid),
        };
        let Some(process) = self.process_mut(key) else { return };
        let Phase::Starting { ticket } = process.phase else { return };
        match result {
            Ok(()) => {
                process.phase = Phase::Running;
                process.pid = pid;
                let ended = process.exit.is_some();
                self.out.push(Effect::Publish(match &key.exec {
                    None => Event::Start(key.container.clone(), pid),
                    Some(_) => Event::ExecStarted(key.clone(), pid),
                }));
                self.reply(ticket, Ok(Reply::Pid(pid)));
                if ended {
                    self.drain(key);
                }
            }
            Err(fault) => self.failed_to_start(key, ticket, fault),
        }
    }

    fn failed_to_start(&mut self, key: &ProcessKey, ticket: Ticket, fault: Fault) {
        let Some(process) = self.process_mut(key) else { return };
        match key.exec {
            // Never ran, so nothing is told; it can be deleted.
            Some(_) => {
                process.phase = Phase::Stopped;
                process.streams_open = false;
                let exit = process.exit.unwrap_or(ExitInfo { status: STATUS_LOST, at: SystemTime::UNIX_EPOCH });
                process.exit = Some(exit);
                for waiter in std::mem::take(&mut process.waiters) {
                    self.reply(waiter, Ok(Reply::Exit(exit)));
                }
                self.reply(ticket, Err(fault));
                self.settle(&key.container);
            }
            // Its init is there and waits; it must be killed before it can be deleted.
            None => {
                process.phase = Phase::Created;
                let ended = process.exit.is_some();
                self.reply(ticket, Err(fault));
                if ended {
                    self.drain(key);
                }
            }
        }
    }

    /// What could not be taken back is in the log by now; the container itself is gone, and saying
    /// otherwise would make it undeletable.
    fn released(&mut self, id: &ContainerId) {
        let Some(mut container) = self.containers.remove(id) else { return };
        let phase = std::mem::replace(&mut container.init.phase, Phase::Stopped);
        let Phase::Releasing { tickets, failed, .. } = phase else {
            self.containers.insert(id.clone(), container);
            return;
        };
        let not_there = || Fault::new(Kind::NotFound, format!("container {id} does not exist"));
        if let Some((ticket, fault)) = failed {
            self.reply(ticket, Err(fault));
            for ticket in tickets.into_iter().chain(container.init.waiters) {
                self.reply(ticket, Err(not_there()));
            }
        } else {
            let exit = container.init.exit.expect("only an ended container is released");
            let pid = container.init.pid;
            self.out.push(Effect::Publish(Event::Delete(ProcessKey::init(id), pid, exit)));
            for waiter in container.init.waiters {
                self.reply(waiter, Ok(Reply::Exit(exit)));
            }
            for ticket in tickets {
                self.reply(ticket, Ok(Reply::Deleted { pid, exit }));
            }
        }
        for (exec, process) in container.execs {
            let key = ProcessKey { container: id.clone(), exec: Some(exec) };
            for waiter in process.waiters {
                self.reply(waiter, Err(Fault::new(Kind::NotFound, format!("{key} does not exist"))));
            }
        }
        self.shut_down_when_empty();
    }

    fn answered(&mut self, ticket: Ticket, ask: Ask, result: Result<Reply, Fault>) {
        let result = match (&ask, result) {
            (Ask::Pause(id), Ok(reply)) => {
                self.set_paused(id, true, Event::Paused(id.clone()));
                Ok(reply)
            }
            (Ask::Resume(id), Ok(reply)) => {
                self.set_paused(id, false, Event::Resumed(id.clone()));
                Ok(reply)
            }
            // A live task without pids would be taken for a leaked one, so a silent guest is one process.
            (Ask::Pids(id), Err(_)) => {
                let pid = self.containers.get(id).map_or(0, |c| c.init.pid);
                Ok(Reply::Pids(vec![(pid.unsigned_abs(), String::new())]))
            }
            // A guest that does not take SIGKILL loses its machine.
            (Ask::Signal { key, signal: SIGKILL, .. }, Err(fault))
                if key.exec.is_none() && fault.kind != Kind::NotFound && self.machine_lives() =>
            {
                self.out.push(Effect::KillMachine(format!("the guest did not take SIGKILL: {fault}")));
                Ok(Reply::Empty)
            }
            (Ask::Signal { key, .. }, Err(fault)) if fault.kind == Kind::NotFound => Err(already_finished(key)),
            (_, other) => other,
        };
        if ticket != NOBODY {
            self.reply(ticket, result);
        }
    }

    fn set_paused(&mut self, id: &ContainerId, paused: bool, event: Event) {
        if let Some(container) = self.containers.get_mut(id)
            && container.paused != paused
        {
            container.paused = paused;
            self.out.push(Effect::Publish(event));
        }
    }

    fn guest_exit(&mut self, key: &ProcessKey, exit: ExitInfo) {
        let Some(process) = self.process_mut(key) else { return };
        if process.exit.is_some() {
            return;
        }
        match process.phase {
            Phase::Creating { .. } | Phase::Starting { .. } => process.exit = Some(exit),
            Phase::Created | Phase::Running => {
                process.exit = Some(exit);
                self.drain(key);
            }
            _ => {}
        }
    }

    /// An exit is known and may be told once the output is copied and, for an init, its execs have ended.
    fn drain(&mut self, key: &ProcessKey) {
        let Some(process) = self.process_mut(key) else { return };
        process.phase = Phase::Draining;
        if process.streams_open {
            self.out.push(Effect::Arm(Deadline::Streams(key.clone())));
        }
        if key.exec.is_none() && self.containers[&key.container].execs.values().any(Process::is_alive) {
            self.out.push(Effect::Arm(Deadline::Execs(key.container.clone())));
        }
        self.settle(&key.container);
    }

    /// Tells every exit of the container that may be told by now, execs before the init.
    fn settle(&mut self, id: &ContainerId) {
        let Some(container) = self.containers.get(id) else { return };
        let ready: Vec<ProcessKey> = container
            .execs
            .iter()
            .filter(|(_, p)| p.phase == Phase::Draining && !p.streams_open)
            .map(|(exec, _)| ProcessKey { container: id.clone(), exec: Some(exec.clone()) })
            .collect();
        for key in ready {
            self.tell_exit(&key);
        }
        let container = &self.containers[id];
        let execs_ended =
            !container.execs.values().any(|p| p.is_alive() || matches!(p.phase, Phase::Draining));
        if container.init.phase == Phase::Draining && !container.init.streams_open && execs_ended {
            self.tell_exit(&ProcessKey::init(id));
        }
    }

    fn tell_exit(&mut self, key: &ProcessKey) {
        let Some(process) = self.process_mut(key) else { return };
        process.phase = Phase::Stopped;
        let (pid, exit) = (process.pid, process.exit.expect("a drained process has ended"));
        let waiters = std::mem::take(&mut process.waiters);
        self.out.push(Effect::Publish(Event::Exit(key.clone(), pid, exit)));
        for waiter in waiters {
            self.reply(waiter, Ok(Reply::Exit(exit)));
        }
    }

    fn machine_ended(&mut self, end: MachineEnd) {
        if matches!(self.machine, Machine::Ended(_)) {
            return;
        }
        self.machine = Machine::Ended(end.clone());
        let fault = Fault::new(Kind::Unavailable, format!("the sandbox's machine has ended: {}", end.reason));
        let ids: Vec<ContainerId> = self.containers.keys().cloned().collect();
        for id in ids {
            let container = &self.containers[&id];
            if end.oom && container.init.is_alive() {
                self.out.push(Effect::Publish(Event::Oom(id.clone())));
            }
            let execs: Vec<ExecId> = container.execs.keys().cloned().collect();
            for exec in execs {
                self.lose(&ProcessKey { container: id.clone(), exec: Some(exec) }, &end, &fault);
            }
            if matches!(self.containers[&id].init.phase, Phase::Creating { .. }) {
                self.fail_create(&id, fault.clone());
            } else {
                self.lose(&ProcessKey::init(&id), &end, &fault);
            }
        }
    }

    /// The process went down with its machine.
    fn lose(&mut self, key: &ProcessKey, end: &MachineEnd, fault: &Fault) {
        let Some(process) = self.process_mut(key) else { return };
        let lost = ExitInfo { status: end.status.max(1), at: end.at };
        match process.phase {
            Phase::Starting { ticket } => {
                process.phase = Phase::Running;
                process.exit.get_or_insert(lost);
                if key.exec.is_some() {
                    return self.failed_to_start(key, ticket, fault.clone());
                }
                self.reply(ticket, Err(fault.clone()));
                self.drain(key);
            }
            Phase::Created | Phase::Running => {
                process.exit.get_or_insert(lost);
                self.drain(key);
            }
            _ => {}
        }
    }

    fn expired(&mut self, deadline: Deadline) {
        match deadline {
            Deadline::Streams(key) => {
                if let Some(process) = self.process_mut(&key)
                    && process.phase == Phase::Draining
                {
                    process.streams_open = false;
                    self.settle(&key.container);
                }
            }
            Deadline::Execs(id) => {
                let Some(container) = self.containers.get_mut(&id) else { return };
                if container.init.phase != Phase::Draining {
                    return;
                }
                let at = container.init.exit.map_or(SystemTime::UNIX_EPOCH, |e| e.at);
                let late: Vec<ExecId> =
                    container.execs.iter().filter(|(_, p)| p.is_alive()).map(|(e, _)| e.clone()).collect();
                let fault = Fault::new(Kind::Unavailable, format!("container {id} has ended"));
                let end =
                    MachineEnd { reason: String::new(), status: STATUS_KILLED, oom: false, at };
                for exec in late {
                    let key = ProcessKey { container: id.clone(), exec: Some(exec) };
                    if let Some(process) = self.process_mut(&key) {
                        process.streams_open = false;
                    }
                    self.lose(&key, &end, &fault);
                }
                self.settle(&id);
            }
            Deadline::Killed(id) => {
                if self.machine_lives() && self.containers.get(&id).is_some_and(|c| c.init.is_alive()) {
                    let text = format!("container {id} did not end after SIGKILL");
                    self.out.push(Effect::KillMachine(text));
                }
            }
        }
    }
}

/// The ticket of a question that nobody asked.
const NOBODY: Ticket = Ticket(0);

fn status_of(process: &Process, paused: bool) -> Status {
    match process.phase {
        Phase::Creating { .. } | Phase::Added { .. } | Phase::Created | Phase::Starting { .. } => Status::Created,
        Phase::Running | Phase::Draining if paused => Status::Paused,
        Phase::Running | Phase::Draining => Status::Running,
        Phase::Stopped | Phase::Releasing { .. } => Status::Stopped,
    }
}

fn not_now(key: &ProcessKey, why: &str) -> Fault {
    Fault::new(Kind::FailedPrecondition, format!("{key} cannot be started: {why}"))
}

/// In the words that containerd's clients look for.
fn already_finished(key: &ProcessKey) -> Fault {
    Fault::new(Kind::NotFound, format!("{key}: process already finished"))
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
