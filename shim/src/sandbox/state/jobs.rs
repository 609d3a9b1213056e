//! What follows the end of a job.

use std::time::SystemTime;

use super::*;

impl Sandbox {
    pub(super) fn done(&mut self, done: Done) {
        match done {
            Done::Boot(result) => self.booted(result),
            Done::PlanPod(result) => self.pod_planned(result),
            Done::Halt | Done::Fit => {}
            Done::Prepare(id, result) => self.prepared(&id, result),
            Done::GuestCreate(id, result) => self.created(&id, result),
            Done::GuestStart(id, result) => self.started(&ProcessKey::init(&id), result),
            Done::GuestExec(key, result) => self.started(&key, result),
            Done::Release(id) => self.released(&id),
            Done::Ask(ticket, ask, result) => self.answered(ticket, ask, result),
            Done::Teardown(result) => {
                let mut tickets = std::mem::take(&mut self.shutdown);
                tickets.extend(self.pod.take_shutdowns());
                for ticket in tickets {
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
        if let Ok(pid) = result {
            self.machine = Machine::Ready { pid };
        }
        self.pod_booted(&result);
        match result {
            Ok(_) => {
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

    fn prepared(&mut self, id: &ContainerId, result: Result<Role, Fault>) {
        let Some(container) = self.containers.get_mut(id) else { return };
        match &mut container.init.phase {
            Phase::Creating { prepared, .. } => {
                *prepared = true;
                match result {
                    Ok(role) => {
                        container.role = role;
                        self.create_in_guest(id);
                    }
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

    fn created(&mut self, id: &ContainerId, result: Result<i32, Fault>) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Phase::Creating { ticket, killed, .. } = container.init.phase else { return };
        let pid = match result {
            Ok(pid) => pid,
            Err(fault) => return self.fail_create(id, fault),
        };
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
    pub(super) fn fail_create(&mut self, id: &ContainerId, fault: Fault) {
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
        let pid = self.containers.get(&key.container).map_or(0, |c| c.init.pid);
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

    pub(super) fn failed_to_start(&mut self, key: &ProcessKey, ticket: Ticket, fault: Fault) {
        let Some(process) = self.process_mut(key) else { return };
        match key.exec {
            // Never ran, so nothing is told; it can be deleted.
            Some(_) => {
                process.phase = Phase::Stopped;
                process.streams_open = false;
                let exit =
                    process.exit.unwrap_or(ExitInfo { status: STATUS_LOST, at: SystemTime::UNIX_EPOCH });
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
            self.pod_deleted |= container.role == Role::Sandbox;
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
        // The last container of a machine without a pod ends it.
        if self.machine_lives() && (self.pod.is_there() || !self.containers.is_empty()) {
            self.out.push(Effect::Start(Job::Fit));
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
            // With the machine went whoever was to be signalled, whatever became of the question.
            (Ask::Signal { key, .. }, Err(fault))
                if fault.kind == Kind::NotFound || matches!(self.machine, Machine::Ended(_)) =>
            {
                Err(already_finished(key))
            }
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
}
