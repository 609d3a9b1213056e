//! How a device tells its guest that something happened: the status bits and the line.
//! Knows nothing of rings; the transport reads and clears the bits.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use vmm_sys_util::eventfd::EventFd;

/// A ring has used buffers (virtio 1.2, 4.2.2, InterruptStatus bit 0).
pub const USED_BUFFER: u32 = 1;
/// The configuration, or the device's status, has changed (bit 1).
pub const CONFIG_CHANGE: u32 = 2;

/// The interrupt of one device, shared by its worker and its transport.
#[derive(Debug)]
pub struct Interrupt {
    /// InterruptStatus.
    pending: AtomicU32,
    /// The device status field.
    status: AtomicU32,
    /// ConfigGeneration.
    generation: AtomicU32,
    /// Whether something else than this process raises the line for used buffers.
    backend: AtomicBool,
    /// Raises the line when written.
    line: EventFd,
}

impl Interrupt {
    /// An interrupt that raises the line behind `line` (with KVM: an irqfd).
    pub fn new(line: EventFd) -> Self {
        Self {
            pending: AtomicU32::new(0),
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            backend: AtomicBool::new(false),
            line,
        }
    }

    /// The descriptor of the line, for what raises it without us (vhost).
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// From here to the device's reset, a backend outside of this process (vhost, vhost-user) raises the
    /// line for used buffers, and cannot set the bit of InterruptStatus that must be read with it. So the
    /// bit reads as set whenever the driver looks. A driver looks after the line was raised: it reads the
    /// status, acknowledges it, and goes through its rings. When the line was raised for something else, it
    /// finds no used buffer in them, which is no error (virtio 1.2, 2.7.14): an interrupt is a hint.
    pub fn raised_by_backend(&self) {
        self.backend.store(true, Ordering::SeqCst);
    }

    /// Tells the guest that a ring has used buffers.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the guest to read the configuration again.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }

    /// Gives the device up until its driver resets it (virtio 1.2, 2.1.2).
    pub fn needs_reset(&self) {
        let before = self.status.fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET, Ordering::SeqCst);
        if before & VIRTIO_CONFIG_S_NEEDS_RESET == 0 {
            self.raise(CONFIG_CHANGE);
        }
    }

    /// The bits the guest has not acknowledged.
    pub fn pending(&self) -> u32 {
        let backend = if self.backend.load(Ordering::SeqCst) { USED_BUFFER } else { 0 };
        self.pending.load(Ordering::SeqCst) | backend
    }

    /// The guest has seen these bits.
    pub fn acknowledge(&self, bits: u32) {
        self.pending.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The device status field.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// Writes the device status field.
    pub(crate) fn set_status(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
    }

    /// A number that changes with the configuration.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Forgets everything, as at the device's reset.
    pub(crate) fn clear(&self) {
        self.backend.store(false, Ordering::SeqCst);
        self.pending.store(0, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
    }

    /// Takes over saved values; `pending` ones are raised again.
    pub(crate) fn restore(&self, status: u32, pending: u32, generation: u32) {
        self.status.store(status, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
        if pending != 0 {
            self.raise(pending);
        }
    }

    fn raise(&self, bits: u32) {
        self.pending.fetch_or(bits, Ordering::SeqCst);
        // It fails only when the counter is at its limit, where the line is up anyway.
        let _ = self.line.write(1);
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn with_a_backend_the_bit_is_always_there() {
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
        assert_eq!(interrupt.pending(), 0);
        interrupt.raised_by_backend();
        interrupt.acknowledge(USED_BUFFER);
        assert_eq!(interrupt.pending(), USED_BUFFER);
        interrupt.config_changed();
        assert_eq!(interrupt.pending(), USED_BUFFER | CONFIG_CHANGE);
        interrupt.clear();
        assert_eq!(interrupt.pending(), 0, "the reset ends it");
    }
}
