//! Leads the guest's accesses to the device that they mean.
//! Knows addresses; what stands behind them is the devices'.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_virtio::mmio::{Transport, WINDOW};

use crate::{arch::layout, legacy::Ports};

/// What the first three registers of a slot without a device say (virtio 1.2, 4.2.2.2): magic, version and
/// device id 0. A driver leaves it alone, and can be told later to look again.
const EMPTY: [u32; 3] = [0x7472_6976, 2, 0];
/// Offset of the device id.
const DEVICE_ID: u64 = 8;

/// A window for a device.
pub(crate) type Window = Mutex<Place>;

/// What is in a window.
#[derive(Default)]
pub(crate) struct Place {
    /// The device, if there is one.
    pub(crate) transport: Option<Transport>,
    /// The first look finds the window empty, the next one its device. A kernel that boots looks at every
    /// window; a device that nobody needs so early is set up later, when the agent has its driver look again:
    /// the set-up is 33 to 90 exits a device.
    pub(crate) shy: bool,
}

impl Place {
    /// The device, if the guest can see it.
    fn seen(&mut self) -> Option<&mut Transport> {
        if self.shy { None } else { self.transport.as_mut() }
    }
}

/// Every device that a processor can reach.
pub(crate) struct Bus {
    ports: Mutex<Ports>,
    windows: Vec<Window>,
}

impl Bus {
    /// A bus with windows for devices, some of them still empty.
    pub(crate) fn new(ports: Ports, windows: Vec<Window>) -> Self {
        Self { ports: Mutex::new(ports), windows }
    }

    /// The windows in order.
    pub(crate) fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// The guest reads a port.
    pub(crate) fn read_port(&self, port: u16, data: &mut [u8]) {
        lock(&self.ports).read(port, data);
    }

    /// The guest writes a port.
    pub(crate) fn write_port(&self, port: u16, data: &[u8]) {
        lock(&self.ports).write(port, data);
    }

    /// The guest reads where there is no memory. Where there is no device either, it reads ones.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        let Some((mut window, offset)) = self.find(address, data.len()) else { return data.fill(0xff) };
        if let Some(transport) = window.seen() {
            return transport.read(offset, data);
        }
        if offset == DEVICE_ID {
            window.shy = false;
        }
        data.fill(0);
        if let (Some(value), Ok(data)) = (EMPTY.get((offset / 4) as usize), <&mut [u8; 4]>::try_from(data))
            && offset % 4 == 0
        {
            *data = value.to_le_bytes();
        }
    }

    /// The guest writes where there is no memory. Where there is no device either, nothing happens.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((mut window, offset)) = self.find(address, data.len())
            && let Some(transport) = window.seen()
        {
            transport.write(offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(MutexGuard<'_, Place>, u64)> {
        let at = address.checked_sub(layout::VIRTIO)?;
        let window = self.windows.get(usize::try_from(at / layout::VIRTIO_STEP).ok()?)?;
        let offset = at % layout::VIRTIO_STEP;
        (offset + len as u64 <= WINDOW).then(|| (lock(window), offset))
    }
}

/// A device that panicked stays what it is: the guest's accesses to it must not take the VMM down.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
