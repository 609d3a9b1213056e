//! The balloon as the transport sees it.

use std::{io, os::fd::AsRawFd, sync::Arc};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Discard, Metrics, PAGE, QUEUE_SIZE, State, Stats,
    worker::{Books, Place, Role, Worker},
};
use crate::{
    ActivateError, Activation, Device, DeviceState, Kind,
    ring::{Ring, RingError},
};

/// VIRTIO_BALLOON_F_STATS_VQ
const STATISTICS: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: the guest takes pages back rather than kill.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_REPORTING
const REPORTING: u64 = 1 << 5;
/// Where `actual` is in the configuration (5.5.4); before it is the number of pages asked for.
const ACTUAL: u64 = 4;

/// The memory balloon.
pub struct Balloon {
    kicks: [EventFd; 4],
    discard: Box<dyn Discard>,
    target: u32,
    actual: u32,
    /// What was known at the reset, or comes from a saved state.
    stats: Stats,
    held: Option<u16>,
    worker: Option<Worker>,
    paused: bool,
    metrics: Arc<Metrics>,
}

impl Balloon {
    /// A balloon that gives pages back through `discard`. It asks the guest for nothing yet.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub fn new(discard: Box<dyn Discard>) -> io::Result<Self> {
        let kick = || EventFd::new(EFD_NONBLOCK);
        Ok(Self {
            kicks: [kick()?, kick()?, kick()?, kick()?],
            discard,
            target: 0,
            actual: 0,
            stats: Stats::default(),
            held: None,
            worker: None,
            paused: false,
            metrics: Arc::default(),
        })
    }

    /// Asks the guest to give up so many MiB altogether; less than before lets it take some again.
    pub fn set_target(&mut self, mib: u32) {
        let pages = u64::from(mib) * ((1 << 20) / PAGE);
        self.target = u32::try_from(pages).unwrap_or(u32::MAX);
        if let Some(interrupt) = self.worker.as_ref().and_then(Worker::interrupt) {
            interrupt.config_changed();
        }
    }

    /// The bytes that the guest says it has given up.
    pub fn actual(&self) -> u64 {
        u64::from(self.actual) * PAGE
    }

    /// What the guest told last of its memory.
    pub fn stats(&self) -> &Stats {
        self.worker.as_ref().map_or(&self.stats, |worker| &worker.books.stats)
    }

    /// Asks the guest for newer numbers, which [`Balloon::stats`] answers once they are there. `false`: it
    /// is asked already, or tells none.
    pub fn request_stats(&mut self) -> bool {
        let Some(worker) = self.worker.as_mut().filter(|_| !self.paused) else { return false };
        match worker.request_stats() {
            Ok(asked) => asked,
            Err(error) => {
                self.fail(error);
                false
            }
        }
    }

    fn run(&mut self, index: usize) {
        let Some(worker) = self.worker.as_mut().filter(|_| !self.paused) else { return };
        match worker.run(index, &mut *self.discard) {
            Ok(false) => {}
            // The rest in the loop's next turn, after the other devices.
            Ok(true) => drop(self.kicks[index].write(1)),
            Err(error) => self.fail(error),
        }
    }

    /// Stops looking at the rings until the driver resets the device.
    fn fail(&mut self, _error: RingError) {
        self.metrics.faults.increment();
        if let Some(worker) = self.worker.take()
            && let Some(interrupt) = worker.interrupt()
        {
            interrupt.needs_reset();
        }
    }
}

impl Device for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    fn features(&self) -> u64 {
        STATISTICS | DEFLATE_ON_OOM | REPORTING | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 4]
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(self.target) | u64::from(self.actual) << 32;
        let config = config.to_le_bytes();
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or(&[]);
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            self.actual = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        // A ring has the number that is left when those before it that nobody agreed on are not counted;
        // so Linux sees it. The specification numbers them once and for all, which is the same thing where
        // both sides know all of them, and free page hints, which would be between, are not offered.
        let mut roles = vec![Role::Inflate, Role::Deflate];
        roles.extend((features & STATISTICS != 0).then_some(Role::Statistics));
        roles.extend((features & REPORTING != 0).then_some(Role::Reporting));
        if queues.len() < roles.len() {
            return Err(ActivateError::Queue(queues.len()));
        }
        let mut places = Vec::new();
        for (index, queue) in queues.into_iter().enumerate() {
            places.push(match roles.get(index) {
                Some(role) => {
                    let ring = Ring::new(queue, memory.clone(), interrupt.clone());
                    Place::Served(*role, ring.ok_or(ActivateError::Queue(index))?)
                }
                None => Place::Unused(queue.state().into()),
            });
        }
        let stats = std::mem::take(&mut self.stats);
        let books = Books { stats, held: self.held.take(), metrics: self.metrics.clone() };
        self.worker = Some(Worker { places, books });
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        // Whoever comes next has given nothing up yet, and told nothing.
        self.actual = 0;
        self.held = None;
        self.stats = Stats::default();
    }

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        for index in 0..self.kicks.len() {
            self.run(index);
        }
    }

    fn save(&self) -> DeviceState {
        let books = self.worker.as_ref().map(|worker| &worker.books);
        DeviceState::Balloon(State {
            rings: self.worker.as_ref().map(Worker::save).unwrap_or_default(),
            target: self.target,
            actual: self.actual,
            stats: Box::new(self.stats().clone()),
            held: books.map_or(self.held, |books| books.held),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let DeviceState::Balloon(state) = state else { return false };
        if state.held.is_some_and(|head| head >= QUEUE_SIZE) {
            return false;
        }
        self.target = state.target;
        self.actual = state.actual;
        self.stats = (*state.stats).clone();
        self.held = state.held;
        true
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.list()
    }
}

impl MutEventSubscriber for Balloon {
    fn init(&mut self, ops: &mut EventOps) {
        for kick in &self.kicks {
            // Fails only for a descriptor that is watched already or cannot be: a mistake that tests show.
            let _ = ops.add(Events::new(kick, EventSet::IN));
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if let Some(index) = self.kicks.iter().position(|kick| kick.as_raw_fd() == events.fd()) {
            let _ = self.kicks[index].read();
            self.run(index);
        }
    }
}
