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

use std::collections::BTreeMap;

mod ends;
mod jobs;
mod pod;
mod requests;
#[cfg(test)]
mod tests;

use super::model::*;
use crate::{
    error::{Fault, Kind},
    ids::{ContainerId, ExecId, ProcessKey},
    plan::Role,
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
    Creating {
        ticket: Ticket,
        prepared: bool,
        killed: bool,
    },
    /// Of an exec that was not started.
    Added {
        process: Opaque,
        size: Option<(u32, u32)>,
    },
    /// Of an init whose command waits.
    Created,
    Starting {
        ticket: Ticket,
    },
    Running,
    /// Ended, but not yet told.
    Draining,
    Stopped,
    /// Of an init: being taken apart, once a preparation that is still under way has ended, else it would
    /// make things after they were taken back. `failed` is what Create is to be told.
    Releasing {
        tickets: Vec<Ticket>,
        failed: Option<(Ticket, Fault)>,
        preparing: bool,
    },
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
    /// Known once its specification was read.
    role: Role,
    init: Process,
    execs: BTreeMap<ExecId, Process>,
    paused: bool,
}

/// One sandbox.
#[derive(Debug)]
pub struct Sandbox {
    machine: Machine,
    containers: BTreeMap<ContainerId, Container>,
    pod: pod::PodBooks,
    shutdown: Vec<Ticket>,
    /// The container that stands for the pod was deleted.
    pod_deleted: bool,
    /// Shutdown was asked for after that and is not asked for again.
    end_when_empty: bool,
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
            pod: pod::PodBooks::default(),
            shutdown: Vec::new(),
            pod_deleted: false,
            end_when_empty: false,
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
            Input::Signalled(id, signal) => self.signalled(&id, signal),
            Input::AgentLost => {
                if self.machine_lives() {
                    self.out.push(Effect::KillMachine("the guest's agent hung up".into()));
                }
            }
            Input::Expired(deadline) => self.expired(deadline),
        }
        self.wind_up_pod();
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
}

/// The ticket of a question that nobody asked.
const NOBODY: Ticket = Ticket(0);

fn status_of(process: &Process, paused: bool) -> Status {
    match process.phase {
        Phase::Creating { .. } | Phase::Added { .. } | Phase::Created | Phase::Starting { .. } => {
            Status::Created
        }
        Phase::Running | Phase::Draining if paused => Status::Paused,
        Phase::Running | Phase::Draining => Status::Running,
        Phase::Stopped | Phase::Releasing { .. } => Status::Stopped,
    }
}

/// In the words that containerd's clients look for.
fn already_finished(key: &ProcessKey) -> Fault {
    Fault::new(Kind::NotFound, format!("{key}: process already finished"))
}
