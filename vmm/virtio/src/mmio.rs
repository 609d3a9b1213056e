//! The transport: the registers of one device (virtio 1.2, 4.2), at 512 bytes of the guest's address space.
//! Knows rings as far as their set-up; what they carry is the device's.
//!
//! MMIO rather than PCI: a guest finds its devices by words on its command line, without a bus to scan,
//! without tables to parse and without firmware; a device costs about 25 exits at boot. What it lacks
//! against MSI-X is that an interrupt costs two register accesses.
//!
//! ```text
//!            driver writes status                        DRIVER_OK
//!  reset ───▶ ACKNOWLEDGE ▶ DRIVER ▶ FEATURES_OK ───────────────────▶ active
//!    ▲                                                       │           │ device meets a RingError
//!    └────────────────────── status = 0 ◀────────────────────┴───────────┴▶ NEEDS_RESET
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
        VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
        VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
        VIRTIO_F_VERSION_1,
    },
    virtio_mmio::*,
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};
use virtio_queue::{Queue, QueueT};

use crate::{Activation, Device, DeviceState, Interrupt, Memory, counters, ring::RingState};

/// Bytes of address space that a device occupies.
pub const WINDOW: u64 = 0x200;
/// "virt", the value of MagicValue.
const MAGIC: u32 = 0x7472_6976;
/// The register layout of virtio 1.x.
const VERSION: u32 = 2;
/// "BLKH": whose devices these are. Drivers do not care.
const VENDOR: u32 = 0x484b_4c42;
/// VIRTIO_F_VERSION_1, without which no driver is served.
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

counters! {
    /// What the transport counts.
    pub struct Metrics {
        /// Register accesses that the specification does not allow at that moment; each was ignored.
        refused,
        /// Times the driver reset the device.
        resets,
        /// Times the driver made the device active.
        activations,
        /// Activations that the device refused.
        activation_failures,
    }
}

/// A device as its driver's registers see it.
pub struct Transport {
    device: Arc<Mutex<dyn Device>>,
    interrupt: Arc<Interrupt>,
    memory: Memory,
    registers: Registers,
    queues: Vec<Queue>,
    active: bool,
    metrics: Metrics,
}

/// What the driver has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
}

impl Transport {
    /// Puts registers before a device.
    pub fn new(device: Arc<Mutex<dyn Device>>, interrupt: Arc<Interrupt>, memory: Memory) -> Self {
        let queues = fresh_queues(&*lock(&device));
        Self {
            device,
            interrupt,
            memory,
            registers: Registers::default(),
            queues,
            active: false,
            metrics: Metrics::default(),
        }
    }

    /// The device behind the registers.
    pub fn device(&self) -> &Arc<Mutex<dyn Device>> {
        &self.device
    }

    /// How the device reaches its guest.
    pub fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// What was counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// A read by the guest at `offset` of the window.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= u64::from(VIRTIO_MMIO_CONFIG) {
            lock(&self.device).read_config(offset - u64::from(VIRTIO_MMIO_CONFIG), data);
            return;
        }
        // 4.2.2.2: registers are 32 bits wide and aligned.
        match (<&mut [u8; 4]>::try_from(data), offset % 4) {
            (Ok(data), 0) => *data = self.read_register(offset as u32).to_le_bytes(),
            _ => self.metrics.refused.increment(),
        }
    }

    fn read_register(&self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => lock(&self.device).kind() as u32,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => {
                let offered = lock(&self.device).features() | VERSION_1;
                half(offered, self.registers.device_features_select)
            }
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue().map_or(0, |q| u32::from(q.max_size())),
            VIRTIO_MMIO_QUEUE_READY => self.queue().map_or(0, |q| u32::from(q.ready())),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.pending(),
            VIRTIO_MMIO_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.generation(),
            // 4.2.2: no shared memory region is a length of all ones.
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            VIRTIO_MMIO_SHM_BASE_LOW | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => {
                self.metrics.refused.increment();
                0
            }
        }
    }

    /// A write by the guest at `offset` of the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= u64::from(VIRTIO_MMIO_CONFIG) {
            if self.has(DRIVER) {
                lock(&self.device).write_config(offset - u64::from(VIRTIO_MMIO_CONFIG), data);
            } else {
                self.metrics.refused.increment();
            }
            return;
        }
        match (<[u8; 4]>::try_from(data), offset % 4) {
            (Ok(data), 0) => self.write_register(offset as u32, u32::from_le_bytes(data)),
            _ => self.metrics.refused.increment(),
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.has(DRIVER) && !self.has(FEATURES_OK) => {
                let features = &mut self.registers.driver_features;
                match self.registers.driver_features_select {
                    0 => *features = *features & !0xffff_ffff | u64::from(value),
                    1 => *features = *features & 0xffff_ffff | u64::from(value) << 32,
                    _ => self.metrics.refused.increment(),
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_select = value,
            VIRTIO_MMIO_QUEUE_NUM
            | VIRTIO_MMIO_QUEUE_READY
            | VIRTIO_MMIO_QUEUE_DESC_LOW
            | VIRTIO_MMIO_QUEUE_DESC_HIGH
            | VIRTIO_MMIO_QUEUE_AVAIL_LOW
            | VIRTIO_MMIO_QUEUE_AVAIL_HIGH
            | VIRTIO_MMIO_QUEUE_USED_LOW
            | VIRTIO_MMIO_QUEUE_USED_HIGH => self.set_up_queue(register, value),
            VIRTIO_MMIO_QUEUE_NOTIFY => self.kick(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            VIRTIO_MMIO_SHM_SEL => {}
            _ => self.metrics.refused.increment(),
        }
    }

    /// Sets up the selected ring, which is the transport's own only between FEATURES_OK and DRIVER_OK.
    fn set_up_queue(&mut self, register: u32, value: u32) {
        let allowed = self.has(FEATURES_OK) && !self.active && !self.has(FAILED) && !self.has(NEEDS_RESET);
        let queue = self.queues.get_mut(self.registers.queue_select as usize);
        let Some(queue) = queue.filter(|q| allowed && (!q.ready() || register == VIRTIO_MMIO_QUEUE_READY))
        else {
            self.metrics.refused.increment();
            return;
        };
        match register {
            VIRTIO_MMIO_QUEUE_NUM => match u16::try_from(value) {
                Ok(size) if queue.try_set_size(size).is_ok() => {}
                _ => self.metrics.refused.increment(),
            },
            VIRTIO_MMIO_QUEUE_READY => queue.set_ready(value == 1),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            _ => queue.set_used_ring_address(None, Some(value)),
        }
    }

    /// A notification that did not go by way of an ioeventfd.
    fn kick(&mut self, queue: u32) {
        match lock(&self.device).kicks().get(queue as usize) {
            Some(kick) if self.active => {
                // Only a counter at its limit refuses, and then the device is woken anyway.
                let _ = kick.write(1);
            }
            _ => self.metrics.refused.increment(),
        }
    }

    fn has(&self, bit: u32) -> bool {
        self.interrupt.status() & bit != 0
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.registers.queue_select as usize)
    }

    /// Goes one step of 3.1.1, or back to the beginning; a step out of order is refused.
    fn set_status(&mut self, value: u32) {
        let status = self.interrupt.status();
        if value == 0 {
            return self.reset();
        }
        if value & FAILED != 0 {
            self.interrupt.set_status(status | FAILED);
            return;
        }
        // NEEDS_RESET is the device's to set, and stays.
        let (before, after) = (status & !NEEDS_RESET, value & !NEEDS_RESET);
        match (before, after ^ before) {
            (_, 0) => {}
            (0, ACKNOWLEDGE) => self.interrupt.set_status(status | ACKNOWLEDGE),
            (ACKNOWLEDGE, DRIVER) => self.interrupt.set_status(status | DRIVER),
            (_, FEATURES_OK) if before == ACKNOWLEDGE | DRIVER => {
                if self.features_are_acceptable() {
                    self.interrupt.set_status(status | FEATURES_OK);
                } else {
                    self.metrics.refused.increment();
                }
            }
            (_, DRIVER_OK) if before == ACKNOWLEDGE | DRIVER | FEATURES_OK => self.activate(),
            _ => self.metrics.refused.increment(),
        }
    }

    /// 3.1.1, step 5: a subset of what was offered, and the interface of virtio 1.
    fn features_are_acceptable(&self) -> bool {
        let offered = lock(&self.device).features() | VERSION_1;
        let accepted = self.registers.driver_features;
        accepted & !offered == 0 && accepted & VERSION_1 != 0
    }

    fn activate(&mut self) {
        if self.active || self.has(NEEDS_RESET) {
            self.metrics.refused.increment();
            return;
        }
        let features = self.registers.driver_features;
        let mut queues = std::mem::take(&mut self.queues);
        for queue in &mut queues {
            queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        }
        self.interrupt.set_status(self.interrupt.status() | DRIVER_OK);
        if self.hand_over(queues) {
            self.metrics.activations.increment();
        } else {
            self.metrics.activation_failures.increment();
            self.interrupt.needs_reset();
        }
    }

    /// Gives the rings to the device.
    fn hand_over(&mut self, queues: Vec<Queue>) -> bool {
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.registers.driver_features,
            queues,
            interrupt: self.interrupt.clone(),
        };
        let mut device = lock(&self.device);
        self.active = device.activate(activation).is_ok();
        if self.active {
            // What was offered before the device looked.
            for kick in device.kicks() {
                let _ = kick.write(1);
            }
        }
        self.active
    }

    fn reset(&mut self) {
        let mut device = lock(&self.device);
        device.reset();
        self.queues = fresh_queues(&*device);
        drop(device);
        self.active = false;
        self.registers = Registers::default();
        self.interrupt.clear();
        self.metrics.resets.increment();
    }

    /// Everything about the device as plain data. The device is paused.
    pub fn save(&self) -> TransportState {
        TransportState {
            registers: self.registers,
            status: self.interrupt.status(),
            pending: self.interrupt.pending(),
            generation: self.interrupt.generation(),
            active: self.active,
            queues: self.queues.iter().map(|q| q.state().into()).collect(),
            device: lock(&self.device).save(),
        }
    }

    /// Turns a fresh device into the saved one, paused where the saved one was active.
    ///
    /// # Errors
    /// The state is not one of this device, or names what cannot be; the device is to be thrown away.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        self.registers = state.registers;
        if !lock(&self.device).restore(&state.device) {
            return Err(RestoreError::Device);
        }
        if state.status & NEEDS_RESET != 0 {
            // It gave itself up, and looks at no ring before its reset, which makes new ones.
            self.queues.clear();
            self.active = state.active;
            self.interrupt.restore(state.status, state.pending, state.generation);
            return Ok(());
        }
        let queues = if state.active { state.device.rings() } else { &state.queues };
        let fitting = queues.len() == lock(&self.device).queue_sizes().len();
        let queues: Result<Vec<Queue>, _> = queues.iter().map(|q| q.queue()).collect();
        let Some(queues) = queues.ok().filter(|_| fitting) else { return Err(RestoreError::Queues) };
        if state.active {
            self.queues.clear();
            self.interrupt.restore(state.status, 0, state.generation);
            let activation = Activation {
                memory: self.memory.clone(),
                features: self.registers.driver_features,
                queues,
                interrupt: self.interrupt.clone(),
            };
            let mut device = lock(&self.device);
            device.activate(activation).map_err(|_| RestoreError::Activation)?;
            device.pause();
            self.active = true;
        } else {
            self.queues = queues;
        }
        self.interrupt.restore(state.status, state.pending, state.generation);
        Ok(())
    }
}

/// Why a saved state was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The state is another kind of device's, or contradicts itself.
    #[error("the saved state does not belong to this device")]
    Device,
    /// The rings of the state cannot be.
    #[error("the saved rings cannot be")]
    Queues,
    /// The device does not start from the state.
    #[error("the device does not start from the saved state")]
    Activation,
}

/// A device with its registers, as plain data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TransportState {
    registers: Registers,
    status: u32,
    pending: u32,
    generation: u32,
    active: bool,
    /// The rings while they are the transport's; an active device's are in its own state.
    queues: Vec<RingState>,
    device: DeviceState,
}

fn fresh_queues(device: &dyn Device) -> Vec<Queue> {
    // A size that is no power of two is a mistake of the device's author, which its tests show.
    device.queue_sizes().iter().filter_map(|&size| Queue::new(size).ok()).collect()
}

/// A device whose thread panicked is still the one there is: its reset must remain possible.
fn lock<'a>(device: &'a Arc<Mutex<dyn Device>>) -> MutexGuard<'a, dyn Device + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
