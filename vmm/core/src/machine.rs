//! The machine on one page: what it is made of, in which order, and how it is told what to do.
//!
//! ```text
//!  Boot ─▶ jail ─▶ memory ─▶ devices ─▶ kernel into memory ─▶ processors ─▶ filters ─▶ Reply ─▶ loop
//! ```

use std::{
    fs::File,
    io,
    os::{
        fd::RawFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use bulkhead_virtio::{
    balloon::Balloon,
    block::{Block, BlockConfig, EngineChoice},
    fs::Fs,
    mem::{BLOCK_SIZE, Mem, MemConfig},
    net::{Net, NetConfig},
    rng::Rng,
    vsock::{Dialer, Vsock},
};
use bulkhead_vmm_spec::Shape;
use bulkhead_vmm_spec::wire::{Boot, Event, Message, status};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    arch::{layout, mptable},
    boot,
    bus::Bus,
    control::{self, Control},
    devices::{self, Assembly, Found, Inventory, Loop, MAX_WINDOWS, Shared},
    door::{Attached, Door},
    jail,
    kvm::{Cpus, Growth, Vm},
    legacy::{Console, Ports, SharedLog},
    memory::GuestMemoryMap,
    outcome::Outcome,
    seccomp::{Filters, Kind},
    sys,
};

/// The guest's address on its vsock device: each machine has a device of its own, so that all have the same.
const GUEST_CID: u64 = 3;
/// Rings for requests to the share. One: the pod's processes share a daemon that has one thread as well.
const SHARE_QUEUES: u16 = 1;
/// The least memory that a kernel starts in, and the most that makes sense, in MiB.
const MIN_MEMORY_MIB: u64 = 32;
const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Windows that are not counted in a shape: vsock, share, entropy, balloon and memory.
const OWN_WINDOWS: usize = 5;

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// The first message did not come, or was not one.
    #[error("the first message on the control socket: {0}")]
    Boot(io::Error),
    /// A shape that no machine has.
    #[error("{0}")]
    Shape(String),
    /// The wall does not stand.
    #[error("jail: {0}")]
    Jail(#[from] jail::JailError),
    /// KVM refuses.
    #[error(transparent)]
    Kvm(#[from] crate::kvm::KvmError),
    /// The guest cannot be put into memory.
    #[error(transparent)]
    Load(#[from] boot::BootError),
    /// Something that it stands on.
    #[error("cannot {what}: {source}")]
    Part {
        /// What was tried.
        what: &'static str,
        /// What came of it.
        source: io::Error,
    },
}

/// Names what was tried.
pub(crate) fn part(what: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Part { what, source }
}

/// A machine that is made, with its processors held.
pub(crate) struct Machine {
    pub(crate) cpus: Cpus,
    pub(crate) bus: Arc<Bus>,
    pub(crate) inventory: Inventory,
    pub(crate) told: Told,
    pub(crate) outcome: Arc<Outcome>,
    pub(crate) console: SharedLog,
}

/// The devices that commands are about.
pub(crate) struct Told {
    pub(crate) vsock: Arc<Mutex<Vsock>>,
    pub(crate) balloon: Arc<Mutex<Balloon>>,
    /// Where the shape leaves room for more memory.
    pub(crate) growth: Option<Arc<Mutex<Mem>>>,
}

/// Makes the machine that the shim asks for at `fd` and runs it to its end. Answers the exit status.
///
/// # Errors
/// There is no machine, and the shim was told why.
pub(crate) fn serve(fd: RawFd) -> Result<i32, MachineError> {
    let door = Door::at(fd).map_err(MachineError::Boot)?;
    let Some((boot, attached)) = door.receive::<Boot>(true).map_err(MachineError::Boot)? else {
        return Ok(status::ORPHANED);
    };
    match make(&boot, attached, &door) {
        Ok((control, devices)) => control::run(control, devices),
        Err(error) => {
            let _ = door.say(&Message::Reply { id: 0, result: Err(error.to_string()) });
            Err(error)
        }
    }
}

/// Checks what no machine can be.
fn check(boot: &Boot) -> Result<(), MachineError> {
    let (shape, slots) = (&boot.shape, &boot.slots);
    let refuse = |text: String| Err(MachineError::Shape(text));
    if shape.vcpus == 0 || shape.max_vcpus < shape.vcpus || shape.max_vcpus > mptable::MAX_CPUS {
        let (now, later, most) = (shape.vcpus, shape.max_vcpus, mptable::MAX_CPUS);
        return refuse(format!("{now} of {later} processors: a machine has 1 to {most}"));
    }
    let (memory, growth) = (shape.memory.0, shape.growth.0);
    if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&memory) || growth > MAX_MEMORY_MIB {
        return refuse(format!(
            "{memory} MiB of memory and {growth} to grow by: a machine has {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB"
        ));
    }
    if shape.growth.bytes() % layout::GROWTH_ALIGN != 0 {
        return refuse(format!("{growth} MiB of memory to grow by: it grows in steps of 128 MiB"));
    }
    if shape.blocks.len() != slots.blocks.len() || shape.nets.len() != slots.nets.len() {
        return refuse("a disk or a network card without its backing: each needs one".into());
    }
    if shape.share_tag.is_some() != slots.share.is_some() {
        return refuse("a share without its other half: it needs a tag and a connection".into());
    }
    let windows = OWN_WINDOWS + shape.blocks.len() + shape.nets.len() + shape.spare_slots as usize;
    if windows > MAX_WINDOWS {
        return refuse(format!("{windows} device slots: a machine has {MAX_WINDOWS}"));
    }
    Ok(())
}

/// Everything up to the first instruction.
fn make(boot: &Boot, mut attached: Attached, door: &Door) -> Result<(Control, Vec<Shared>), MachineError> {
    check(boot)?;
    jail::enter(boot.identity)?;
    sys::prepare_kick().map_err(part("handle signals"))?;
    let (shape, slots) = (&boot.shape, &boot.slots);

    let (vm, kvm) = Vm::new(attached.take(slots.kvm, "/dev/kvm").map_err(MachineError::Boot)?)?;
    let map = GuestMemoryMap::new(shape.memory, shape.growth, shape.share_tag.is_some())
        .map_err(part("map the guest's memory"))?;
    let take = |attached: &mut Attached, slot, what| attached.take(slot, what).map(File::from);
    let mut kernel = take(&mut attached, slots.kernel, "the kernel").map_err(MachineError::Boot)?;
    let mut initrd = take(&mut attached, slots.initrd, "the initrd").map_err(MachineError::Boot)?;
    let warm = warm(&map, shape, &mut kernel, &mut initrd).map_err(part("prepare the guest's memory"))?;
    let boot_end = if map.growth.is_empty() { u64::MAX } else { map.growth.start };
    let first_slot = vm.add_memory(&map.memory, boot_end)?;

    let mut devices = Assembly::new(vm.clone(), map.memory.clone());
    let told = add_devices(&mut devices, boot, &mut attached, door, &map, first_slot)?;
    let words = devices.words();
    let words = boot::Words { devices: &words };
    let entry = boot::load(&map.memory, shape, &mut kernel, &mut initrd, &words)?;
    drop((kernel, initrd, attached));

    let (ports, console, outcome) = ports(&vm)?;
    let (main, threads) = (std::mem::take(&mut devices.main), std::mem::take(&mut devices.threads));
    let (windows, inventory) = devices.finish();
    let bus = Arc::new(Bus::new(ports, windows));
    let filters = Arc::new(Filters::new().map_err(part("handle violations of filters"))?);
    for (name, device) in threads {
        start_loop(name, device, &filters, &outcome).map_err(part("start a device's thread"))?;
    }
    // A panic of it has told so; its work was a hint.
    let _ = warm.join();
    let cpus = Cpus::new(&kvm, &vm, shape, entry, &bus, &outcome, &filters)?;
    let machine = Machine { cpus, bus, inventory, told, outcome, console };
    Ok((Control::new(machine, door.clone(), filters), main))
}

/// Has the guest's first pages made ready beside the rest of the work.
fn warm(
    map: &GuestMemoryMap,
    shape: &Shape,
    kernel: &mut File,
    initrd: &mut File,
) -> io::Result<JoinHandle<()>> {
    // What is wrong with a file is told when it is read.
    let size = |file: &mut File| boot::size_of(file).unwrap_or(0);
    let (kernel, initrd) = (size(kernel), size(initrd));
    map.warm(shape.memory, kernel, boot::initrd_range(shape.memory.bytes(), initrd).unwrap_or(0..0))
}

/// The PC's own ports, with the serial port on standard output.
fn ports(vm: &Vm) -> Result<(Ports, SharedLog, Arc<Outcome>), MachineError> {
    let outcome = Arc::new(Outcome::new().map_err(part("make an eventfd"))?);
    let irq = EventFd::new(EFD_NONBLOCK).map_err(part("make an eventfd"))?;
    vm.add_line(&irq, layout::SERIAL_IRQ)?;
    let out = sys::standard_output().map_err(part("open the console"))?;
    let (console, log) = Console::new(Box::new(out));
    let reset = outcome.event().try_clone().map_err(part("make an eventfd"))?;
    Ok((Ports::new(irq, reset, console), log, outcome))
}

/// Makes the devices in the order of their windows, which a guest sees as the order of its disks and cards.
fn add_devices(
    devices: &mut Assembly,
    boot: &Boot,
    attached: &mut Attached,
    door: &Door,
    map: &GuestMemoryMap,
    first_slot: u32,
) -> Result<Told, MachineError> {
    let (shape, slots) = (&boot.shape, &boot.slots);
    let listener =
        UnixListener::from(attached.take(slots.vsock, "the vsock device").map_err(MachineError::Boot)?);
    let dialer = Box::new(Broker(door.clone()));
    let vsock = Vsock::new(GUEST_CID, Some(listener), dialer).map_err(part("make the vsock device"))?;
    let vsock = devices.add("vsock", vsock, Loop::Own("vsock"), Found::AtBoot)?;
    if let (Some(tag), Some(slot)) = (&shape.share_tag, slots.share) {
        let socket = UnixStream::from(attached.take(slot, "the share").map_err(MachineError::Boot)?);
        let fs = Fs::new(tag, socket, SHARE_QUEUES).map_err(part("agree with virtiofsd on the share"))?;
        devices.add("share", fs, Loop::Main, Found::Later)?;
    }
    let giver = || map.giver().map_err(part("share the guest's memory"));
    let balloon = Balloon::new(Box::new(giver()?)).map_err(part("make the balloon"))?;
    let balloon = devices.add("balloon", balloon, Loop::Main, Found::Later)?;
    let growth =
        match Growth::new(devices.vm().clone(), &map.memory, giver()?, map.growth.clone(), first_slot) {
            Some(backing) => {
                let (start, size) = (map.growth.start, map.growth.end - map.growth.start);
                let window = MemConfig { start, size, block_size: BLOCK_SIZE };
                let mut mem = Mem::new(window, Box::new(backing)).map_err(part("make the memory device"))?;
                let door = door.clone();
                mem.tell_changes(move |growth_bytes| door.tell(Event::Grown { growth_bytes }));
                Some(devices.add("mem", mem, Loop::Main, Found::Later)?)
            }
            None => None,
        };
    let rng = Rng::new(sys::random).map_err(part("make the entropy source"))?;
    devices.add("rng", rng, Loop::Main, Found::Later)?;
    for (n, (block, &slot)) in shape.blocks.iter().zip(&slots.blocks).enumerate() {
        let file = File::from(attached.take(slot, "a disk").map_err(MachineError::Boot)?);
        let disk = disk(file, block).map_err(part("make a disk"))?;
        devices.add(format!("block{n}"), disk, Loop::Own("block"), Found::Later)?;
    }
    for (n, (net, slots)) in shape.nets.iter().zip(&slots.nets).enumerate() {
        let tap = File::from(attached.take(slots.tap, "a network card").map_err(MachineError::Boot)?);
        let vhost = slots.vhost.map(|slot| attached.take(slot, "a network card").map(File::from));
        let vhost = vhost.transpose().map_err(MachineError::Boot)?;
        let card = Net::new(NetConfig { tap, mac: net.mac, mtu: net.mtu, vhost });
        let card = card.map_err(part("make a network card"))?;
        devices.add(format!("net{n}"), card, Loop::Own("net"), Found::Later)?;
    }
    devices.spare(shape.spare_slots);
    Ok(Told { vsock, balloon, growth })
}

/// A disk on an open file.
pub(crate) fn disk(file: File, shape: &bulkhead_vmm_spec::BlockShape) -> io::Result<Block> {
    Block::new(BlockConfig {
        file,
        read_only: shape.read_only,
        serial: shape.serial.clone(),
        engine: EngineChoice::default(),
    })
}

/// Gives a device a thread of its own, bound to its filter.
fn start_loop(
    name: String,
    device: Shared,
    filters: &Arc<Filters>,
    outcome: &Arc<Outcome>,
) -> io::Result<()> {
    let (filters, outcome) = (filters.clone(), outcome.clone());
    let what = name.clone();
    let body = move || {
        let ended = devices::run_alone(device, || {
            filters.apply(Kind::Io).map_err(|e| io::Error::other(format!("cannot install its filter: {e}")))
        });
        if let Err(error) = ended {
            let text = format!("the event loop of {what}: {error}");
            outcome.end(bulkhead_vmm_spec::wire::Ended::Failure(text));
        }
    };
    std::thread::Builder::new().name(name).spawn(body).map(drop)
}

/// Has the shim connect in our place: this process opens nothing.
struct Broker(Door);

impl Dialer for Broker {
    fn dial(&mut self, id: u64, port: u32) {
        self.0.tell(Event::Dial { dial: id, port });
    }
}
