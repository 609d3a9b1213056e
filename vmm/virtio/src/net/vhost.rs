//! Frames by way of vhost-net: a thread of the kernel serves the rings, this process sees none of them.
//!
//! The kernel polls the device's kicks and writes the interrupt's line (an irqfd) by itself; how the guest
//! then finds the bit of InterruptStatus is told at [`Interrupt::raised_by_backend`]. Broken rings are
//! reported on an eventfd.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, atomic::Ordering},
};

use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData, vhost_kern::VhostKernBackend};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_net::VIRTIO_NET_F_MRG_RXBUF,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{RX, TX, sys};
use crate::{ActivateError, Activation, Interrupt, Memory, ring::RingState};

/// The features that the backend must know of; the others are between the driver and the tap.
const OF_BACKEND: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_F_VERSION_1;

/// An open /dev/vhost-net that belongs to this process.
pub(super) struct Vhost {
    /// None after [`Vhost::close`].
    file: Option<File>,
    memory: Memory,
    features: u64,
    /// Written by the kernel for what it cannot go on with.
    pub(super) error: EventFd,
}

impl Vhost {
    /// Makes this process its owner, whose memory the kernel's thread will see.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let memory = Memory::default();
        let mut vhost = Self { file: Some(file), memory, features: 0, error: EventFd::new(EFD_NONBLOCK)? };
        vhost.set_owner().map_err(|e| told("VHOST_SET_OWNER", e))?;
        vhost.features = vhost.get_features().map_err(|e| told("VHOST_GET_FEATURES", e))?;
        Ok(vhost)
    }

    /// What of `features` can be offered with this backend.
    pub(super) fn offered(&self, features: u64) -> u64 {
        features & (self.features | !OF_BACKEND)
    }

    /// Hands the rings to the kernel: when this returns, it works on them.
    pub(super) fn start(&mut self, rings: &Rings, kicks: &[EventFd], tap: RawFd) -> io::Result<()> {
        self.memory = rings.memory.clone();
        let agreed = (rings.features | 1 << VIRTIO_F_VERSION_1) & OF_BACKEND;
        self.set_features(agreed).map_err(|e| told("VHOST_SET_FEATURES", e))?;
        let regions = rings.memory.iter().map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            ..Default::default()
        });
        let regions = regions.collect::<Vec<_>>();
        self.set_mem_table(&regions).map_err(|e| told("VHOST_SET_MEM_TABLE", e))?;
        // The bit must be there before the kernel can raise the line.
        rings.interrupt.raised_by_backend();
        for (number, queue) in rings.queues.iter().enumerate() {
            self.set_up(number, queue, &rings.interrupt, &kicks[number])?;
        }
        for number in [RX, TX] {
            sys::set_backend(self, number, Some(tap)).inspect_err(|_| drop(self.stop()))?;
        }
        for kick in kicks {
            // What was offered before the kernel looked; only a counter at its limit refuses.
            let _ = kick.write(1);
        }
        Ok(())
    }

    fn set_up(&self, number: usize, queue: &Queue, interrupt: &Interrupt, kick: &EventFd) -> io::Result<()> {
        let config = VringConfigData {
            queue_max_size: queue.max_size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: queue.desc_table(),
            used_ring_addr: queue.used_ring(),
            avail_ring_addr: queue.avail_ring(),
            log_addr: None,
        };
        self.set_vring_num(number, queue.size()).map_err(|e| told("VHOST_SET_VRING_NUM", e))?;
        // Where it goes on with the used ring it reads from the guest's memory.
        self.set_vring_base(number, queue.next_avail()).map_err(|e| told("VHOST_SET_VRING_BASE", e))?;
        self.set_vring_addr(number, &config).map_err(|e| told("VHOST_SET_VRING_ADDR", e))?;
        self.set_vring_call(number, interrupt.line()).map_err(|e| told("VHOST_SET_VRING_CALL", e))?;
        self.set_vring_err(number, &self.error).map_err(|e| told("VHOST_SET_VRING_ERR", e))?;
        self.set_vring_kick(number, kick).map_err(|e| told("VHOST_SET_VRING_KICK", e))
    }

    /// Takes the rings from the kernel: when this returns, it touches neither them nor the buffers.
    pub(super) fn stop(&self) -> io::Result<()> {
        let [rx, tx] = [RX, TX].map(|number| sys::set_backend(self, number, None));
        rx.and(tx)
    }

    /// Makes the kernel let go of everything, for ever.
    pub(super) fn close(&mut self) {
        self.file = None;
    }

    /// Notes in `rings` where the kernel stands, after a [`Vhost::stop`].
    pub(super) fn positions(&self, rings: &mut Rings) -> io::Result<()> {
        for (number, queue) in rings.queues.iter_mut().enumerate() {
            let base = self.get_vring_base(number).map_err(|e| told("VHOST_GET_VRING_BASE", e))?;
            let used = queue.used_idx(&*rings.memory, Ordering::Acquire).map_err(io::Error::other)?;
            queue.set_next_avail(base as u16);
            queue.set_next_used(used.0);
        }
        Ok(())
    }
}

impl AsRawFd for Vhost {
    fn as_raw_fd(&self) -> RawFd {
        // Without a file every call on it fails.
        self.file.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

impl VhostKernBackend for Vhost {
    type AS = Memory;

    fn mem(&self) -> &Memory {
        &self.memory
    }
}

fn told(call: &str, error: vhost::Error) -> io::Error {
    io::Error::other(format!("vhost-net: {call}: {error}"))
}

/// The rings while the kernel may have them.
pub(super) struct Rings {
    memory: Memory,
    features: u64,
    pub(super) queues: Vec<Queue>,
    pub(super) interrupt: Arc<Interrupt>,
}

impl Rings {
    pub(super) fn new(activation: Activation) -> Result<Self, ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        for number in [RX, TX] {
            let queue = queues.get(number).filter(|q| q.is_valid(&*memory) && is_whole(q, &memory));
            queue.ok_or(ActivateError::Queue(number))?;
        }
        Ok(Self { memory, features, queues, interrupt })
    }

    pub(super) fn save(&self) -> Vec<RingState> {
        self.queues.iter().map(|queue| queue.state().into()).collect()
    }
}

/// Whether each part of a ring lies in one region of memory. The kernel is told where a part begins in
/// this process and goes on from there: across the end of a region it would write to whatever of this
/// process lies behind.
fn is_whole(queue: &Queue, memory: &Memory) -> bool {
    let size = usize::from(queue.size());
    // 2.7: descriptors, available ring and used ring, each ring with its event index.
    let parts = [
        (queue.desc_table(), 16 * size),
        (queue.avail_ring(), 6 + 2 * size),
        (queue.used_ring(), 6 + 8 * size),
    ];
    parts.into_iter().all(|(at, bytes)| memory.get_slice(GuestAddress(at), bytes).is_ok())
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::testing::DriverRing;

    #[test]
    fn a_ring_across_two_regions_is_not_given_to_the_kernel() {
        let (low, high) = ((GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000));
        let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&[low, high]).unwrap());
        assert!(is_whole(&DriverRing::new(&memory, 0x1000, 256).queue(256), &memory));
        for at in [0x10000 - 16, 0x10000 - 4096 - 16, 0x10000 - 4096 - 1024] {
            let queue = DriverRing::new(&memory, at, 256).queue(256);
            assert!(queue.is_valid(&*memory), "memory there is");
            assert!(!is_whole(&queue, &memory), "{at:#x}");
        }
    }

    #[test]
    fn what_is_no_vhost_is_refused_with_the_call_that_told() {
        let error = Vhost::new(File::open("/dev/null").unwrap()).err().unwrap().to_string();
        assert!(error.contains("VHOST_SET_OWNER"), "{error}");
    }

    #[test]
    fn only_what_the_backend_must_know_depends_on_it() {
        let file = File::open("/dev/null").unwrap();
        let error = EventFd::new(EFD_NONBLOCK).unwrap();
        let file = Some(file);
        let vhost = Vhost { file, memory: Memory::default(), features: 0, error };
        let csum = 1;
        assert_eq!(vhost.offered(OF_BACKEND | csum), csum);
        let vhost = Vhost { features: OF_BACKEND, ..vhost };
        assert_eq!(vhost.offered(OF_BACKEND | csum), OF_BACKEND | csum);
    }
}
