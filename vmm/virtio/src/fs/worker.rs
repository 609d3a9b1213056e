//! The rings while the driver has the device active: with the backend, or stopped at known positions.

use std::{
    os::fd::AsRawFd,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use vhost::{
    VhostUserMemoryRegionInfo,
    vhost_user::message::{
        FrontendReq, MAX_ATTACHED_FD_ENTRIES, VhostUserMemory, VhostUserU64, VhostUserVirtioFeatures,
        VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
    },
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::connection::Connection;
use crate::{ActivateError, Interrupt, Memory, ring::RingState};

pub(super) struct Session {
    pub(super) memory: Memory,
    pub(super) features: u64,
    pub(super) queues: Vec<Queue>,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) running: bool,
    pub(super) patience: Duration,
    pub(super) drain: Duration,
}

impl Session {
    /// Hands the rings to the backend, each from its position on.
    pub(super) fn start(&mut self, backend: &mut Connection, kicks: &[EventFd]) -> Result<(), ActivateError> {
        let failed = |what| move |source| ActivateError::Backend { what, source };
        backend.begin(self.patience).map_err(failed("set a deadline for the backend"))?;
        let features = self.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        backend
            .set(FrontendReq::SET_FEATURES, VhostUserU64::new(features).as_slice(), &[])
            .map_err(failed("set the backend's features"))?;
        self.share_memory(backend).map_err(failed("share the guest's memory with the backend"))?;
        // From the first ring on the backend may write to memory; a failure stops it again.
        self.running = true;
        self.interrupt.raised_by_backend();
        for (index, (queue, kick)) in self.queues.iter().zip(kicks).enumerate() {
            self.start_ring(backend, index as u32, queue, kick)
                .map_err(failed("hand a ring to the backend"))?;
        }
        Ok(())
    }

    fn share_memory(&self, backend: &mut Connection) -> std::io::Result<()> {
        let mut body = Vec::new();
        let mut fds = Vec::new();
        for region in self.memory.iter() {
            let mut info = VhostUserMemoryRegionInfo::from_guest_region(region)
                .map_err(|_| std::io::Error::other("a region of memory is behind no file"))?;
            // By this address the backend is told where the rings are, and for nothing else. The guest's
            // own serves as well as the one in this process, which is nobody else's business.
            info.userspace_addr = info.guest_phys_addr;
            body.extend(info.to_region().as_slice());
            fds.push(info.mmap_handle);
        }
        if fds.len() > MAX_ATTACHED_FD_ENTRIES {
            return Err(std::io::Error::other("the memory has too many regions"));
        }
        body.splice(..0, VhostUserMemory::new(fds.len() as u32).as_slice().iter().copied());
        backend.set(FrontendReq::SET_MEM_TABLE, &body, &fds)
    }

    fn start_ring(
        &self,
        backend: &mut Connection,
        index: u32,
        queue: &Queue,
        kick: &EventFd,
    ) -> std::io::Result<()> {
        let state = |value| VhostUserVringState::new(index, value);
        let number = VhostUserU64::new(u64::from(index));
        let addresses = VhostUserVringAddr::new(
            index,
            VhostUserVringAddrFlags::empty(),
            queue.desc_table(),
            queue.used_ring(),
            queue.avail_ring(),
            0,
        );
        let next = u32::from(queue.next_avail());
        let line = self.interrupt.line().as_raw_fd();
        backend.set(FrontendReq::SET_VRING_NUM, state(u32::from(queue.size())).as_slice(), &[])?;
        backend.set(FrontendReq::SET_VRING_ADDR, addresses.as_slice(), &[])?;
        backend.set(FrontendReq::SET_VRING_BASE, state(next).as_slice(), &[])?;
        backend.set(FrontendReq::SET_VRING_CALL, number.as_slice(), &[line])?;
        backend.set(FrontendReq::SET_VRING_KICK, number.as_slice(), &[kick.as_raw_fd()])?;
        backend.set(FrontendReq::SET_VRING_ENABLE, state(1).as_slice(), &[])
    }

    /// Takes the rings back; their positions are known afterwards.
    pub(super) fn stop(&mut self, backend: &mut Connection) -> std::io::Result<()> {
        if !self.running {
            return Ok(());
        }
        backend.begin(self.drain)?;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            queue.set_next_avail(backend.stop_ring(index as u32)?);
            // The backend keeps what it has used in the ring itself.
            if let Ok(used) = queue.used_idx(&*self.memory, Ordering::Acquire) {
                queue.set_next_used(used.0);
            }
        }
        self.running = false;
        Ok(())
    }

    /// Where the rings stand; what is running stands nowhere.
    pub(super) fn save(&self) -> Vec<RingState> {
        self.queues.iter().map(|q| q.state().into()).collect()
    }
}
