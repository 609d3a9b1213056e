//! The memory device as the transport sees it.

use std::{io, os::fd::AsRawFd, sync::Arc};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Backing, MemConfig, Metrics, QUEUE_SIZE, window::Window, worker::Worker};
use crate::{
    ActivateError, Activation, Device, DeviceState, Kind,
    ring::{Ring, RingError},
};

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: the driver does not even read what is not plugged.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The memory device.
pub struct Mem {
    kick: [EventFd; 1],
    backing: Box<dyn Backing>,
    window: Window,
    worker: Option<Worker>,
    paused: bool,
    told: Option<Box<dyn FnMut(u64) + Send>>,
    metrics: Arc<Metrics>,
}

impl Mem {
    /// A memory device for the window of `config`, which is part of the guest's memory already. Nothing is
    /// plugged, and nothing requested.
    ///
    /// # Errors
    /// The window cannot be, or no eventfd can be made.
    pub fn new(config: MemConfig, backing: Box<dyn Backing>) -> io::Result<Self> {
        Ok(Self {
            kick: [EventFd::new(EFD_NONBLOCK)?],
            backing,
            window: Window::new(config)?,
            worker: None,
            paused: false,
            told: None,
            metrics: Arc::default(),
        })
    }

    /// Has `told` called with the bytes that are plugged, after each turn in which they have changed.
    pub fn tell_changes(&mut self, told: impl FnMut(u64) + Send + 'static) {
        self.told = Some(Box::new(told));
    }

    /// Asks the guest to have so many bytes of the window plugged. [`Mem::plugged`] follows as far as the
    /// guest can and will.
    ///
    /// # Errors
    /// It is more than the window has, or not whole blocks.
    pub fn set_requested(&mut self, bytes: u64) -> io::Result<()> {
        self.window.request(bytes)?;
        if let Some(worker) = &self.worker {
            worker.ring.interrupt().config_changed();
        }
        Ok(())
    }

    /// The bytes that the guest is asked to have plugged.
    pub fn requested(&self) -> u64 {
        self.window.requested()
    }

    /// The bytes that the guest has plugged.
    pub fn plugged(&self) -> u64 {
        self.window.plugged()
    }

    fn run(&mut self) {
        let Some(worker) = self.worker.as_mut().filter(|_| !self.paused) else { return };
        let before = self.window.plugged();
        let served = worker.run(&mut self.window, &mut *self.backing);
        let plugged = self.window.plugged();
        if let Some(told) = self.told.as_mut().filter(|_| plugged != before) {
            told(plugged);
        }
        match served {
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

impl Device for Mem {
    fn kind(&self) -> Kind {
        Kind::Mem
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kick
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.window.space();
        let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or(&[]);
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        // Such a driver reads what is not plugged, which would make memory of it.
        if features & UNPLUGGED_INACCESSIBLE == 0 {
            let source = io::ErrorKind::Unsupported.into();
            return Err(ActivateError::Backend {
                what: "serve a driver without UNPLUGGED_INACCESSIBLE",
                source,
            });
        }
        let queue = queues.into_iter().next().ok_or(ActivateError::Queue(0))?;
        let ring = Ring::new(queue, memory, interrupt).ok_or(ActivateError::Queue(0))?;
        self.worker = Some(Worker { ring, metrics: self.metrics.clone() });
        Ok(())
    }

    /// Blocks stay as they are (5.15.5.2): a driver begins by unplugging all of them where it must.
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
        let rings = self.worker.iter().map(|w| w.ring.save()).collect();
        DeviceState::Mem(self.window.save(rings))
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let DeviceState::Mem(state) = state else { return false };
        let Some(window) = self.window.restored(state) else { return false };
        let plugged = window.plugged_ranges().into_iter().all(|range| self.backing.plug(range).is_ok());
        if plugged {
            self.window = window;
        }
        plugged
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.list()
    }
}

impl MutEventSubscriber for Mem {
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
