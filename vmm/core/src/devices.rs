//! The machine's devices: made of their slots, put on the bus, connected to KVM, and given a loop to run on.
//! Knows which device works where; what a device does is `bulkhead_virtio`'s.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
};

use bulkhead_virtio::{Device, Interrupt, Memory, mmio::Transport};
use event_manager::{EventManager, SubscriberOps};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    arch::layout,
    boot::DeviceWord,
    bus::{Bus, Place, Window, lock},
    kvm::{KvmError, Vm},
};

/// A device as everybody shares it.
pub(crate) type Shared = Arc<Mutex<dyn Device>>;

/// The most windows: what fits on the command line.
pub(crate) const MAX_WINDOWS: usize = 24;

/// Where a device's events are handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loop {
    /// With the control socket: for devices that have little to do.
    Main,
    /// On a thread of its own.
    Own(&'static str),
}

/// When the guest finds a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// When its kernel looks for devices.
    AtBoot,
    /// When its agent, which has said hello by then, has the driver look again.
    Later,
}

/// Devices as they are put together.
pub(crate) struct Assembly {
    vm: Vm,
    memory: Memory,
    placed: Vec<Placed>,
    /// What runs on the main loop.
    pub(crate) main: Vec<Shared>,
    /// What gets a thread, by name.
    pub(crate) threads: Vec<(String, Shared)>,
}

/// A window with what is in it.
struct Placed {
    name: String,
    place: Place,
}

impl Assembly {
    /// No device yet.
    pub(crate) fn new(vm: Vm, memory: Memory) -> Self {
        Self { vm, memory, placed: Vec::new(), main: Vec::new(), threads: Vec::new() }
    }

    /// The machine in the kernel.
    pub(crate) fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Puts a device into the next window.
    ///
    /// # Errors
    /// KVM refuses to connect it.
    pub(crate) fn add<D: Device + 'static>(
        &mut self,
        name: impl Into<String>,
        device: D,
        on: Loop,
        found: Found,
    ) -> Result<Arc<Mutex<D>>, KvmError> {
        let device = Arc::new(Mutex::new(device));
        let shared: Shared = device.clone();
        let transport = connect(&self.vm, &self.memory, self.placed.len(), &shared)?;
        let name = name.into();
        match on {
            Loop::Main => self.main.push(shared),
            Loop::Own(kind) => {
                let nth = self.threads.iter().filter(|(n, _)| n.starts_with(kind)).count();
                self.threads.push((format!("{kind}{nth}"), shared));
            }
        }
        let place = Place { transport: Some(transport), shy: found == Found::Later };
        self.placed.push(Placed { name, place });
        Ok(device)
    }

    /// Leaves windows empty for devices that come later.
    pub(crate) fn spare(&mut self, count: u32) {
        for n in 0..count {
            self.placed.push(Placed { name: format!("spare{n}"), place: Place::default() });
        }
    }

    /// How the kernel finds the devices.
    pub(crate) fn words(&self) -> Vec<DeviceWord> {
        (0..self.placed.len()).map(|n| DeviceWord { window: n as u32, irq: irq(n) }).collect()
    }

    /// The windows for the bus, and the list of what is in them.
    pub(crate) fn finish(self) -> (Vec<Window>, Inventory) {
        let (names, windows) = self.placed.into_iter().map(|p| (p.name, Mutex::new(p.place))).unzip();
        (windows, Inventory { vm: self.vm, memory: self.memory, names })
    }
}

/// What is in which window, while the machine runs.
pub(crate) struct Inventory {
    vm: Vm,
    memory: Memory,
    names: Vec<String>,
}

/// Why a device cannot come or go.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChangeError {
    /// There is no room.
    #[error("no spare slot is free: the machine was made with {0}")]
    Full(usize),
    /// The slot is not one that changes, or is empty.
    #[error("slot {0} holds no attached device")]
    NotAttached(u32),
    /// KVM refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

impl Inventory {
    /// Puts a device into a spare window, and answers its number.
    ///
    /// # Errors
    /// None is free, or KVM refuses.
    pub(crate) fn attach(&self, bus: &Bus, device: &Shared) -> Result<u32, ChangeError> {
        let spare = |n: &usize| self.names[*n].starts_with("spare");
        let mut spares = (0..self.names.len()).filter(spare);
        let Some(n) = spares.find(|&n| lock(&bus.windows()[n]).transport.is_none()) else {
            return Err(ChangeError::Full((0..self.names.len()).filter(spare).count()));
        };
        let transport = connect(&self.vm, &self.memory, n, device)?;
        *lock(&bus.windows()[n]) = Place { transport: Some(transport), shy: false };
        Ok(n as u32)
    }

    /// Takes a device out of a spare window, and answers it.
    ///
    /// # Errors
    /// It is not one that was attached.
    pub(crate) fn detach(&self, bus: &Bus, slot: u32) -> Result<Shared, ChangeError> {
        let n = slot as usize;
        let spare = self.names.get(n).is_some_and(|name| name.starts_with("spare"));
        let taken = bus.windows().get(n).filter(|_| spare).and_then(|window| lock(window).transport.take());
        let Some(transport) = taken else { return Err(ChangeError::NotAttached(slot)) };
        let device = transport.device().clone();
        lock(&device).reset();
        disconnect(&self.vm, n, &transport)?;
        Ok(device)
    }

    /// Every counter of every device, by window.
    pub(crate) fn metrics(&self, bus: &Bus) -> BTreeMap<String, BTreeMap<String, u64>> {
        let mut all = BTreeMap::new();
        for (name, window) in self.names.iter().zip(bus.windows()) {
            let Some(transport) = &lock(window).transport else { continue };
            let mut counts: BTreeMap<String, u64> = BTreeMap::new();
            counts.extend(transport.metrics().list().into_iter().map(|(n, v)| (format!("transport_{n}"), v)));
            counts.extend(lock(transport.device()).metrics().into_iter().map(|(n, v)| (n.to_owned(), v)));
            all.insert(name.clone(), counts);
        }
        all
    }
}

/// Calls `act` on every device.
pub(crate) fn each(bus: &Bus, act: impl Fn(&mut dyn Device)) {
    for window in bus.windows() {
        if let Some(transport) = &lock(window).transport {
            act(&mut *lock(transport.device()));
        }
    }
}

fn irq(window: usize) -> u32 {
    layout::DEVICE_IRQS[window % layout::DEVICE_IRQS.len()]
}

fn notify_address(window: usize) -> u64 {
    layout::VIRTIO + window as u64 * layout::VIRTIO_STEP + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY)
}

fn connect(vm: &Vm, memory: &Memory, window: usize, device: &Shared) -> Result<Transport, KvmError> {
    let line = EventFd::new(EFD_NONBLOCK)
        .map_err(|source| KvmError::Refused { what: "connect an interrupt", source })?;
    vm.add_line(&line, irq(window))?;
    for (queue, kick) in lock(device).kicks().iter().enumerate() {
        vm.add_kick(kick, notify_address(window), queue as u32)?;
    }
    Ok(Transport::new(device.clone(), Arc::new(Interrupt::new(line)), memory.clone()))
}

fn disconnect(vm: &Vm, window: usize, transport: &Transport) -> Result<(), KvmError> {
    for (queue, kick) in lock(transport.device()).kicks().iter().enumerate() {
        vm.remove_kick(kick, notify_address(window), queue as u32)?;
    }
    vm.remove_line(transport.interrupt().line(), irq(window))
}

/// Runs one device's events on the calling thread for ever, after `ready`.
///
/// # Errors
/// The loop cannot go on, or `ready` says so.
pub(crate) fn run_alone(device: Shared, ready: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let mut events = EventManager::new().map_err(io::Error::other)?;
    events.add_subscriber(device);
    ready()?;
    loop {
        events.run().map_err(io::Error::other)?;
    }
}
