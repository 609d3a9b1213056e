//! The two traits that every backend fulfils, and what they hand over.
//! Knows no backend.

use std::{collections::BTreeMap, error::Error, fmt, io, sync::Arc, time::Duration};

use async_trait::async_trait;
use bulkhead_vmm_spec::{Bindings, BlockBinding, BlockShape, Shape};

use crate::{Exit, LaunchError, child::LineSink, qemu::Kept};

/// Remembers processes beyond the life of this one, so that a later process can end what was left.
pub trait Journal: Send + Sync {
    /// Records a process: what it is, its pid, and its start time in clock ticks since boot
    /// (field 22 of `/proc/<pid>/stat`), which together name it for good. When this fails the
    /// process is ended at once.
    fn process(&self, name: &str, pid: i32, start_time_ticks: u64) -> io::Result<()>;

    /// Takes each line of the guest's console from the launch on. None: nobody wants them.
    fn console(&self) -> Option<LineSink> {
        None
    }
}

/// What a VMM counts: figures that only grow, by device and name.
pub type Counts = BTreeMap<String, BTreeMap<String, u64>>;

/// Asks a running VMM for what it counts.
#[async_trait]
pub trait Meter: Send + Sync {
    /// The figures now. The VMM is not trusted to answer soon, nor with names that make sense.
    async fn read(&self) -> Result<Counts, Box<dyn std::error::Error + Send + Sync>>;
}

/// Memory that a running machine can be given beyond that of its boot, and how.
#[derive(Clone)]
pub enum Growth {
    /// The guest takes and gives back by itself what it is asked to have (virtio-mem).
    Asked(Arc<dyn Ask>),
    /// It is kept back in blocks; the guest must be told which of them are there.
    Kept(Arc<Kept>),
}

/// Asks a running VMM for another amount of memory.
#[async_trait]
pub trait Ask: Send + Sync {
    /// Asks the guest to have `bytes` beyond the memory of its boot. Answers what it has once that is what was
    /// asked for, or when it has had its time.
    async fn ask(&self, bytes: u64, patience: Duration) -> Result<u64, Box<dyn Error + Send + Sync>>;
}

/// Has a running VMM let the guest use another number of processors.
#[async_trait]
pub trait Processors: Send + Sync {
    /// Lets `count` of them run, of those that the shape has room for, whatever the guest does. It has to be told of more
    /// of them afterwards, and of fewer before.
    async fn allow(&self, count: u32) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// Gives a running VMM disks, and takes them back. A machine has room for as many as its shape has spare slots.
#[async_trait]
pub trait Drives: Send + Sync {
    /// Has the machine have what is at `binding` as a disk that looks as `shape` says, but for its serial number,
    /// which is answered. The guest finds it when it looks anew at those of its device slots that are empty, or
    /// that have a disk without size.
    async fn attach(
        &self,
        binding: &BlockBinding,
        shape: &BlockShape,
    ) -> Result<Drive, Box<dyn Error + Send + Sync>>;

    /// Takes a disk back, which then is in nobody's hands. The guest ought to have let go of it; one that has not
    /// loses what it had not written.
    async fn detach(&self, slot: u32) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// A disk that was given to a running machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// By which it is taken back.
    pub slot: u32,
    /// By which the guest finds it.
    pub serial: String,
}

/// A way to run machines.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// How configuration and `bulkhead ps` name it.
    fn name(&self) -> &'static str;

    /// Starts a machine and answers when its VMM runs; its guest is then still booting.
    /// After an error nothing of the machine is left.
    async fn launch(
        &self,
        shape: &Shape,
        bindings: &Bindings,
        journal: &dyn Journal,
    ) -> Result<Box<dyn Machine>, LaunchError>;
}

/// A machine that was launched. Dropping it kills it.
#[async_trait]
pub trait Machine: Send {
    /// The VMM's process.
    fn pid(&self) -> i32;

    /// Every process of the machine, the VMM first: name and pid. Empty once they are reaped.
    fn processes(&self) -> Vec<(String, i32)>;

    /// By which the VMM is asked for what it counts. None: it counts nothing.
    fn meter(&self) -> Option<Arc<dyn Meter>> {
        None
    }

    /// By which its processors are held. None: the guest has what its shape has room for.
    fn processors(&self) -> Option<Arc<dyn Processors>> {
        None
    }

    /// How its memory can change, if its shape has left room for that.
    fn growth(&self) -> Option<Growth> {
        None
    }

    /// By which it is given disks while it runs. None: it has no room for any.
    fn drives(&self) -> Option<Arc<dyn Drives>> {
        None
    }

    /// Waits for the first death of any part and says what it was; from then on answers the same at
    /// once. Other parts may still live: [`Machine::kill`] ends them. May be cancelled at any time.
    async fn ended(&mut self) -> MachineEnd;

    /// Ends and reaps all parts and removes their sockets. Bounded in time, and may be repeated.
    async fn kill(&mut self);
}

/// How a machine came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineEnd {
    /// The part that died first, by the name given to the journal.
    pub part: String,
    /// Its exit status.
    pub exit: Exit,
    /// We ended it ourselves, by [`Machine::kill`].
    pub asked: bool,
    /// The line by which the guest's kernel said that it panicked.
    pub panic: Option<String>,
    /// Last lines that the part wrote to standard error.
    pub messages: Vec<String>,
    /// Last lines of the guest's console.
    pub console: Vec<String>,
}

impl MachineEnd {
    /// The VMM ended by itself and in order, as it does when the guest powers off or restarts.
    pub fn is_guest_shutdown(&self, vmm: &str) -> bool {
        self.part == vmm && self.exit == Exit::Code(0) && self.panic.is_none()
    }
}

impl fmt::Display for MachineEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.part, self.exit)?;
        if self.asked {
            f.write_str(" as asked")?;
        }
        if let Some(panic) = &self.panic {
            write!(f, "; guest kernel: {panic}")?;
        }
        if !self.messages.is_empty() {
            write!(f, "; it said: {}", self.messages.join(" | "))?;
        }
        if !self.asked && !self.console.is_empty() {
            write!(f, "; end of the guest's console: {}", self.console.join(" | "))?;
        }
        Ok(())
    }
}
