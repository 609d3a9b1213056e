//! Machines on KVM: our own `bulkhead-vmm`, one jailed process each.
//! Knows its messages and what it must be given; knows nothing of what the guest does.
//!
//! ```text
//!  shim ─┬─ virtiofsd       is given a listening socket
//!        └─ bulkhead-vmm    is given everything by one message: /dev/kvm, kernel, initrd, disks, taps, the
//!            ▲   │          listening vsock socket, a connection to virtiofsd; it opens nothing itself
//!            │   └ Dial{port} ─▶ broker: connects to <vsock>_<port> and hands the stream back
//!            └──── commands, replies, events: one packet each
//! ```
//! * The VMM is the first process of a pid namespace of its own, and makes the rest of its jail itself.
//! * The guest's console is the VMM's standard output, as with QEMU.
//! * The VMM ends when the control socket does, and by PR_SET_PDEATHSIG: nothing runs that nobody watches.

mod broker;
mod channel;
mod files;
#[cfg(test)]
mod tests;

use std::{
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::PathBuf,
    sync::Arc,
};

use async_trait::async_trait;
use bulkhead_vmm_spec::{
    Bindings, Shape, SizeMib,
    wire::{Answer, Boot, Command, Identity, Message, NetSlots, Slot, Slots},
};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::task::JoinHandle;

pub use self::broker::CommandError;
use self::{broker::Broker, channel::Channel};
use crate::{
    Drives, Growth, Hypervisor, Journal, LaunchError, Machine, MachineEnd, Meter, Processors,
    child::{Child, ChildSpec, Network},
    family::{Console, Family},
    helper::{HELPER_DEADLINE, ended, late, record, spawn},
    network, share,
    socket::{self, Names},
};

/// The VMM's name in journals, errors and [`MachineEnd::part`].
pub const VMM: &str = "bulkhead-vmm";

/// The smallest memory with which a machine is launched; see [`crate::qemu::MINIMUM_MEMORY`].
pub const MINIMUM_MEMORY: SizeMib = crate::qemu::MINIMUM_MEMORY;

/// The first of the user and group ids that machines run as: this and the launching process's pid, which is
/// unlike that of any other living process. pid_max is at most 2^22, so the range ends below 2^31; the ids
/// lie beyond those that systemd and container engines hand out (systemd, "Users, Groups, UIDs and GIDs").
const FIRST_ID: u32 = 1_900_000_000;

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct BuiltinConfig {
    /// `bulkhead-vmm`.
    pub vmm: PathBuf,
    /// `virtiofsd`, 1.14 or later (the Rust program).
    pub virtiofsd: PathBuf,
}

impl Default for BuiltinConfig {
    fn default() -> Self {
        Self { vmm: VMM.into(), virtiofsd: share::VIRTIOFSD.into() }
    }
}

/// The backend for hardware virtualisation.
#[derive(Clone, Debug, Default)]
pub struct Builtin {
    config: BuiltinConfig,
}

impl Builtin {
    /// A backend that uses these programs.
    pub fn new(config: BuiltinConfig) -> Self {
        Self { config }
    }
}

/// Descriptors for a message, each with its slot.
#[derive(Default)]
struct Parcel(Vec<OwnedFd>);

impl Parcel {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> Slot {
        self.0.push(fd.into());
        Slot(self.0.len() - 1)
    }
}

#[async_trait]
impl Hypervisor for Builtin {
    fn name(&self) -> &'static str {
        "kvm"
    }

    async fn launch(
        &self,
        shape: &Shape,
        bindings: &Bindings,
        journal: &dyn Journal,
    ) -> Result<Box<dyn Machine>, LaunchError> {
        Ok(Box::new(self.launch_builtin(shape, bindings, journal).await?))
    }
}

impl Builtin {
    /// As [`Hypervisor::launch`], and the machine can be told more than other backends' can.
    ///
    /// # Errors
    /// As [`Hypervisor::launch`].
    pub async fn launch_builtin(
        &self,
        shape: &Shape,
        bindings: &Bindings,
        journal: &dyn Journal,
    ) -> Result<BuiltinMachine, LaunchError> {
        files::check(shape, bindings)?;
        let mut parcel = Parcel::default();
        let kvm = parcel.add(files::kvm()?);
        let kernel = parcel.add(files::regular("kernel", &bindings.kernel)?);
        let initrd = parcel.add(files::regular("initrd", &bindings.initrd)?);
        let mut blocks = Vec::new();
        for (block, binding) in shape.blocks.iter().zip(&bindings.blocks) {
            blocks.push(parcel.add(files::disk(&binding.path, block.read_only)?));
        }
        let mut nets = Vec::new();
        for net in &bindings.nets {
            let tap = parcel.add(network::tap(net)?);
            nets.push(NetSlots { tap, vhost: files::vhost_net().map(|fd| parcel.add(fd)) });
        }

        // An error below drops what was started, the last first: it is ended and reaped, then its sockets go.
        let sockets = Names(vec![bindings.vsock.clone()]);
        let vsock = listen(bindings)?;
        let vsock = parcel.add(vsock);
        let (virtiofsd, connection) = match &bindings.share {
            Some(share) => {
                let (child, fd) = share::start(&self.config.virtiofsd, share, &bindings.run_dir, journal)?;
                (Some(child), Some(fd))
            }
            None => (None, None),
        };
        let share = connection.map(|fd| parcel.add(fd));
        let slots = Slots { kvm, kernel, initrd, vsock, share, blocks, nets };
        let id = FIRST_ID + std::process::id();
        let identity = Identity { uid: id, gid: id, in_pod_network: bindings.netns.is_some() };
        let boot = Boot { shape: shape.clone(), slots, identity };

        let (console, stdout) = Console::new(journal.console());
        let (mut vmm, channel) = self.start(stdout, network::of_vmm(bindings)?)?;
        record(&vmm, journal)?;
        self.boot(&mut vmm, &channel, &boot, &parcel).await?;
        let broker = Arc::new(Broker::new(channel, bindings.vsock.clone()));
        let attendant = tokio::spawn({
            let broker = broker.clone();
            async move { broker.attend().await }
        });
        let growth = (shape.growth.0 > 0).then(|| Growth::Asked(broker.clone()));
        let drives = (shape.spare_slots > 0).then(|| broker.clone() as Arc<dyn Drives>);
        let family = Family::new(vmm, virtiofsd.into_iter().collect(), console, sockets)
            .with_growth(growth)
            .with_drives(drives);
        Ok(BuiltinMachine { family, broker, attendant })
    }

    /// Starts the program, which waits for its first message.
    fn start(
        &self,
        stdout: crate::child::LineSink,
        network: Network,
    ) -> Result<(Child, Channel), LaunchError> {
        let failed = |e: nix::Error| LaunchError::system("make a control socket", e);
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).map_err(failed)?;
        let channel = Channel::new(ours).map_err(|e| LaunchError::system("watch a control socket", e))?;
        let mut spec = ChildSpec::new(VMM, &self.config.vmm);
        spec.args = vec!["--control-fd".into(), theirs.as_raw_fd().to_string().into()];
        spec.fds = vec![theirs];
        spec.stdout = stdout;
        spec.network = network;
        spec.own_pids = true;
        Ok((spawn(spec)?, channel))
    }

    /// Sends the first message, and waits for the answer to it.
    async fn boot(
        &self,
        vmm: &mut Child,
        channel: &Channel,
        boot: &Boot,
        parcel: &Parcel,
    ) -> Result<(), LaunchError> {
        const GOAL: &str = "a running guest";
        let fds: Vec<_> = parcel.0.iter().map(AsFd::as_fd).collect();
        let sent = channel.send(boot, &fds).await;
        let answered = async {
            loop {
                match channel.receive().await? {
                    Some(Message::Reply { id: 0, result }) => return Ok(Some(result)),
                    Some(_) => {}
                    None => return Ok::<_, std::io::Error>(None),
                }
            }
        };
        let answer = match tokio::time::timeout(HELPER_DEADLINE, answered).await {
            Ok(answer) => answer,
            Err(_) => return Err(late(vmm, GOAL)),
        };
        match (sent, answer) {
            (Ok(()), Ok(Some(Ok(_)))) => Ok(()),
            (_, Ok(Some(Err(reason)))) => {
                Err(LaunchError::Impossible { what: "this machine".into(), reason })
            }
            // It closed the socket: it ended, and its last words say why.
            _ => match tokio::time::timeout(HELPER_DEADLINE, vmm.exited()).await {
                Ok(exit) => {
                    vmm.read_rest().await;
                    Err(ended(vmm, exit, GOAL))
                }
                Err(_) => Err(late(vmm, GOAL)),
            },
        }
    }
}

/// Makes the host's side of the vsock device.
fn listen(bindings: &Bindings) -> Result<UnixListener, LaunchError> {
    let path = &bindings.vsock;
    let failed = |e| LaunchError::system(format!("make a socket at {}", path.display()), e);
    socket::remove(path).map_err(failed)?;
    let listener = UnixListener::bind(path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// A VMM, its helpers, and the task that serves its events.
pub struct BuiltinMachine {
    family: Family,
    broker: Arc<Broker>,
    attendant: JoinHandle<()>,
}

impl BuiltinMachine {
    /// Tells the machine to do something; `fds` are what the command's slots name.
    ///
    /// # Errors
    /// It refuses, does not answer, or is gone.
    pub async fn command(&self, command: Command, fds: &[BorrowedFd<'_>]) -> Result<Answer, CommandError> {
        self.broker.command(command, fds).await
    }
}

#[async_trait]
impl Machine for BuiltinMachine {
    fn pid(&self) -> i32 {
        self.family.pid()
    }

    fn processes(&self) -> Vec<(String, i32)> {
        self.family.processes()
    }

    fn meter(&self) -> Option<Arc<dyn Meter>> {
        Some(self.broker.clone())
    }

    fn processors(&self) -> Option<Arc<dyn Processors>> {
        Some(self.broker.clone())
    }

    fn growth(&self) -> Option<Growth> {
        self.family.growth()
    }

    fn drives(&self) -> Option<Arc<dyn Drives>> {
        self.family.drives()
    }

    async fn ended(&mut self) -> MachineEnd {
        self.family.ended().await
    }

    async fn kill(&mut self) {
        self.family.kill().await;
        self.attendant.abort();
    }
}

impl Drop for BuiltinMachine {
    fn drop(&mut self) {
        self.attendant.abort();
    }
}
