//! The entropy source as the transport sees it.

use std::{io, os::fd::AsRawFd, sync::Arc};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Metrics, QUEUE_SIZE, State,
    worker::{Source, Worker},
};
use crate::{
    ActivateError, Activation, Device, DeviceState, Kind,
    ring::{Ring, RingError},
};

/// The entropy source.
pub struct Rng {
    kick: [EventFd; 1],
    source: Source,
    worker: Option<Worker>,
    paused: bool,
    metrics: Arc<Metrics>,
}

impl Rng {
    /// An entropy source that `source` feeds.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub fn new(source: fn(&mut [u8]) -> io::Result<()>) -> io::Result<Self> {
        Ok(Self {
            kick: [EventFd::new(EFD_NONBLOCK)?],
            source,
            worker: None,
            paused: false,
            metrics: Arc::default(),
        })
    }

    fn run(&mut self) {
        let Some(worker) = self.worker.as_mut().filter(|_| !self.paused) else { return };
        match worker.run() {
            Ok(false) => {}
            // The rest in the loop's next turn, after the other devices.
            Ok(true) => drop(self.kick[0].write(1)),
            Err(error) => self.fail(error),
        }
    }

    /// Stops looking at the ring until the driver resets the device.
    fn fail(&mut self, _error: RingError) {
        self.metrics.faults.increment();
        if let Some(worker) = self.worker.take() {
            worker.ring.interrupt().needs_reset();
        }
    }
}

impl Device for Rng {
    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kick
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let queue = queues.into_iter().next().ok_or(ActivateError::Queue(0))?;
        let ring = Ring::new(queue, memory, interrupt).ok_or(ActivateError::Queue(0))?;
        self.worker = Some(Worker { ring, source: self.source, metrics: self.metrics.clone() });
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
        self.run();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng(State { rings: self.worker.iter().map(|w| w.ring.save()).collect() })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        matches!(state, DeviceState::Rng(_))
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.list()
    }
}

impl MutEventSubscriber for Rng {
    fn init(&mut self, ops: &mut EventOps) {
        // Fails only for a descriptor that is watched already or cannot be: a mistake that tests show.
        let _ = ops.add(Events::new(&self.kick[0], EventSet::IN));
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.fd() == self.kick[0].as_raw_fd() {
            let _ = self.kick[0].read();
            self.run();
        }
    }
}
