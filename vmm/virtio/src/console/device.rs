//! The console as the transport sees it.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsRawFd,
    sync::Arc,
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Metrics, QUEUE_SIZE, State,
    worker::{Input, Worker},
};
use crate::{
    ActivateError, Activation, Device, DeviceState, Kind,
    ring::{Ring, RingError},
};

/// The ring for what the guest is to read (receiveq of port 0).
const RECEIVE: usize = 0;
/// The ring for what the guest writes (transmitq of port 0).
const TRANSMIT: usize = 1;

/// The console.
pub struct Console {
    kicks: [EventFd; 2],
    output: Box<dyn Write + Send>,
    input: Option<Input>,
    worker: Option<Worker>,
    paused: bool,
    metrics: Arc<Metrics>,
}

impl Console {
    /// A console whose output goes to `output`, which must not block: it answers `WouldBlock` where it has
    /// no room, and loses what did not fit. `input` is a pipe, a socket or a terminal, and is put into
    /// non-blocking mode.
    ///
    /// # Errors
    /// No eventfd can be made, or the input cannot be put into that mode.
    pub fn new(output: Box<dyn Write + Send>, input: Option<File>) -> io::Result<Self> {
        let input = input.map(Input::new).transpose()?;
        Ok(Self {
            kicks: [EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?],
            output,
            input,
            worker: None,
            paused: false,
            metrics: Arc::default(),
        })
    }

    fn run(&mut self, index: usize) {
        let Some(worker) = self.worker.as_mut().filter(|_| !self.paused) else { return };
        let more = match index {
            RECEIVE => worker.receive(self.input.as_mut()),
            _ => worker.transmit(&mut *self.output),
        };
        match more {
            Ok(false) => {}
            // The rest in the loop's next turn, after the other devices.
            Ok(true) => drop(self.kicks[index].write(1)),
            Err(error) => self.fail(error),
        }
    }

    /// Stops looking at the rings until the driver resets the device.
    fn fail(&mut self, _error: RingError) {
        self.metrics.faults.increment();
        if let Some(worker) = self.worker.take() {
            worker.transmit.interrupt().needs_reset();
        }
    }
}

impl Device for Console {
    fn kind(&self) -> Kind {
        Kind::Console
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Size, number of ports, emergency output: each belongs to a feature that is not offered.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let mut queues = queues.into_iter();
        let mut ring = |index| {
            let queue = queues.next().ok_or(ActivateError::Queue(index))?;
            Ring::new(queue, memory.clone(), interrupt.clone()).ok_or(ActivateError::Queue(index))
        };
        let (receive, transmit) = (ring(RECEIVE)?, ring(TRANSMIT)?);
        self.worker = Some(Worker { receive, transmit, metrics: self.metrics.clone() });
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        self.run(RECEIVE);
        self.run(TRANSMIT);
    }

    fn save(&self) -> DeviceState {
        let rings = self.worker.iter().flat_map(|w| [w.receive.save(), w.transmit.save()]).collect();
        DeviceState::Console(State { rings })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        matches!(state, DeviceState::Console(_))
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.list()
    }
}

impl MutEventSubscriber for Console {
    fn init(&mut self, ops: &mut EventOps) {
        for kick in &self.kicks {
            // Fails only for a descriptor that is watched already or cannot be: a mistake that tests show.
            let _ = ops.add(Events::new(kick, EventSet::IN));
        }
        if let Some(input) = &self.input {
            // It stays readable for as long as the guest has no room.
            let _ = ops.add(Events::new(&input.file, EventSet::IN | EventSet::EDGE_TRIGGERED));
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if let Some(index) = self.kicks.iter().position(|kick| kick.as_raw_fd() == events.fd()) {
            let _ = self.kicks[index].read();
            self.run(index);
        } else if self.input.as_ref().is_some_and(|input| input.file.as_raw_fd() == events.fd()) {
            self.run(RECEIVE);
        }
    }
}
