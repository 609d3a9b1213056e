//! The file system device as the transport sees it.

use std::{
    io,
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::Arc,
    time::Duration,
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vhost::vhost_user::message::FrontendReq;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    DRAIN, Metrics, PATIENCE, PRIORITY_QUEUE_SIZE, REQUEST_QUEUE_SIZE, State, TAG, connection::Connection,
    worker::Session,
};
use crate::{ActivateError, Activation, Device, DeviceState, Kind};

/// The file system device.
pub struct Fs {
    /// struct virtio_fs_config (5.11.4), without what notifications would add.
    config: [u8; TAG + 4],
    sizes: Vec<u16>,
    kicks: Vec<EventFd>,
    features: u64,
    backend: Connection,
    session: Option<Session>,
    patience: Duration,
    drain: Duration,
    metrics: Arc<Metrics>,
}

impl Fs {
    /// A file system that the guest mounts by `tag` (1 to 36 bytes), served through `request_queues` rings
    /// by the vhost-user backend that listens at the other end of `socket`.
    ///
    /// # Errors
    /// The tag or the number of rings cannot be; the backend does not answer within 20 s, or lacks what is
    /// needed (REPLY_ACK, MQ, as many rings).
    pub fn new(tag: &str, socket: UnixStream, request_queues: u16) -> io::Result<Self> {
        Self::with_patience(tag, socket, request_queues, PATIENCE, DRAIN)
    }

    pub(super) fn with_patience(
        tag: &str,
        socket: UnixStream,
        request_queues: u16,
        patience: Duration,
        drain: Duration,
    ) -> io::Result<Self> {
        if tag.is_empty() || tag.len() > TAG || request_queues == 0 {
            let what = format!("a tag has 1 to {TAG} bytes, and a file system a ring for requests");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let mut config = [0; TAG + 4];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG..].copy_from_slice(&u32::from(request_queues).to_le_bytes());
        let mut sizes = vec![PRIORITY_QUEUE_SIZE];
        sizes.resize(1 + usize::from(request_queues), REQUEST_QUEUE_SIZE);
        let metrics: Arc<Metrics> = Arc::default();
        let (backend, features) = Connection::open(socket, patience, sizes.len(), metrics.clone())?;
        let kicks: io::Result<Vec<EventFd>> = sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect();
        let ours = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
        let features = features & ours;
        let kicks = kicks?;
        Ok(Self { config, sizes, kicks, features, backend, session: None, patience, drain, metrics })
    }

    /// Gives up for good: without the connection nothing can be agreed on with the backend any more.
    /// Closing it makes the backend let go of the guest's memory.
    fn fail(&mut self) {
        self.backend.close();
        if let Some(session) = self.session.take() {
            session.interrupt.needs_reset();
        }
    }
}

impl Device for Fs {
    fn kind(&self) -> Kind {
        Kind::Fs
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.config.get(offset..)).unwrap_or(&[]);
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        if let Some(index) = queues.iter().position(|q| !q.is_valid(&*memory)) {
            return Err(ActivateError::Queue(index));
        }
        if queues.len() != self.kicks.len() {
            return Err(ActivateError::Queue(queues.len()));
        }
        let (patience, drain) = (self.patience, self.drain);
        let mut session = Session { memory, features, queues, interrupt, running: false, patience, drain };
        if let Err(error) = session.start(&mut self.backend, &self.kicks) {
            if session.stop(&mut self.backend).is_err() {
                self.backend.close();
            }
            return Err(error);
        }
        self.session = Some(session);
        Ok(())
    }

    fn reset(&mut self) {
        let Some(mut session) = self.session.take() else { return };
        let mut stopped = session.stop(&mut self.backend);
        if self.backend.can_reset() {
            // The next driver begins with a new FUSE session.
            stopped = stopped
                .and_then(|()| self.backend.begin(self.patience))
                .and_then(|()| self.backend.set(FrontendReq::RESET_DEVICE, &[], &[]));
        }
        if stopped.is_err() {
            self.backend.close();
        }
    }

    fn pause(&mut self) {
        if let Some(session) = &mut self.session
            && session.stop(&mut self.backend).is_err()
        {
            self.fail();
        }
    }

    fn resume(&mut self) {
        let Some(session) = self.session.as_mut().filter(|s| !s.running) else { return };
        if session.start(&mut self.backend, &self.kicks).is_err() {
            return self.fail();
        }
        for kick in &self.kicks {
            // Fails only where the counter is at its limit, and then the backend looks anyway.
            let _ = kick.write(1);
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Fs(State { rings: self.session.as_ref().map(Session::save).unwrap_or_default() })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        // What the guest of an active device has open, this backend has never heard of.
        matches!(state, DeviceState::Fs(state) if state.rings.is_empty())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.list()
    }
}

impl MutEventSubscriber for Fs {
    fn init(&mut self, ops: &mut EventOps) {
        // The kicks are the backend's to read. What the backend sends is read where it is asked for, so of
        // the socket only its end is news: once, not for as long as it lasts.
        let events = EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        // Fails only for a descriptor that is watched already or cannot be: a mistake that tests show.
        let _ = ops.add(Events::new(&self.backend, events));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() != self.backend.as_raw_fd() {
            return;
        }
        let _ = ops.remove(Events::empty(&self.backend));
        if self.backend.is_open() {
            self.metrics.hang_ups.increment();
        }
        self.fail();
    }
}
