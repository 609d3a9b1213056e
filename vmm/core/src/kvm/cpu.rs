//! The processors: a thread each, which runs the guest until something needs us.
//!
//! ```text
//!            ┌────────────── Gate: Run ──────────────┐
//!   start ──▶│ KVM_RUN ─▶ port or memory access ─▶ Bus │──▶ reset, failure ─▶ Outcome, thread ends
//!            └───┬───────────────────────────────▲───┘
//!      kick: leaves KVM_RUN                      │ Run
//!                ▼                               │
//!         Gate: Pause ── waits ──────────────────┘      Gate: Stop ─▶ thread ends
//! ```
//! Of the processors that there is room for, those beyond the shape's own wait at the gate too, until the shim lets
//! them run: a guest has no more of them than it was given, whatever it does.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use bulkhead_vmm_spec::{Shape, wire::Ended};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use vm_memory::GuestAddress;

use super::{
    Vm,
    vm::{KvmError, refused},
};
use crate::{
    arch::{cpuid, registers},
    bus::Bus,
    outcome::Outcome,
    seccomp::{Filters, Kind},
    sys,
};

/// What the processors are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Run,
    Pause,
    Stop,
}

#[derive(Debug)]
struct Crowd {
    wish: Wish,
    /// So many may run, the first ones.
    allowed: usize,
    /// Threads that have not ended.
    alive: usize,
    /// Of these, how many wait at the gate.
    held: usize,
}

impl Crowd {
    /// Whether the processor `id` has to wait.
    fn holds(&self, id: usize) -> bool {
        match self.wish {
            Wish::Run => id >= self.allowed,
            Wish::Pause => true,
            Wish::Stop => false,
        }
    }
}

/// Lets the processors run, or holds them.
#[derive(Debug)]
pub(crate) struct Gate {
    crowd: Mutex<Crowd>,
    changed: Condvar,
}

impl Gate {
    fn new(cpus: usize, allowed: usize) -> Self {
        let crowd = Crowd { wish: Wish::Pause, allowed, alive: cpus, held: 0 };
        Self { crowd: Mutex::new(crowd), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Crowd> {
        self.crowd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers how many are in the guest, and have to be kicked to hear of it.
    fn wish(&self, wish: Wish) -> usize {
        let mut crowd = self.lock();
        crowd.wish = wish;
        self.changed.notify_all();
        crowd.alive - crowd.held
    }

    /// Called by a processor between two runs: answers `false` when it is to end.
    fn pass(&self, id: usize) -> bool {
        let mut crowd = self.lock();
        if crowd.holds(id) {
            crowd.held += 1;
            self.changed.notify_all();
            while crowd.holds(id) {
                crowd = self.changed.wait(crowd).unwrap_or_else(PoisonError::into_inner);
            }
            crowd.held -= 1;
        }
        crowd.wish == Wish::Run
    }

    /// Waits until every processor is held or has ended. They were kicked, so this takes as long as an exit.
    fn all_held(&self) {
        let mut crowd = self.lock();
        while crowd.held < crowd.alive && crowd.wish == Wish::Pause {
            crowd = self.changed.wait(crowd).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn left(&self) {
        self.lock().alive -= 1;
        self.changed.notify_all();
    }

    fn allow(&self, count: usize) {
        self.lock().allowed = count;
        self.changed.notify_all();
    }
}

macro_rules! exit_counts {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// How often the processors needed us, by reason.
        #[derive(Debug, Default)]
        pub(crate) struct ExitCounts { $($(#[$doc])* $name: AtomicU64),+ }

        impl ExitCounts {
            /// Every count by its name.
            pub(crate) fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed))),+]
            }
        }
    };
}

exit_counts! {
    /// Reads of a port.
    port_reads,
    /// Writes of a port.
    port_writes,
    /// Reads of a device's memory.
    mmio_reads,
    /// Writes of a device's memory.
    mmio_writes,
    /// Kicks of ours, and signals.
    interruptions,
    /// Anything else.
    others,
}

/// All processors of the machine.
pub(crate) struct Cpus {
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
    counts: Arc<ExitCounts>,
}

impl Cpus {
    /// Makes the processors that `shape` has room for and a thread for each, held until [`Cpus::run`]; those beyond its
    /// own for longer.
    ///
    /// # Errors
    /// KVM refuses one, or no thread can be made.
    pub(crate) fn new(
        kvm: &Kvm,
        vm: &Vm,
        shape: &Shape,
        entry: GuestAddress,
        bus: &Arc<Bus>,
        outcome: &Arc<Outcome>,
        filters: &Arc<Filters>,
    ) -> Result<Self, KvmError> {
        let room = shape.max_vcpus;
        let gate = Arc::new(Gate::new(room as usize, shape.vcpus as usize));
        let counts = Arc::new(ExitCounts::default());
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("tell what processors it has"))?;
        // Made one after the other before any thread runs: KVM wants ids in order, and a failure here
        // leaves nothing that runs.
        let fds = (0..room).map(|id| make(vm, id, room, &supported, entry)).collect::<Result<Vec<_>, _>>()?;
        let mut threads = Vec::new();
        for (id, fd) in fds.into_iter().enumerate() {
            let cpu = Cpu {
                id,
                fd,
                gate: gate.clone(),
                counts: counts.clone(),
                bus: bus.clone(),
                outcome: outcome.clone(),
            };
            let filters = filters.clone();
            let thread =
                std::thread::Builder::new().name(format!("cpu{id}")).spawn(move || cpu.run(&filters));
            threads.push(
                thread
                    .map_err(|source| KvmError::Refused { what: "get a thread for a processor", source })?,
            );
        }
        Ok(Self { threads, gate, counts })
    }

    /// Lets the processors run.
    pub(crate) fn run(&self) {
        self.gate.wish(Wish::Run);
    }

    /// Holds the processors; when this returns, none is in the guest.
    pub(crate) fn pause(&self) {
        self.gate.wish(Wish::Pause);
        self.threads.iter().for_each(sys::kick);
        self.gate.all_held();
    }

    /// Lets the first `count` of them run, and holds the others.
    ///
    /// # Errors
    /// There are not so many, or it would be none.
    pub(crate) fn let_run(&self, count: u32) -> Result<(), String> {
        let (count, room) = (count as usize, self.threads.len());
        if count == 0 || count > room {
            return Err(format!("{count} processors of a machine that has room for {room}"));
        }
        self.gate.allow(count);
        // Those that run learn it at the gate.
        self.threads[count..].iter().for_each(sys::kick);
        Ok(())
    }

    /// What they needed us for.
    pub(crate) fn counts(&self) -> &ExitCounts {
        &self.counts
    }
}

impl Drop for Cpus {
    fn drop(&mut self) {
        // A guest that ended by itself leaves nobody to interrupt.
        if self.gate.wish(Wish::Stop) > 0 {
            self.threads.iter().for_each(sys::kick);
        }
        for thread in self.threads.drain(..) {
            // A processor that panicked has told so already.
            let _ = thread.join();
        }
    }
}

fn make(
    vm: &Vm,
    id: u32,
    count: u32,
    supported: &kvm_bindings::CpuId,
    entry: GuestAddress,
) -> Result<VcpuFd, KvmError> {
    let fd = vm.fd.create_vcpu(u64::from(id)).map_err(refused("make a processor"))?;
    let mut cpuid = supported.clone();
    let deadline = vm.fd.check_extension(Cap::TscDeadlineTimer);
    cpuid::shape(&mut cpuid, cpuid::Place { id, cpus: count }, deadline);
    fd.set_cpuid2(&cpuid).map_err(refused("shape a processor"))?;
    let set = |source| KvmError::Refused { what: "set a processor's registers", source };
    registers::set_msrs(&fd).map_err(set)?;
    // The others wait in the kernel for the first one's start-up interrupt (INIT, SIPI).
    if id == 0 {
        registers::boot(&fd, entry).map_err(refused("set the first processor's registers"))?;
    }
    Ok(fd)
}

/// One processor on its thread.
struct Cpu {
    id: usize,
    fd: VcpuFd,
    gate: Arc<Gate>,
    counts: Arc<ExitCounts>,
    bus: Arc<Bus>,
    outcome: Arc<Outcome>,
}

impl Drop for Cpu {
    fn drop(&mut self) {
        sys::kick_leaves(None);
        self.gate.left();
    }
}

impl Cpu {
    fn run(mut self, filters: &Filters) {
        let outcome = self.outcome.clone();
        let ended = self.work(filters);
        // First: whoever hears of the end finds the processor gone.
        drop(self);
        if let Some(ended) = ended {
            outcome.end(ended);
        }
    }

    /// Runs the guest until it ends (answers how) or the processor is to stop.
    fn work(&mut self, filters: &Filters) -> Option<Ended> {
        // Before the filter: it needs nothing more from the system than what the filter allows.
        sys::kick_leaves(Some(self.fd.get_kvm_run()));
        if let Err(error) = filters.apply(Kind::Cpu) {
            let text = format!("cannot install the filter of a processor: {error}");
            return Some(Ended::Failure(text));
        }
        while self.gate.pass(self.id) {
            if let Some(ended) = self.enter() {
                return Some(ended);
            }
        }
        None
    }

    /// Runs the guest until it needs us, and does what it needs.
    fn enter(&mut self) -> Option<Ended> {
        let one = |count: &AtomicU64| count.fetch_add(1, Ordering::Relaxed);
        let failure = |what: String| Some(Ended::Failure(what));
        let (bus, counts) = (&self.bus, &self.counts);
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                one(&counts.port_reads);
                bus.read_port(port, data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                one(&counts.port_writes);
                bus.write_port(port, data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                one(&counts.mmio_reads);
                bus.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                one(&counts.mmio_writes);
                bus.write(address, data);
            }
            // A triple fault: how Linux restarts (reboot=t), and how a wounded guest ends.
            Ok(VcpuExit::Shutdown) => return Some(Ended::Guest),
            Ok(VcpuExit::SystemEvent(..)) => return Some(Ended::Guest),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return failure(format!(
                    "the processor refuses to enter the guest: reason {reason:#x} on cpu {cpu}"
                ));
            }
            Ok(VcpuExit::InternalError) => return failure("KVM cannot emulate what the guest does".into()),
            Ok(other) => {
                let text = format!("{other:?}");
                one(&counts.others);
                return failure(format!("KVM left the guest for a reason that nobody handles: {text}"));
            }
            Err(error) if error.errno() == libc::EINTR => {
                one(&counts.interruptions);
                self.fd.set_kvm_immediate_exit(0);
            }
            Err(error) if error.errno() == libc::EAGAIN => {
                one(&counts.others);
            }
            Err(error) => return failure(format!("KVM cannot run the guest: {error}")),
        }
        None
    }
}
