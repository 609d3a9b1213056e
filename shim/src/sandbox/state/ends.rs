//! How processes and the machine end, and in which order that is told.

use std::time::SystemTime;

use super::*;

impl Sandbox {
    pub(super) fn guest_exit(&mut self, key: &ProcessKey, exit: ExitInfo) {
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
    pub(super) fn drain(&mut self, key: &ProcessKey) {
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
    pub(super) fn settle(&mut self, id: &ContainerId) {
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

    pub(super) fn machine_ended(&mut self, end: MachineEnd) {
        if matches!(self.machine, Machine::Ended(_)) {
            return;
        }
        self.machine = Machine::Ended(end.clone());
        let fault = Fault::new(Kind::Unavailable, format!("the sandbox's machine has ended: {}", end.reason));
        self.pod_lost(&end, &fault);
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

    pub(super) fn expired(&mut self, deadline: Deadline) {
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
                let end = MachineEnd { reason: String::new(), status: STATUS_KILLED, oom: false, at };
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
