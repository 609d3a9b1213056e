//! The block device as the transport sees it.

use std::{fs::File, io, os::fd::AsRawFd, sync::Arc};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Metrics, QUEUE_SIZE, RANGE_SECTORS, SECTOR, SEGMENT_BYTES, SEGMENTS, SERIAL_BYTES, State,
    io::{Engine, EngineChoice, can_punch},
    request::Limits,
    sys,
    worker::{Broken, Token, Worker},
};
use crate::{ActivateError, Activation, Device, DeviceState, Kind, ring::Ring};

/// What a block device is made of.
#[derive(Debug)]
pub struct BlockConfig {
    /// A raw image or a block device, open for reading, and for writing unless `read_only`.
    pub file: File,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// What the guest finds it by (`/dev/disk/by-id`): at most 20 bytes.
    pub serial: String,
    /// How requests get to the file.
    pub engine: EngineChoice,
}

/// A disk.
pub struct Block {
    kick: [EventFd; 1],
    /// Written by the kernel for each job that is done.
    done: EventFd,
    engine: Engine<Token>,
    sectors: u64,
    block_size: u32,
    read_only: bool,
    serial: String,
    /// Whether ranges can be given back to the host.
    holes: bool,
    worker: Option<Worker>,
    /// The driver's doing, or the kernel's: the ring is not looked at until the reset.
    failed: bool,
    paused: bool,
    metrics: Arc<Metrics>,
}

impl Block {
    /// A disk on an open file. Everything that a jail may forbid later is done here.
    ///
    /// # Errors
    /// InvalidInput: the file is neither regular nor a block device, is open for reading only though the
    /// disk is not read-only, or the serial number is too long. Others: no eventfd, or the file's size
    /// cannot be read.
    pub fn new(config: BlockConfig) -> io::Result<Self> {
        let BlockConfig { file, read_only, serial, engine } = config;
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if serial.len() > SERIAL_BYTES {
            return refuse("the serial number of a disk has at most 20 bytes");
        }
        if !read_only && !sys::is_writable(&file)? {
            return refuse("the file of a writable disk is not open for reading and writing");
        }
        let (size, block_size) = (sys::size(&file)?, sys::block_size(&file)?);
        let done = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self {
            kick: [EventFd::new(EFD_NONBLOCK)?],
            holes: !read_only && can_punch(&file, size),
            engine: Engine::new(file, QUEUE_SIZE, &done, engine),
            done,
            sectors: size / SECTOR,
            block_size,
            read_only,
            serial,
            worker: None,
            failed: false,
            paused: false,
            metrics: Arc::default(),
        })
    }

    /// Whether requests go through io_uring.
    pub fn uses_io_uring(&self) -> bool {
        self.engine.is_uring()
    }

    /// Its size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Looks at the size of the file again, and tells the driver if it changed. Answers it in sectors.
    ///
    /// # Errors
    /// The size cannot be read; it stays what it was.
    pub fn resize_to_file(&mut self) -> io::Result<u64> {
        let sectors = sys::size(self.engine.file())? / SECTOR;
        if sectors != self.sectors {
            self.sectors = sectors;
            if let Some(worker) = &self.worker {
                worker.ring.interrupt().config_changed();
            }
        }
        Ok(sectors)
    }

    #[cfg(test)]
    pub(super) fn in_flight(&self) -> usize {
        self.engine.in_flight()
    }

    pub(super) fn run(&mut self) {
        let Some(worker) = self.worker.as_mut().filter(|_| !self.paused && !self.failed) else { return };
        let limits = Limits { sectors: self.sectors, read_only: self.read_only, features: 0 };
        let mut serial = [0; SERIAL_BYTES];
        serial[..self.serial.len()].copy_from_slice(self.serial.as_bytes());
        match worker.run(&mut self.engine, limits, &serial) {
            Ok(false) => {}
            // The rest in the loop's next turn, after the other devices.
            Ok(true) => drop(self.kick[0].write(1)),
            Err(why) => self.fail(why),
        }
    }

    /// Answers what is done; what nobody waits for any more is dropped.
    fn reap(&mut self) {
        match self.worker.as_mut().filter(|_| !self.failed) {
            Some(worker) => match worker.reap(&mut self.engine) {
                Ok(true) => {}
                Ok(false) => drop(self.kick[0].write(1)),
                Err(why) => self.fail(why),
            },
            None => while self.engine.next_done().is_some() {},
        }
    }

    /// Waits until nothing is in flight.
    fn drain(&mut self) {
        while self.engine.in_flight() > 0 {
            match self.engine.wait() {
                Ok(()) => self.reap(),
                Err(_) => self.fail(Broken::Engine),
            }
        }
    }

    /// Stops looking at the ring until the driver resets the device.
    fn fail(&mut self, why: Broken) {
        match why {
            Broken::Ring => self.metrics.faults.increment(),
            Broken::Engine => self.metrics.io_errors.increment(),
        }
        self.failed = true;
        if let Some(worker) = &self.worker {
            worker.ring.interrupt().needs_reset();
        }
    }

    /// The configuration space (5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        // Blocks of 4 KiB are what files and disks beneath are made of.
        let physical = (4096 / self.block_size.max(1)).max(1);
        put(0, &self.sectors.to_le_bytes());
        put(8, &SEGMENT_BYTES.to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &self.block_size.to_le_bytes());
        // Topology: the exponent of blocks in a physical block, no offset, the least and the best transfer.
        put(24, &[physical.trailing_zeros() as u8, 0]);
        put(26, &(physical as u16).to_le_bytes());
        if self.holes {
            // DISCARD: sectors of a range, ranges of a request, what is really given back.
            put(36, &RANGE_SECTORS.to_le_bytes());
            put(40, &1u32.to_le_bytes());
            put(44, &(4096 / SECTOR as u32).to_le_bytes());
            // WRITE_ZEROES: the same, and that it may give back.
            put(48, &RANGE_SECTORS.to_le_bytes());
            put(52, &1u32.to_le_bytes());
            put(56, &[1]);
        }
        config
    }
}

impl Device for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        if self.holes {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kick
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let rest = usize::try_from(offset).ok().and_then(|at| config.get(at..)).unwrap_or_default();
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, features } = activation;
        let queue = queues.into_iter().next().ok_or(ActivateError::Queue(0))?;
        let ring = Ring::new(queue, memory, interrupt).ok_or(ActivateError::Queue(0))?;
        self.worker = Some(Worker { ring, features, metrics: self.metrics.clone() });
        self.failed = false;
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        self.failed = false;
        self.drain();
    }

    fn pause(&mut self) {
        self.paused = true;
        self.drain();
    }

    fn resume(&mut self) {
        self.paused = false;
        // The event loop looks at the ring: the caller's thread may not be allowed what that takes.
        let _ = self.kick[0].write(1);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(State {
            rings: self.worker.iter().map(|w| w.ring.save()).collect(),
            sectors: self.sectors,
            read_only: self.read_only,
            serial: self.serial.clone(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let DeviceState::Block(state) = state else { return false };
        let fits = state.sectors <= self.sectors
            && state.read_only == self.read_only
            && state.serial.len() <= SERIAL_BYTES;
        if fits {
            // What the driver was told; a file that has grown is announced by `resize_to_file`.
            self.sectors = state.sectors;
            self.serial.clone_from(&state.serial);
        }
        fits
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.list()
    }
}

impl MutEventSubscriber for Block {
    fn init(&mut self, ops: &mut EventOps) {
        // Fails only for a descriptor that is watched already or cannot be: a mistake that tests show.
        let _ = ops.add(Events::new(&self.kick[0], EventSet::IN));
        let _ = ops.add(Events::new(&self.done, EventSet::IN));
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.fd() == self.kick[0].as_raw_fd() {
            let _ = self.kick[0].read();
            self.run();
        } else if events.fd() == self.done.as_raw_fd() {
            let _ = self.done.read();
            self.reap();
            // There is room for what the driver offered meanwhile.
            self.run();
        }
    }
}
