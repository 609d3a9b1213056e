//! The main loop: the shim's commands, the end of the machine, and the devices that have little to do.
//! Knows what a command means; how it is carried over is the door's.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex},
};

use bulkhead_vmm_spec::wire::{Answer, Command, Ended, Event, Message, Request, status};
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};

use crate::{
    bus::lock,
    devices::{self, Shared},
    door::{Attached, Door},
    machine::{self, Machine, MachineError, Told, part},
    seccomp::{Filters, Kind},
};

/// What the main loop serves.
type Subscriber = Box<dyn MutEventSubscriber>;

/// The machine under its commands.
pub(crate) struct Control {
    machine: Machine,
    door: Door,
    filters: Arc<Filters>,
    /// The exit status, when it is time to leave.
    status: Option<i32>,
    /// Devices that came or went since the loop last looked: the slot, and the device if it came.
    changes: Vec<(u32, Option<Shared>)>,
}

impl Control {
    /// A machine that waits for its loop.
    pub(crate) fn new(machine: Machine, door: Door, filters: Arc<Filters>) -> Self {
        Self { machine, door, filters, status: None, changes: Vec::new() }
    }

    /// Takes every message that has arrived.
    fn listen(&mut self) {
        while self.status.is_none() {
            match self.door.receive::<Request>(false) {
                Ok(Some((request, attached))) => self.answer(request, attached),
                // Nothing runs that nobody watches.
                Ok(None) => self.status = Some(status::ORPHANED),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    eprintln!("bulkhead-vmm: refused {error}");
                }
                Err(_) => self.status = Some(status::ORPHANED),
            }
        }
    }

    fn answer(&mut self, request: Request, attached: Attached) {
        let result = self.obey(request.command, attached);
        let _ = self.door.say(&Message::Reply { id: request.id, result });
    }

    /// Does what it is told; an error is a text for people.
    fn obey(&mut self, command: Command, mut attached: Attached) -> Result<Answer, String> {
        let Machine { cpus, bus, inventory, told, .. } = &self.machine;
        let text = |e: io::Error| e.to_string();
        match command {
            Command::Pause => {
                cpus.pause();
                devices::each(bus, |device| device.pause());
            }
            Command::Resume => {
                devices::each(bus, |device| device.resume());
                cpus.run();
            }
            Command::Stop => self.status = Some(status::ENDED),
            Command::Resize { growth_bytes, balloon_bytes } => {
                resize(told, growth_bytes, balloon_bytes)?;
            }
            Command::Processors { count } => cpus.let_run(count)?,
            Command::Attach { file, block } => {
                let file = File::from(attached.take(file, "the disk").map_err(text)?);
                let disk = machine::disk(file, &block).map_err(|e| format!("cannot make a disk: {e}"))?;
                let disk: Shared = Arc::new(Mutex::new(disk));
                let slot = inventory.attach(bus, &disk).map_err(|e| e.to_string())?;
                self.changes.push((slot, Some(disk)));
                return Ok(Answer::Attached { slot, device: slot });
            }
            Command::Detach { slot } => {
                inventory.detach(bus, slot).map_err(|e| e.to_string())?;
                self.changes.push((slot, None));
            }
            Command::Metrics => {
                let mut all = inventory.metrics(bus);
                let exits = cpus.counts().list().into_iter().map(|(n, v)| (n.to_owned(), v));
                all.insert("cpus".into(), exits.collect());
                return Ok(Answer::Metrics(all));
            }
            Command::Dialed { dial, stream } => {
                let stream =
                    stream.map(|slot| attached.take(slot, "the stream")).transpose().map_err(text)?;
                lock(&told.vsock).dialed(dial, stream.map(UnixStream::from));
            }
        }
        Ok(Answer::Done)
    }

    /// The guest or a part of the machine has ended it.
    fn ended(&mut self) {
        let mut ended = self.machine.outcome.ended();
        let console = lock(&self.machine.console);
        if let Some(message) = console.panic().map(str::to_owned) {
            ended = Ended::Failure(message.clone());
            self.door.tell(Event::Panic { message, console: console.last() });
        }
        drop(console);
        if let Ended::Failure(text) = &ended {
            eprintln!("bulkhead-vmm: {text}");
        }
        self.status = Some(if ended == Ended::Guest { status::ENDED } else { status::FAILED });
        self.door.tell(Event::Ended(ended));
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        // They are open and watched once: what else could fail is a lack of memory, which ends us anyway.
        let _ = ops.add(Events::new(&self.door.as_fd(), EventSet::IN));
        let _ = ops.add(Events::new(self.machine.outcome.event(), EventSet::IN));
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.fd() == self.machine.outcome.event().as_raw_fd() {
            self.ended();
        } else {
            self.listen();
        }
    }
}

/// Asks the guest to have more or less memory.
fn resize(told: &Told, growth: Option<u64>, balloon: Option<u64>) -> Result<(), String> {
    if let Some(bytes) = growth {
        let Some(mem) = &told.growth else {
            return Err("this machine was made without memory to grow by".into());
        };
        lock(mem).set_requested(bytes).map_err(|e| format!("cannot grow by {bytes} bytes: {e}"))?;
    }
    if let Some(bytes) = balloon {
        let mib = u32::try_from(bytes >> 20).map_err(|_| format!("a balloon of {bytes} bytes"))?;
        lock(&told.balloon).set_target(mib);
    }
    Ok(())
}

/// Runs the machine to its end, and answers the exit status.
///
/// # Errors
/// The loop cannot be made, or cannot go on.
pub(crate) fn run(control: Control, main: Vec<Shared>) -> Result<i32, MachineError> {
    let mut events: EventManager<Subscriber> =
        EventManager::new().map_err(io::Error::other).map_err(part("make the event loop"))?;
    for device in main {
        events.add_subscriber(Box::new(device));
    }
    let (door, filters) = (control.door.clone(), control.filters.clone());
    let control = Arc::new(Mutex::new(control));
    events.add_subscriber(Box::new(control.clone()));
    filters
        .apply(Kind::Main)
        .map_err(io::Error::other)
        .map_err(part("install the filter of the main thread"))?;
    lock(&control).machine.cpus.run();
    let _ = door.say(&Message::Reply { id: 0, result: Ok(Answer::Done) });
    let mut attached: HashMap<u32, SubscriberId> = HashMap::new();
    loop {
        events.run().map_err(io::Error::other).map_err(part("wait for events"))?;
        let mut control = lock(&control);
        if let Some(status) = control.status {
            return Ok(status);
        }
        for (slot, device) in control.changes.drain(..) {
            if let Some(id) = attached.remove(&slot) {
                let _ = events.remove_subscriber(id);
            }
            if let Some(device) = device {
                attached.insert(slot, events.add_subscriber(Box::new(device)));
            }
        }
    }
}
