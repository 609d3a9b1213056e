//! A driver's side of a device in plain memory, for unit tests and fuzz targets: rings in a guest that
//! has no processor. Honest by default; every field of a ring can be written as a liar would.
//! [`fuzz`] turns bytes into such liars.

#[cfg(feature = "testing")]
pub mod fuzz;
#[cfg(feature = "testing")]
mod sys;

use std::sync::{Arc, Mutex};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::{
    eventfd::{EFD_NONBLOCK, EventFd},
    tempfile::TempFile,
};

use crate::{ActivateError, Activation, Device, Interrupt, Memory};

/// VIRTQ_DESC_F_NEXT
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT
pub const INDIRECT: u16 = 4;

/// Bytes of a test's guest memory: rings at the bottom, buffers from [`BUFFERS`] on.
pub const MEMORY: usize = 16 << 20;
/// Where a test may put its buffers.
pub const BUFFERS: u64 = 8 << 20;

/// Memory for a guest without a processor.
pub fn memory() -> Memory {
    // A mapping of a few MiB fails on no machine that runs tests.
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("map memory"))
}

/// Memory that another process can map too, as that of a real machine: behind a file without a name.
pub fn shared_memory() -> Memory {
    let file = TempFile::new().expect("make a file for memory").into_file();
    file.set_len(MEMORY as u64).expect("give the file its size");
    let ranges = [(GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)))];
    Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).expect("map memory"))
}

/// One ring as its driver sees it.
#[derive(Clone, Debug)]
pub struct DriverRing {
    memory: Memory,
    /// The number of descriptors.
    pub size: u16,
    /// The descriptor table.
    pub table: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
}

impl DriverRing {
    /// A ring at `at` (16-byte aligned).
    pub fn new(memory: &Memory, at: u64, size: u16) -> Self {
        let entries = u64::from(size);
        let available = at + 16 * entries;
        let used = (available + 6 + 2 * entries).next_multiple_of(4);
        Self {
            memory: memory.clone(),
            size,
            table: at,
            available,
            used,
            next_descriptor: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    /// Bytes that a ring takes.
    pub fn bytes(size: u16) -> u64 {
        (16 * u64::from(size) + 6 + 2 * u64::from(size) + 4 + 6 + 8 * u64::from(size)).next_multiple_of(4096)
    }

    /// The ring as the device gets it.
    pub fn queue(&self, max_size: u16) -> Queue {
        let mut queue = Queue::new(max_size).expect("a power of two");
        queue.set_size(self.size);
        queue.set_desc_table_address(Some(self.table as u32), Some(0));
        queue.set_avail_ring_address(Some(self.available as u32), Some(0));
        queue.set_used_ring_address(Some(self.used as u32), Some(0));
        queue.set_ready(true);
        queue
    }

    /// Writes a descriptor as it is.
    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(self.table + 16 * u64::from(index));
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, at).expect("a descriptor in memory");
    }

    /// Offers a chain: (address, length, writable by the device). Answers its head.
    pub fn offer(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor % self.size;
        for (n, &(address, len, writable)) in buffers.iter().enumerate() {
            let index = (self.next_descriptor + n as u16) % self.size;
            let last = n + 1 == buffers.len();
            let flags = if writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(index, address, len, flags, (index + 1) % self.size);
        }
        self.next_descriptor = self.next_descriptor.wrapping_add(buffers.len() as u16);
        self.offer_head(head);
        head
    }

    /// Offers whatever hangs at `head`.
    pub fn offer_head(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        let at = GuestAddress(self.available + 4 + 2 * slot);
        self.memory.write_obj(head.to_le(), at).expect("an entry in memory");
        self.set_available_index(self.next_available.wrapping_add(1));
    }

    /// Writes the available index as it is.
    pub fn set_available_index(&mut self, index: u16) {
        self.next_available = index;
        self.memory.write_obj(index.to_le(), GuestAddress(self.available + 2)).expect("an index in memory");
    }

    /// The next request that the device gave back: its head, and how many bytes the device wrote.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.used + 2)).expect("an index in memory");
        if u16::from_le(index) == self.next_used {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let element: [u32; 2] = self.memory.read_obj(GuestAddress(at)).expect("an element in memory");
        self.next_used = self.next_used.wrapping_add(1);
        Some((u32::from_le(element[0]) as u16, u32::from_le(element[1])))
    }
}

/// A device with a driver and an event loop, but no machine.
pub struct Bench<D: Device> {
    /// The device under test.
    pub device: Arc<Mutex<D>>,
    /// The guest's memory.
    pub memory: Memory,
    /// What the device raises.
    pub interrupt: Arc<Interrupt>,
    /// The driver's side of each ring.
    pub rings: Vec<DriverRing>,
    events: EventManager<Arc<Mutex<D>>>,
}

impl<D: Device + MutEventSubscriber> Bench<D> {
    /// A device that is not active yet.
    pub fn new(device: D) -> Self {
        Self::with_memory(device, memory())
    }

    /// A device that is not active yet, in a guest with this memory.
    pub fn with_memory(device: D, memory: Memory) -> Self {
        let mut at = 0x1000;
        let sizes = device.queue_sizes().to_vec();
        let rings = sizes.iter().map(|&size| {
            let ring = DriverRing::new(&memory, at, size);
            at += DriverRing::bytes(size);
            ring
        });
        let rings = rings.collect();
        assert!(at <= BUFFERS, "the rings leave no room for buffers");
        let device = Arc::new(Mutex::new(device));
        let mut events = EventManager::new().expect("make an event loop");
        events.add_subscriber(device.clone());
        let line = EventFd::new(EFD_NONBLOCK).expect("make an eventfd");
        Self { device, memory, interrupt: Arc::new(Interrupt::new(line)), rings, events }
    }

    /// Hands the rings over, with these features agreed on.
    pub fn activate(&mut self, features: u64) -> Result<(), ActivateError> {
        let mut device = self.device.lock().expect("the device");
        let sizes = device.queue_sizes().to_vec();
        let queues = self.rings.iter().zip(sizes).map(|(ring, max)| {
            let mut queue = ring.queue(max);
            queue.set_event_idx(features & 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX != 0);
            queue
        });
        let queues = queues.collect();
        let (memory, interrupt) = (self.memory.clone(), self.interrupt.clone());
        device.activate(Activation { memory, features, queues, interrupt })
    }

    /// Notifies the device of ring `queue`, and lets the event loop run until nothing is left to do.
    pub fn kick(&mut self, queue: usize) {
        self.device.lock().expect("the device").kicks()[queue].write(1).expect("kick");
        self.settle();
    }

    /// Lets the event loop run until nothing is left to do.
    pub fn settle(&mut self) {
        while self.events.run_with_timeout(0).expect("run the event loop") > 0 {}
    }

    /// Lets the event loop handle one batch of events, waiting for it at most `milliseconds`.
    pub fn turn(&mut self, milliseconds: i32) -> usize {
        self.events.run_with_timeout(milliseconds).expect("run the event loop")
    }

    /// Whether the guest was interrupted since the last time this was asked.
    pub fn interrupted(&self) -> bool {
        self.interrupt.line().read().is_ok()
    }

    /// Whether the device has given itself up.
    pub fn needs_reset(&self) -> bool {
        self.interrupt.status() & virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET != 0
    }

    /// Writes a buffer of the guest's.
    pub fn fill(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).expect("a buffer in memory");
    }

    /// Reads a buffer of the guest's.
    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.memory.read_slice(&mut out, GuestAddress(at)).expect("a buffer in memory");
        out
    }
}
