//! The machine as KVM sees it: memory, interrupt controllers, and what wakes a device without an exit.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{IntoRawFd, OwnedFd},
    sync::Arc,
};

use bulkhead_virtio::Memory;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout;

/// The only version of the interface there has been since Linux 2.6.22 (api.rst, 4.1).
const API_VERSION: i32 = 12;

/// Why KVM does not make a machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KvmError {
    /// The descriptor is not /dev/kvm, or a kernel without KVM answers.
    #[error("the descriptor given for /dev/kvm does not answer as KVM does: {0}")]
    NotKvm(io::Error),
    /// The host's KVM lacks something that every x86 host since Linux 4.20 has.
    #[error("the host's KVM lacks {0}: a newer kernel is needed")]
    Lacks(&'static str),
    /// KVM refused.
    #[error("KVM refuses to {what}: {source}{}", hint(source))]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
}

fn hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EBUSY) => "; another hypervisor may be using the processor's virtualisation",
        Some(libc::ENOMEM) => "; the host or the pod's cgroup is out of memory",
        _ => "",
    }
}

/// Names what was asked for in an error of KVM's.
pub(super) fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Refused { what, source: error.into() }
}

/// The machine in the kernel.
#[derive(Clone)]
pub(crate) struct Vm {
    pub(super) fd: Arc<VmFd>,
}

impl Vm {
    /// Makes a machine of the descriptor of /dev/kvm, which is needed until the processors are made.
    ///
    /// # Errors
    /// See [`KvmError`].
    pub(crate) fn new(kvm: OwnedFd) -> Result<(Self, Kvm), KvmError> {
        use std::os::fd::FromRawFd;
        // SAFETY: the descriptor is owned and handed over; what it is gets asked below, before any use.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        match kvm.get_api_version() {
            API_VERSION => {}
            -1 => return Err(KvmError::NotKvm(io::Error::last_os_error())),
            other => return Err(KvmError::NotKvm(io::Error::other(format!("API version {other}")))),
        }
        for (cap, name) in [
            (Cap::Irqfd, "interrupts from eventfds"),
            (Cap::Ioeventfd, "notifications to eventfds"),
            (Cap::UserMemory, "user memory"),
            (Cap::ImmediateExit, "immediate exits"),
            (Cap::SetTssAddr, "a place for the task state"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Lacks(name));
            }
        }
        let fd = kvm.create_vm().map_err(refused("make a machine"))?;
        // Both pages lie in the hole for devices, where no memory is (api.rst, 4.34 and 4.41).
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(refused("place its page tables"))?;
        fd.set_tss_address(layout::KVM_TSS).map_err(refused("place its task state"))?;
        fd.create_irq_chip().map_err(refused("make interrupt controllers"))?;
        // The interval timer: a kernel without a trusted time stamp counter measures time by it.
        let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(timer).map_err(refused("make an interval timer"))?;
        Ok((Self { fd: Arc::new(fd) }, kvm))
    }

    /// Puts guest memory into the machine: every region that begins below `end`. Answers how many slots
    /// are taken.
    ///
    /// # Errors
    /// KVM refuses a region.
    pub(crate) fn add_memory(&self, memory: &Memory, end: u64) -> Result<u32, KvmError> {
        use vm_memory::Address;
        let mut slot = 0;
        for region in memory.iter().filter(|r| r.start_addr().raw_value() < end) {
            let (at, size) = (region.start_addr().raw_value(), region.len());
            self.set_slot(slot, at, size, region.as_ptr() as u64)?;
            slot += 1;
        }
        Ok(slot)
    }

    /// Sets one memory slot; a size of 0 takes it away.
    pub(super) fn set_slot(&self, slot: u32, at: u64, size: u64, host: u64) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: at,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: the host's side is a mapping of guest memory, which lives as long as the process.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(refused("add memory"))
    }

    /// Raises an interrupt line whenever `event` is written.
    ///
    /// # Errors
    /// KVM refuses.
    pub(crate) fn add_line(&self, event: &EventFd, irq: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, irq).map_err(refused("connect an interrupt"))
    }

    /// Undoes [`Vm::add_line`].
    pub(crate) fn remove_line(&self, event: &EventFd, irq: u32) -> Result<(), KvmError> {
        self.fd.unregister_irqfd(event, irq).map_err(refused("disconnect an interrupt"))
    }

    /// Writes `event` when the guest writes `value` to `address`, without an exit to us.
    ///
    /// # Errors
    /// KVM refuses.
    pub(crate) fn add_kick(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(address);
        self.fd.register_ioevent(event, &address, value).map_err(refused("connect a notification"))
    }

    /// Undoes [`Vm::add_kick`].
    pub(crate) fn remove_kick(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(address);
        self.fd.unregister_ioevent(event, &address, value).map_err(refused("disconnect a notification"))
    }
}
