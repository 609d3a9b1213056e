//! The network card as the transport sees it.

use std::{fs::File, io, os::fd::AsRawFd, sync::Arc};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::{
    virtio_net::{
        VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    LEAST_MTU, Metrics, QUEUE_SIZE, RX, State, TX, offload,
    tap::{self, Tap},
    vhost::{Rings, Vhost},
    worker::Worker,
};
use crate::{ActivateError, Activation, Device, DeviceState, Interrupt, Kind};

/// The most stale frames thrown away at a driver's start: a tap's queue holds 1000 (tun.c).
const STALE_LIMIT: usize = 4096;

/// What a network card is made of.
#[derive(Debug)]
pub struct NetConfig {
    /// A tap made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, open with O_NONBLOCK.
    pub tap: File,
    /// The guest's Ethernet address.
    pub mac: [u8; 6],
    /// The largest packet of the link in bytes, if the guest is to be told.
    pub mtu: Option<u16>,
    /// An open /dev/vhost-net: the host's kernel then moves the frames.
    pub vhost: Option<File>,
}

/// Who has the rings.
enum Path {
    Worker(Box<Worker>),
    Kernel(Rings),
}

/// A network card.
pub struct Net {
    kicks: [EventFd; 2],
    /// Written when there is something to begin: after an activation and a resume.
    wake: EventFd,
    tap: Box<dyn Tap>,
    vhost: Option<Vhost>,
    mac: [u8; 6],
    mtu: Option<u16>,
    /// What the tap can leave undone (TUN_F_*).
    offload: u32,
    /// What the driver agreed to see undone.
    agreed: u32,
    path: Option<Path>,
    interrupt: Option<Arc<Interrupt>>,
    /// The tap is set as the driver agreed; the kernel, if it is its turn, works.
    started: bool,
    /// A driver had the device before: what is in the tap's queue was made for that one.
    stale: bool,
    failed: bool,
    paused: bool,
    metrics: Arc<Metrics>,
}

impl Net {
    /// A network card on an open tap.
    ///
    /// # Errors
    /// InvalidInput: the descriptor is no such tap, the address is a multicast one, or the MTU is below
    /// 68. Others: vhost-net refuses to be owned, no eventfd.
    pub fn new(config: NetConfig) -> io::Result<Self> {
        let NetConfig { tap, mac, mtu, vhost } = config;
        Self::with(Box::new(tap::Kernel::new(tap)?), mac, mtu, vhost)
    }

    /// A network card whose frames, with their headers of 12 bytes, are the datagrams of a socket that
    /// does not block: for tests and fuzz targets.
    ///
    /// # Errors
    /// As of [`Net::new`].
    #[cfg(any(test, feature = "testing"))]
    pub fn on_socket(
        socket: std::os::unix::net::UnixDatagram,
        mac: [u8; 6],
        mtu: Option<u16>,
    ) -> io::Result<Self> {
        Self::with(Box::new(tap::Socket(socket)), mac, mtu, None)
    }

    fn with(tap: Box<dyn Tap>, mac: [u8; 6], mtu: Option<u16>, vhost: Option<File>) -> io::Result<Self> {
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if mac[0] & 1 != 0 {
            return refuse("the address of a network card is a multicast address");
        }
        if mtu.is_some_and(|mtu| mtu < LEAST_MTU) {
            return refuse("the MTU of a network card is below 68");
        }
        let wish = offload::WISHES.into_iter().find(|&wish| tap.set_offload(wish).is_ok());
        // Until a driver agrees, nothing is left undone.
        tap.set_offload(0)?;
        Ok(Self {
            kicks: [EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?],
            wake: EventFd::new(EFD_NONBLOCK)?,
            tap,
            vhost: vhost.map(Vhost::new).transpose()?,
            mac,
            mtu,
            offload: wish.unwrap_or(0),
            agreed: 0,
            path: None,
            interrupt: None,
            started: false,
            stale: false,
            failed: false,
            paused: false,
            metrics: Arc::default(),
        })
    }

    /// Whether the host's kernel moves the frames.
    pub fn uses_vhost(&self) -> bool {
        self.vhost.is_some()
    }

    /// Does what an activation or a resume left to the event loop, whose thread may do what it takes.
    fn wake_up(&mut self) {
        if self.paused || self.failed || self.path.is_none() {
            return;
        }
        if !self.started {
            if self.start().is_err() {
                self.metrics.backend_errors.increment();
                return self.give_up();
            }
            self.started = true;
        }
        self.run(true, true);
    }

    fn start(&mut self) -> io::Result<()> {
        self.tap.set_offload(self.agreed)?;
        if std::mem::take(&mut self.stale) {
            self.drop_stale();
        }
        match (&self.path, &mut self.vhost) {
            (Some(Path::Kernel(rings)), Some(vhost)) => vhost.start(rings, &self.kicks, self.tap.as_raw_fd()),
            _ => Ok(()),
        }
    }

    /// Throws away what came for a driver that is gone: it may be in a form that this one did not agree to.
    fn drop_stale(&self) {
        for _ in 0..STALE_LIMIT {
            if self.tap.discard().is_err() {
                return;
            }
            self.metrics.rx_dropped.increment();
        }
    }

    fn run(&mut self, rx: bool, tx: bool) {
        if self.paused || self.failed || !self.started {
            return;
        }
        let Some(Path::Worker(worker)) = &mut self.path else { return };
        let tap = self.tap.as_raw_fd();
        let result = if rx { worker.rx.run(tap) } else { Ok(false) };
        let result = result.and_then(|again| Ok((again, if tx { worker.tx.run(tap)? } else { false })));
        match result {
            // The rest in the loop's next turn, after the other devices.
            Ok((rx, tx)) => {
                for (_, kick) in [(rx, RX), (tx, TX)].into_iter().filter(|(again, _)| *again) {
                    let _ = self.kicks[kick].write(1);
                }
            }
            Err(_) => {
                self.metrics.faults.increment();
                self.give_up();
            }
        }
    }

    /// Stops looking at the rings until the driver resets the device.
    fn give_up(&mut self) {
        self.stop_kernel();
        self.failed = true;
        if let Some(interrupt) = &self.interrupt {
            interrupt.needs_reset();
        }
    }

    /// Takes the rings back from the kernel, if it has them. When this returns it does not touch them.
    fn stop_kernel(&mut self) {
        let Some(Path::Kernel(rings)) = &mut self.path else { return };
        if !std::mem::take(&mut self.started) {
            return;
        }
        let Some(vhost) = &mut self.vhost else { return };
        if vhost.stop().and_then(|()| vhost.positions(rings)).is_err() {
            self.metrics.backend_errors.increment();
            // Its descriptor closed, the kernel lets go of everything. No driver finds it again.
            vhost.close();
            self.failed = true;
            rings.interrupt.needs_reset();
        }
    }

    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        // One pair of rings; looked at only with a feature that is not offered.
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config
    }
}

impl Device for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        let mut features = offload::features(self.offload)
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        if self.mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        self.vhost.as_ref().map_or(features, |vhost| vhost.offered(features))
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let rest = usize::try_from(offset).ok().and_then(|at| config.get(at..)).unwrap_or_default();
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.agreed = offload::flags(activation.features);
        let interrupt = activation.interrupt.clone();
        self.path = Some(match &self.vhost {
            Some(_) => Path::Kernel(Rings::new(activation)?),
            None => Path::Worker(Box::new(Worker::new(activation, self.mtu, &self.metrics)?)),
        });
        self.interrupt = Some(interrupt);
        (self.started, self.failed) = (false, false);
        let _ = self.wake.write(1);
        Ok(())
    }

    fn reset(&mut self) {
        self.stop_kernel();
        self.stale |= self.path.is_some();
        self.path = None;
        self.interrupt = None;
        self.agreed = 0;
        (self.started, self.failed) = (false, false);
    }

    fn pause(&mut self) {
        self.paused = true;
        self.stop_kernel();
        if let Some(Path::Worker(worker)) = &mut self.path {
            worker.rx.put_back();
        }
    }

    fn resume(&mut self) {
        self.paused = false;
        let _ = self.wake.write(1);
    }

    fn save(&self) -> DeviceState {
        let rings = match &self.path {
            Some(Path::Worker(worker)) => worker.save(),
            Some(Path::Kernel(rings)) => rings.save(),
            None => Vec::new(),
        };
        DeviceState::Net(State { rings, mac: self.mac, mtu: self.mtu, offload: self.agreed })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let DeviceState::Net(state) = state else { return false };
        let fits = state.offload & !self.offload == 0
            && state.mac[0] & 1 == 0
            && state.mtu.is_none_or(|mtu| mtu >= LEAST_MTU);
        if fits {
            (self.mac, self.mtu) = (state.mac, state.mtu);
        }
        fits
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.list()
    }
}

impl MutEventSubscriber for Net {
    fn init(&mut self, ops: &mut EventOps) {
        // Fails only for a descriptor that is watched already or cannot be: a mistake that tests show.
        let _ = ops.add(Events::new(&self.wake, EventSet::IN));
        if let Some(vhost) = &self.vhost {
            // The kicks and the tap are the kernel's to watch.
            let _ = ops.add(Events::new(&vhost.error, EventSet::IN));
            return;
        }
        for kick in &self.kicks {
            let _ = ops.add(Events::new(kick, EventSet::IN));
        }
        // Frames wait in it while the guest has no buffers, and room is there most of the time.
        let tap = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let _ = ops.add(Events::new_raw(self.tap.as_raw_fd(), tap));
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.wake.as_raw_fd() {
            let _ = self.wake.read();
            self.wake_up();
        } else if fd == self.kicks[RX].as_raw_fd() {
            let _ = self.kicks[RX].read();
            self.run(true, false);
        } else if fd == self.kicks[TX].as_raw_fd() {
            let _ = self.kicks[TX].read();
            self.run(false, true);
        } else if fd == self.tap.as_raw_fd() {
            let blocked = matches!(&self.path, Some(Path::Worker(worker)) if worker.tx.blocked);
            self.run(true, blocked && events.event_set().contains(EventSet::OUT));
        } else if let Some(vhost) = self.vhost.as_ref().filter(|v| v.error.as_raw_fd() == fd) {
            let _ = vhost.error.read();
            if self.started {
                self.metrics.backend_errors.increment();
                self.give_up();
            }
        }
    }
}
