//! A device behind its registers, with a guest that does what an input says.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use event_manager::{EventManager, SubscriberOps};
use virtio_bindings::{
    virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1},
    virtio_mmio::*,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    devices::RngSubject,
    input::{Input, REGIONS},
};
use crate::{
    Device, Interrupt, Memory,
    mmio::Transport,
    testing::{
        DriverRing, INDIRECT, NEXT, WRITE,
        sys::{Fenced, thread_time},
    },
};

/// The most steps of a script.
const STEPS: usize = 400;
/// The most turns of the loop after one step: rings that a device writes to by the guest's will keep it busy
/// for as long as the guest wants, a turn at a time.
const TURNS: usize = 20;
/// The most turns until a device without new requests rests.
const REST: usize = 200;
/// Processor time of one turn. A turn is some 100 us; this leaves room for builds without optimisation.
const TURN: Duration = Duration::from_millis(1500);
/// The status of a driver that is ready.
const READY: u32 = 0xf;

pub(super) type Shared = Arc<Mutex<dyn Device>>;

/// A device with its host's side.
pub(super) trait Subject: Sized {
    /// Makes it.
    fn new(input: &mut Input<'_>) -> Self;
    /// The device.
    fn device(&self) -> Shared;
    /// Something happens on the host's side.
    fn host(&mut self, _input: &mut Input<'_>) {}
    /// The host's side becomes honest, before the last driver comes.
    fn calm(&mut self) {}
    /// Whether the device must serve the last driver.
    fn must_serve(&self) -> bool {
        true
    }
    /// An honest driver that is ready makes a request, and checks what comes of it.
    fn honest(&mut self, world: &mut World);
}

thread_local! {
    static FENCED: Fenced = Fenced::new(&REGIONS).expect("map the guest's memory");
}

/// Runs `body` with fresh memory, and looks at the fences afterwards.
fn fenced(body: impl FnOnce(Memory)) {
    FENCED.with(|fenced| {
        fenced.raise().expect("put up the fences");
        body(fenced.memory());
        assert!(
            fenced.stand().expect("look at the fences"),
            "the device wrote outside of the guest's memory"
        );
    });
}

/// Plays an input on a device.
pub(super) fn play<S: Subject>(bytes: &[u8]) {
    fenced(|memory| {
        let mut input = Input(bytes);
        let mut subject = S::new(&mut input);
        let mut world = World::new(subject.device(), memory);
        if input.byte() & 1 == 0 {
            let features = input.word();
            world.bring_up(features.into());
        }
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            world.step(&mut input, &mut subject);
        }
        finish(&mut world, &mut subject);
    });
}

/// The last driver: honest, after a reset.
fn finish<S: Subject>(world: &mut World, subject: &mut S) {
    world.device().resume();
    world.turns();
    subject.calm();
    world.start_again();
    let ready = world.bring_up(u64::MAX);
    assert!(ready || !subject.must_serve(), "the device does not come up again after its reset");
    if ready {
        subject.honest(world);
        world.rest();
    }
}

/// Plays an input on the registers alone, with the simplest device behind them.
pub(super) fn play_registers(bytes: &[u8]) {
    fenced(|memory| {
        let mut input = Input(bytes);
        let mut subject = RngSubject::new(&mut input);
        let mut world = World::new(subject.device(), memory.clone());
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            match input.byte() % 8 {
                0..=3 => world.access(&mut input),
                4 => drop(world.bring_up(input.word().into())),
                5 => world.step(&mut input, &mut subject),
                6 => world.turns(),
                // To another place, as a saved machine goes.
                _ => {
                    world.device().pause();
                    let state = world.transport.save();
                    subject = RngSubject::new(&mut input);
                    world = World { rings: world.rings, ..World::new(subject.device(), memory.clone()) };
                    world.transport.restore(&state).expect("what was saved can be restored");
                    world.device().resume();
                }
            }
        }
        finish(&mut world, &mut subject);
    });
}

/// A device behind its registers.
pub(super) struct World {
    pub(super) memory: Memory,
    /// The driver's side of each ring.
    pub(super) rings: Vec<DriverRing>,
    transport: Transport,
    events: EventManager<Shared>,
}

impl World {
    fn new(device: Shared, memory: Memory) -> Self {
        let mut events = EventManager::new().expect("make an event loop");
        events.add_subscriber(device.clone());
        let line = EventFd::new(EFD_NONBLOCK).expect("make an eventfd");
        let rings = rings(&device, &memory);
        let transport = Transport::new(device, Arc::new(Interrupt::new(line)), memory.clone());
        Self { memory, rings, transport, events }
    }

    /// The device, locked.
    pub(super) fn device(&self) -> std::sync::MutexGuard<'_, dyn Device + 'static> {
        self.transport.device().lock().expect("the device")
    }

    fn write(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    fn status(&mut self) -> u32 {
        let mut value = [0; 4];
        self.transport.read(VIRTIO_MMIO_STATUS.into(), &mut value);
        u32::from_le_bytes(value)
    }

    /// Comes up as a driver does that wants these of the offered features. Answers whether it is ready.
    pub(super) fn bring_up(&mut self, wanted: u64) -> bool {
        let features = self.device().features() & wanted | 1 << VIRTIO_F_VERSION_1;
        for status in [1, 3] {
            self.write(VIRTIO_MMIO_STATUS, status);
        }
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.write(VIRTIO_MMIO_STATUS, 0xb);
        for number in 0..self.rings.len() {
            let DriverRing { size, table, available, used, .. } = self.rings[number];
            self.write(VIRTIO_MMIO_QUEUE_SEL, number as u32);
            self.write(VIRTIO_MMIO_QUEUE_NUM, size.into());
            for (register, value) in [
                (VIRTIO_MMIO_QUEUE_DESC_LOW, table),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, available),
                (VIRTIO_MMIO_QUEUE_USED_LOW, used),
            ] {
                self.write(register, value as u32);
                self.write(register + 4, 0);
            }
            self.write(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        self.write(VIRTIO_MMIO_STATUS, READY);
        self.status() & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET) == VIRTIO_CONFIG_S_DRIVER_OK
    }

    /// Resets the device, and forgets everything that was in memory.
    fn start_again(&mut self) {
        self.write(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(self.status(), 0, "a reset device says so");
        for (at, size) in REGIONS {
            self.memory.write_slice(&vec![0; size], GuestAddress(at)).expect("memory");
        }
        self.rings = rings(self.transport.device(), &self.memory);
    }

    /// One event batch, which must not take long.
    fn turn(&mut self) -> usize {
        let before = thread_time();
        let count = self.events.run_with_timeout(0).expect("run the event loop");
        let took = thread_time() - before;
        assert!(took < TURN, "one turn of the event loop took {took:?}");
        count
    }

    /// Lets the device work for a while.
    pub(super) fn turns(&mut self) {
        for _ in 0..TURNS {
            if self.turn() == 0 {
                return;
            }
        }
    }

    /// Lets the device work until it rests, which it must.
    pub(super) fn rest(&mut self) {
        for _ in 0..REST {
            if self.turn() == 0 {
                return;
            }
        }
        panic!("the device has nothing to do and does not rest");
    }

    /// Waits for the next answer on a ring, where something beside this thread makes it.
    pub(super) fn answer(&mut self, ring: usize) -> (u16, u32) {
        for _ in 0..REST {
            if let Some(used) = self.rings[ring].take_used() {
                return used;
            }
            self.events.run_with_timeout(1000).expect("run the event loop");
        }
        panic!("an honest request was not answered");
    }

    /// Notifies the device, and lets it work until it rests.
    pub(super) fn kick(&mut self, queue: usize) {
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
        self.rest();
    }

    /// Fills a buffer.
    pub(super) fn fill(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).expect("memory");
    }

    /// Reads a buffer.
    pub(super) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.memory.read_slice(&mut out, GuestAddress(at)).expect("memory");
        out
    }

    /// One step of a script.
    fn step<S: Subject>(&mut self, input: &mut Input<'_>, subject: &mut S) {
        match input.byte() % 16 {
            0 | 1 => self.access(input),
            2 => self.scribble(input),
            3..=5 => self.offer(input),
            6 => self.descriptor(input),
            7 => {
                let (ring, index) = (self.ring(input), input.half());
                self.rings[ring].set_available_index(index);
            }
            8 => {
                let (ring, head) = (self.ring(input), input.half());
                self.rings[ring].offer_head(head);
            }
            9 | 10 => {
                // An ioeventfd, which asks nobody.
                let ring = self.ring(input);
                let _ = self.device().kicks()[ring].write(1);
                self.turns();
            }
            11 => self.turns(),
            12 => drop(self.bring_up(input.word().into())),
            13 => match input.byte() % 4 {
                0 => self.write(VIRTIO_MMIO_STATUS, 0),
                1 => self.device().pause(),
                2 => self.device().resume(),
                _ => {
                    self.device().pause();
                    let _ = self.transport.save();
                    self.turns();
                    self.device().resume();
                }
            },
            _ => subject.host(input),
        }
    }

    fn ring(&self, input: &mut Input<'_>) -> usize {
        usize::from(input.byte()) % self.rings.len()
    }

    fn address(&self, input: &mut Input<'_>) -> u64 {
        let tables: Vec<u64> = self.rings.iter().map(|r| r.table).collect();
        input.address(&tables)
    }

    /// An access to a register, at any offset in any width.
    fn access(&mut self, input: &mut Input<'_>) {
        let kind = input.byte();
        let offset = match kind & 3 {
            // The registers that do something most of the time.
            0 | 1 => u64::from(input.byte() & 0x3f) * 4,
            2 => u64::from(VIRTIO_MMIO_CONFIG) + u64::from(input.byte()),
            _ => u64::from(input.half()) % crate::mmio::WINDOW,
        };
        let width = if kind & 3 == 3 { usize::from(kind >> 3 & 0xf) } else { 4 };
        if kind & 4 == 0 {
            let mut data = vec![0xaa; width];
            self.transport.read(offset, &mut data);
        } else {
            let mut data = input.long().to_le_bytes().to_vec();
            data.resize(width, 0);
            self.transport.write(offset, &data);
        }
    }

    /// Bytes into memory, where there is some.
    fn scribble(&mut self, input: &mut Input<'_>) {
        let at = GuestAddress(self.address(input));
        let len = usize::from(input.byte());
        let bytes = input.bytes(len);
        if self.memory.check_range(at, bytes.len().max(1)) {
            let _ = self.memory.write_slice(bytes, at);
        }
    }

    /// A chain that may be one, and what it begins with.
    fn offer(&mut self, input: &mut Input<'_>) {
        let ring = self.ring(input);
        let shape = input.byte();
        let count = usize::from(shape & 7) + 1;
        let mut buffers = Vec::with_capacity(count);
        for n in 0..count {
            // Readable ones first, as the order must be; broken chains are made by `descriptor`.
            let writable = n >= usize::from(shape >> 3 & 7);
            buffers.push((self.address(input), input.len(), writable));
        }
        let len = usize::from(input.byte() % 96);
        let front = input.bytes(len);
        if let Some(&(at, ..)) = buffers.first()
            && self.memory.check_range(GuestAddress(at), front.len().max(1))
        {
            let _ = self.memory.write_slice(front, GuestAddress(at));
        }
        self.rings[ring].offer(&buffers);
        if shape & 0x40 != 0 {
            let _ = self.device().kicks()[ring].write(1);
            self.turns();
        }
    }

    /// A descriptor as it comes.
    fn descriptor(&mut self, input: &mut Input<'_>) {
        let ring = self.ring(input);
        let index = input.half() % self.rings[ring].size;
        let (address, len) = (self.address(input), input.len());
        let flags = u16::from(input.byte()) & (NEXT | WRITE | INDIRECT);
        let next = input.half();
        self.rings[ring].descriptor(index, address, len, flags, next);
    }
}

/// The rings one after the other from the second page on.
fn rings(device: &Shared, memory: &Memory) -> Vec<DriverRing> {
    let sizes = device.lock().expect("the device").queue_sizes().to_vec();
    let mut at = 0x1000;
    let rings = sizes.iter().map(|&size| {
        let ring = DriverRing::new(memory, at, size);
        at += DriverRing::bytes(size);
        ring
    });
    rings.collect()
}
