//! Which hypervisor runs a sandbox's machine.
//! Knows the configuration and what was found out of the host's processor.

use std::path::Path;

use bulkhead_hypervisor::{
    Hypervisor,
    builtin::{Builtin, BuiltinConfig},
    probe::{self, Acceleration},
    qemu::{Qemu, QemuConfig},
};

use super::wanted::config_fault;
use crate::{
    config::{Backend, Config},
    error::{Fault, Kind},
};

/// Added to the state directory's name: a file beside it that remembers, until the host's next boot, that its
/// processor virtualises. Not in it, for that is empty when there is no pod.
const ACCELERATION: &str = ".acceleration";

/// The machine that the configuration asks for, and that this host can run.
pub(super) fn choose(config: &Config) -> Result<Box<dyn Hypervisor>, Fault> {
    let virtiofsd = config.resolve_virtiofsd().map_err(config_fault)?;
    if uses_kvm(config)? {
        let vmm = config.resolve_vmm().map_err(config_fault)?;
        return Ok(Box::new(Builtin::new(BuiltinConfig { vmm, virtiofsd })));
    }
    let qemu = config.resolve_qemu().map_err(config_fault)?;
    let vsock = config.resolve_vhost_device_vsock().map_err(config_fault)?;
    Ok(Box::new(Qemu::new(QemuConfig { qemu, virtiofsd, vsock, ..QemuConfig::default() })))
}

/// Whether pods run on KVM: opening /dev/kvm proves nothing, so a guest is asked.
fn uses_kvm(config: &Config) -> Result<bool, Fault> {
    let backend = config.hypervisor.backend;
    if backend == Backend::Emulation {
        return Ok(false);
    }
    let mut memory = config.state_dir.as_os_str().to_owned();
    memory.push(ACCELERATION);
    match (probe::acceleration_remembered(Path::new(&memory)), backend) {
        (Acceleration::Hardware { .. }, _) => Ok(true),
        (Acceleration::Emulated { .. }, Backend::Auto) => Ok(false),
        (Acceleration::Emulated { why }, _) => Err(Fault::new(
            Kind::FailedPrecondition,
            format!(
                "hypervisor.backend = \"kvm\", but this machine does not virtualise: {why}; use \"auto\" or \"emulation\""
            ),
        )),
    }
}
