//! The socket device as the transport sees it.

use std::{
    io,
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Dialer, EVENT_QUEUE_SIZE, Metrics, QUEUE_SIZE, State, hub::Hub, worker::Worker};
use crate::{
    ActivateError, Activation, Device, DeviceState, Kind,
    ring::{Ring, RingError},
};

/// The addresses that a guest may have (5.10.4): the ones below and the one above are reserved.
const CIDS: std::ops::Range<u64> = 3..0xffff_ffff;

/// The socket device.
pub struct Vsock {
    /// Of the receiving, the sending and the event ring.
    kicks: [EventFd; 3],
    pub(super) hub: Hub,
    worker: Option<Worker>,
    paused: bool,
    /// It comes from a saved state: at its activation the guest is told that its connections are gone.
    restored: bool,
    metrics: Arc<Metrics>,
}

impl Vsock {
    /// A socket device for the guest with this address (3 or more). What connects to `listener` reaches the
    /// guest's ports; what the guest connects to is left to `dialer`.
    ///
    /// # Errors
    /// No guest has this address, no eventfd or epoll set can be made, or `listener` cannot be watched.
    pub fn new(cid: u64, listener: Option<UnixListener>, dialer: Box<dyn Dialer>) -> io::Result<Self> {
        if !CIDS.contains(&cid) {
            let what = format!("cid {cid} cannot be a guest's: take one of {CIDS:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let metrics = Arc::<Metrics>::default();
        let kick = || EventFd::new(EFD_NONBLOCK);
        Ok(Self {
            kicks: [kick()?, kick()?, kick()?],
            hub: Hub::new(cid, listener, dialer, metrics.clone())?,
            worker: None,
            paused: false,
            restored: false,
            metrics,
        })
    }

    /// Answers [`Dialer::dial`]: the stream that the host accepted, or `None` where nobody listens.
    /// An `id` that is not waited for any more is no error; its stream is closed.
    pub fn dialed(&mut self, id: u64, stream: Option<UnixStream>) {
        self.hub.dialed(id, stream);
        self.wake();
    }

    /// Asks the loop for another turn.
    fn wake(&self) {
        // It fails only where the counter is at its limit, and then the loop is awake.
        let _ = self.kicks[0].write(1);
    }

    fn run(&mut self) {
        let Some(worker) = self.worker.as_mut().filter(|_| !self.paused) else { return };
        match worker.run(&mut self.hub) {
            Ok(false) => {}
            Ok(true) => self.wake(),
            Err(error) => self.fail(error),
        }
    }

    /// Stops looking at the rings until the driver resets the device.
    fn fail(&mut self, _error: RingError) {
        self.metrics.faults.increment();
        self.hub.clear();
        if let Some(worker) = self.worker.take() {
            worker.receiving.interrupt().needs_reset();
        }
    }
}

impl Device for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE]
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // 5.10.4: guest_cid, le64.
        let config = self.hub.cid.to_le_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
        let n = data.len().min(config.len() - from);
        data[..n].copy_from_slice(&config[from..from + n]);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let mut queues = queues.into_iter();
        let mut ring = |n| {
            let queue = queues.next().ok_or(ActivateError::Queue(n))?;
            Ring::new(queue, memory.clone(), interrupt.clone()).ok_or(ActivateError::Queue(n))
        };
        let (receiving, sending, event) = (ring(0)?, ring(1)?, ring(2)?);
        let reset_owed = std::mem::take(&mut self.restored);
        self.worker = Some(Worker { receiving, sending, event, reset_owed });
        // Whoever connected to the listener meanwhile.
        self.wake();
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        self.restored = false;
        self.hub.clear();
    }

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        if self.worker.is_some() {
            self.hub.serve_all();
        }
        self.run();
    }

    fn save(&self) -> DeviceState {
        let rings = self.worker.iter().flat_map(|w| [&w.receiving, &w.sending, &w.event]);
        DeviceState::Vsock(State { cid: self.hub.cid, rings: rings.map(Ring::save).collect() })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let DeviceState::Vsock(state) = state else { return false };
        if !CIDS.contains(&state.cid) {
            return false;
        }
        self.hub.cid = state.cid;
        self.restored = !state.rings.is_empty();
        true
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.list()
    }
}

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps) {
        // Fails only for a descriptor that is watched already or cannot be: a mistake that tests show.
        for kick in &self.kicks {
            let _ = ops.add(Events::new(kick, EventSet::IN));
        }
        let _ = ops.add(Events::new_raw(self.hub.epoll_fd(), EventSet::IN));
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.fd() == self.hub.epoll_fd() {
            // The edges are taken even where nobody acts on them, or the loop would spin.
            self.hub.collect(self.worker.is_some() && !self.paused);
        } else if let Some(kick) = self.kicks.iter().find(|k| k.as_raw_fd() == events.fd()) {
            let _ = kick.read();
        }
        self.run();
    }
}
