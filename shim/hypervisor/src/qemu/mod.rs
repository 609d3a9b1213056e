//! Machines in software emulation: QEMU's `microvm` with its TCG translator.
//! Knows QEMU, virtiofsd and vhost-device-vsock; knows nothing of what the guest does.
//!
//! ```text
//!  shim ─┬─ vhost-device-vsock   makes <run_dir>/vhost-vsock (for QEMU) and the host's vsock socket
//!        ├─ virtiofsd            is given a listening socket
//!        └─ qemu                 is given connections to both; the guest's memory is a memfd that
//!                                QEMU shares with them
//! ```
//! * virtiofsd and QEMU wait for nobody: a connection to virtiofsd is made before it runs.
//! * vhost-device-vsock makes its socket itself; that it appears is an event. Meanwhile QEMU tells its
//!   version, by which the processor is chosen.
//! * The guest's console is QEMU's standard output, QEMU's own complaints are on standard error.
//! * A microvm has nothing that comes or goes. Processors that may be wanted later are there from the
//!   start, and the guest leaves them alone; memory that may be wanted later is kept from it (`kept`); disks that may
//!   be wanted later are there without size (`drives`), and by QMP they become something: it is there for nothing
//!   else. A guest that ends restarts by triple fault, QEMU then exits (`-no-reboot`), and a panic is known by its
//!   line on the console.
//! * When the VMM ends, virtiofsd follows by itself; vhost-device-vsock would wait for another.

mod args;
mod cmdline;
mod drives;
mod kept;
mod qmp;
mod tsc;
mod version;

use std::{
    fs::File,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::FileTypeExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use bulkhead_vmm_spec::{Bindings, Shape, SizeMib};

pub use self::kept::{BLOCK, Kept};
pub use self::version::Version;
use self::{args::Wiring, drives::Spares, qmp::Qmp, tsc::Stopwatch};
use crate::{
    Drives, Growth, Hypervisor, Journal, LaunchError, Machine,
    child::{Child, ChildSpec},
    family::{Console, Family},
    helper::{HELPER_DEADLINE, ended, late, record, spawn},
    network, share,
    socket::{self, Names},
};

/// The VMM's name in journals, errors and [`crate::MachineEnd::part`].
pub const QEMU: &str = "qemu";
/// The name of the program behind the vsock device.
pub const VSOCK: &str = "vhost-device-vsock";

/// The smallest memory with which a machine is launched.
///
/// Measured with our kernel (21 MB) and agent (7 MB): 40 MiB are too little for the kernel to unpack
/// its root file system, with 44 the guest says hello. The rest is for its first container to start.
pub const MINIMUM_MEMORY: SizeMib = SizeMib(64);

/// Name of the vsock device's socket in the machine's directory.
const VSOCK_DEVICE_SOCKET: &str = "vhost-vsock";

/// Where the programs are, and how much they may use.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// `qemu-system-x86_64`.
    pub qemu: PathBuf,
    /// `virtiofsd`, 1.14 or later (the Rust program).
    pub virtiofsd: PathBuf,
    /// `vhost-device-vsock`.
    pub vsock: PathBuf,
    /// Most memory for translated code, taken as it is filled: 27 MiB are when the guest has booted.
    /// A buffer that is full is emptied, and all code translated anew: 16 MiB make the boot 10 %
    /// longer. QEMU's own default is an eighth of the host's memory, up to 1 GiB, for each machine.
    pub translation_buffer: SizeMib,
}

impl Default for QemuConfig {
    fn default() -> Self {
        Self {
            qemu: "qemu-system-x86_64".into(),
            virtiofsd: "virtiofsd".into(),
            vsock: "vhost-device-vsock".into(),
            translation_buffer: SizeMib(128),
        }
    }
}

/// The backend for software emulation. Make it early: it measures the host's clock from then on.
#[derive(Clone, Debug)]
pub struct Qemu {
    config: QemuConfig,
    clock: Stopwatch,
}

impl Default for Qemu {
    fn default() -> Self {
        Self::new(QemuConfig::default())
    }
}

impl Qemu {
    /// A backend that uses these programs.
    pub fn new(config: QemuConfig) -> Self {
        Self { config, clock: Stopwatch::start() }
    }

    /// Asks the program for its version.
    pub async fn version(&self) -> Result<Version, LaunchError> {
        let mut asked = ChildSpec::new(QEMU, &self.config.qemu);
        asked.args = vec!["--version".into()];
        let mut child = spawn(asked)?;
        match tokio::time::timeout(HELPER_DEADLINE, child.exited()).await {
            Ok(_) => child.read_rest().await,
            Err(_) => return Err(late(&child, "its version")),
        }
        let found = child.last_output().into_iter().next().unwrap_or_default();
        Version::parse(&found).ok_or_else(|| match child.exit() {
            Some(exit) if exit != crate::Exit::Code(0) => ended(&child, exit, "its version"),
            _ => LaunchError::Version { name: QEMU.into(), path: self.config.qemu.clone(), found },
        })
    }

    async fn start_vsock(
        &self,
        bindings: &Bindings,
        journal: &dyn Journal,
    ) -> Result<(Child, OwnedFd), LaunchError> {
        let device = bindings.run_dir.join(VSOCK_DEVICE_SOCKET);
        let failed = |error| LaunchError::system(format!("await a socket at {}", device.display()), error);
        let awaited = socket::Awaited::new(&device).map_err(failed)?;
        let mut spec = ChildSpec::new(VSOCK, &self.config.vsock);
        spec.args = args::vsock(&device, &bindings.vsock);
        spec.env = vec![("RUST_LOG".into(), "warn".into())];
        let mut child = spawn(spec)?;
        record(&child, journal)?;
        let goal = format!("listening at {}", device.display());
        let connection = tokio::select! {
            connection = awaited.connected() => connection.map_err(failed)?,
            exit = child.exited() => {
                child.read_rest().await;
                return Err(ended(&child, exit, &goal));
            }
            () = tokio::time::sleep(HELPER_DEADLINE) => return Err(late(&child, &goal)),
        };
        Ok((child, connection.into()))
    }
}

#[async_trait]
impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        "emulation"
    }

    async fn launch(
        &self,
        shape: &Shape,
        bindings: &Bindings,
        journal: &dyn Journal,
    ) -> Result<Box<dyn Machine>, LaunchError> {
        check(shape, bindings)?;
        let block_drivers = open_all(bindings)?;
        let taps: Vec<OwnedFd> = bindings.nets.iter().map(network::tap).collect::<Result<_, _>>()?;
        // An error below drops what was started, the last first: it is ended and reaped, then its
        // sockets go. The vsock device makes its own again when QEMU has left.
        let sockets = Names(vec![bindings.vsock.clone(), bindings.run_dir.join(VSOCK_DEVICE_SOCKET)]);
        let share = match &bindings.share {
            Some(share) => Some(share::start(&self.config.virtiofsd, share, &bindings.run_dir, journal)?),
            None => None,
        };
        let (version, (vsock, vsock_connection)) =
            tokio::try_join!(self.version(), self.start_vsock(bindings, journal))?;
        let (virtiofsd, share_connection) = share.unzip();

        let failed = |e| LaunchError::system("make a file for the guest's memory", e);
        let kept = (shape.growth.0 > 0).then(|| Kept::new(shape)).transpose().map_err(failed)?;
        let memory = kept.as_ref().map(Kept::share).transpose().map_err(failed)?;
        let spares = drives::spares(shape);
        let failed = |e| LaunchError::system("make a connection to QEMU", e);
        let (ours, theirs) = match spares.is_empty() {
            true => (None, None),
            false => UnixStream::pair()
                .map(|(ours, theirs)| (Some(ours), Some(OwnedFd::from(theirs))))
                .map_err(failed)?,
        };
        let drives = ours.map(|ours| Qmp::new(ours).map(|qmp| Spares::new(&spares, qmp))).transpose();
        let drives = drives.map_err(failed)?.map(|spares| Arc::new(spares) as Arc<dyn Drives>);
        let wiring = Wiring {
            spares: &spares,
            qmp: theirs.as_ref().map(AsRawFd::as_raw_fd),
            memory: memory.as_ref().map(AsRawFd::as_raw_fd),
            cpu: version.cpu(),
            tsc_khz: self.clock.khz(),
            translation_buffer: self.config.translation_buffer,
            share: share_connection.as_ref().map(AsRawFd::as_raw_fd),
            vsock: vsock_connection.as_raw_fd(),
            block_drivers: &block_drivers,
            taps: taps.iter().map(AsRawFd::as_raw_fd).collect(),
        };
        let (console, stdout) = Console::new(journal.console());
        let mut spec = ChildSpec::new(QEMU, &self.config.qemu);
        spec.args = args::qemu(shape, bindings, &wiring);
        spec.stdout = stdout;
        spec.fds = share_connection
            .into_iter()
            .chain([vsock_connection])
            .chain(taps)
            .chain(memory)
            .chain(theirs)
            .collect();
        spec.network = network::of_vmm(bindings)?;
        let qemu = spawn(spec)?;
        record(&qemu, journal)?;
        let helpers = virtiofsd.into_iter().chain([vsock]).collect();
        let growth = kept.map(|kept| Growth::Kept(Arc::new(kept)));
        Ok(Box::new(Family::new(qemu, helpers, console, sockets).with_growth(growth).with_drives(drives)))
    }
}

/// Refuses what no machine of this backend can be.
fn check(shape: &Shape, bindings: &Bindings) -> Result<(), LaunchError> {
    let impossible = |what: String, reason: String| Err(LaunchError::Impossible { what, reason });
    if shape.memory < MINIMUM_MEMORY {
        return Err(LaunchError::MemoryTooSmall { asked: shape.memory, minimum: MINIMUM_MEMORY });
    }
    if shape.vcpus == 0 || shape.max_vcpus < shape.vcpus || shape.max_vcpus > MAX_VCPUS {
        return impossible(
            format!("a machine of {} to {} processors", shape.vcpus, shape.max_vcpus),
            format!("this backend makes 1 to {MAX_VCPUS}"),
        );
    }
    if !shape.growth.0.is_multiple_of(BLOCK.0) {
        return impossible(
            format!("a machine that grows by {} MiB", shape.growth.0),
            format!("memory comes in blocks of {} MiB", BLOCK.0),
        );
    }
    let longest = cmdline::MAX_LEN - cmdline::RESERVED_LEN;
    if shape.cmdline.len() > longest {
        return impossible(
            format!("{} bytes of kernel parameters", shape.cmdline.len()),
            format!("there is room for {longest}"),
        );
    }
    // virtio 1.2, 5.11.4 and 5.2.6.1.
    match &shape.share_tag {
        Some(tag) if tag.is_empty() || tag.len() > 36 => {
            return impossible(format!("a share tagged {tag:?}"), "a tag has 1 to 36 bytes".into());
        }
        tag if tag.is_some() != bindings.share.is_some() => {
            return impossible(
                "a share without its other half".into(),
                "it needs a tag and a directory".into(),
            );
        }
        _ => {}
    }
    if let Some(block) = shape.blocks.iter().find(|b| b.serial.is_empty() || b.serial.len() > 20) {
        return impossible(
            format!("a block device with serial {:?}", block.serial),
            "a serial has 1 to 20 bytes".into(),
        );
    }
    if shape.blocks.len() != bindings.blocks.len() {
        return impossible(
            format!("{} block devices on {} files", shape.blocks.len(), bindings.blocks.len()),
            "each needs one".into(),
        );
    }
    if shape.nets.len() != bindings.nets.len() {
        return impossible(
            format!("{} network cards on {} taps", shape.nets.len(), bindings.nets.len()),
            "each needs one".into(),
        );
    }
    let slots = devices(shape);
    if slots > MAX_DEVICES {
        return impossible(format!("a machine of {slots} devices"), format!("it has {MAX_DEVICES} slots"));
    }
    Ok(())
}

/// The devices of a machine, but for what it gets for later.
fn devices(shape: &Shape) -> usize {
    1 + usize::from(shape.share_tag.is_some()) + shape.blocks.len() + shape.nets.len()
}

/// Processors of `microvm` at most.
const MAX_VCPUS: u32 = 255;
/// Devices of `microvm` at most: without ACPI it has eight virtio-mmio slots.
const MAX_DEVICES: usize = 8;

/// Opens every file that QEMU will open, so that an error names its role, and answers QEMU's driver
/// for each block device.
fn open_all(bindings: &Bindings) -> Result<Vec<&'static str>, LaunchError> {
    let open = |what, path: &Path| {
        let file = File::open(path).and_then(|f| f.metadata());
        file.map_err(|source| LaunchError::File { what, path: path.into(), source })
    };
    let regular = |what, path: &Path| {
        if open(what, path)?.is_file() {
            return Ok(());
        }
        let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file");
        Err(LaunchError::File { what, path: path.into(), source })
    };
    regular("kernel", &bindings.kernel)?;
    regular("initrd", &bindings.initrd)?;
    if let Some(share) = &bindings.share {
        std::fs::read_dir(share).map_err(|source| LaunchError::File {
            what: "share",
            path: share.clone(),
            source,
        })?;
    }
    bindings.blocks.iter().map(|block| driver_of(&block.path)).collect()
}

/// QEMU's driver for what is to be behind a disk.
fn driver_of(path: &Path) -> Result<&'static str, LaunchError> {
    let file = File::open(path).and_then(|f| f.metadata());
    let metadata =
        file.map_err(|source| LaunchError::File { what: "block device", path: path.into(), source })?;
    Ok(if metadata.file_type().is_block_device() { "host_device" } else { "file" })
}

#[cfg(test)]
mod tests;
