//! From what is asked to what is to be made: (configuration, OCI spec, host facts) -> plan.
//! Pure: reads no file and changes nothing, so every rule here has a test without a machine.

mod devices;
mod mounts;
mod pod;
mod resize;
mod role;
mod sizing;
mod spec;
mod users;

pub use devices::Disk;
pub use mounts::{Bind, ReadOnly, in_share};
pub use pod::{Dns, PodConfig};
pub use resize::{Claims, Limits, Size, with_descriptions};
pub use role::{Role, role};
pub use sizing::Sizing;
pub use users::{IdMaps, IdRange};

use std::{collections::HashMap, path::PathBuf};

use bulkhead_vmm_spec::SizeMib;
use oci_spec::runtime::{Hook, Spec};

use crate::{
    config::Config,
    error::{Fault, Kind},
    ids::ContainerId,
};

/// What a plan needs to know of the host.
#[derive(Clone, Debug)]
pub struct HostFacts {
    /// Processors online.
    pub cpus: u32,
    /// All its memory.
    pub memory: SizeMib,
}

/// Hooks that run on the host; those of the container's namespace stay in the guest's spec.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostHooks {
    /// Deprecated `prestart`, then `createRuntime`: before the container is created in the guest.
    pub create: Vec<Hook>,
    /// After its command was started.
    pub poststart: Vec<Hook>,
    /// After it was deleted.
    pub poststop: Vec<Hook>,
}

/// All that is to be made for one container.
#[derive(Clone, Debug)]
pub struct ContainerPlan {
    /// What it is to its pod.
    pub role: Role,
    /// The spec for the guest, its paths those of the guest.
    pub guest_spec: Spec,
    /// The spec's own path of the root: what is run if containerd mounts nothing (`ctr run --rootfs`).
    /// Relative to the bundle.
    pub root_path: PathBuf,
    /// The root is to be shared read-only.
    pub root_read_only: bool,
    /// What of the host is shared with the guest besides the root.
    pub binds: Vec<Bind>,
    /// Block devices of the host that it is to have.
    pub disks: Vec<Disk>,
    /// The network namespace of the host that it is to be in, if it names one.
    pub network: Option<PathBuf>,
    /// How its user namespace maps, if it has one.
    pub users: Option<IdMaps>,
    /// Hooks for the host.
    pub hooks: HostHooks,
    /// First size of the terminal, in characters: width, height.
    pub console: Option<(u32, u32)>,
}

/// Plans one container.
pub fn container(id: &ContainerId, mut spec: Spec) -> Result<ContainerPlan, Fault> {
    let role = role(&spec);
    spec::check(&spec, role)?;
    let root_path = spec.root().as_ref().map_or_else(PathBuf::new, |r| r.path().clone());
    let root_read_only = spec.root().as_ref().is_some_and(|r| r.readonly().unwrap_or(false));
    let network = spec::network(&spec);
    let users = users::of_spec(&spec)?;
    let hooks = spec::take_host_hooks(&mut spec)?;
    let (mut binds, mut disks) = (Vec::new(), Vec::new());
    // Of a sandbox nothing but its hooks is made: there is no process that would see the rest.
    if role != Role::Sandbox {
        let privileged = devices::is_privileged(&spec);
        disks = devices::disks(&spec);
        devices::translate(&mut spec, privileged)?;
        binds = mounts::translate(&mut spec, id, role, users.as_ref())?;
        spec::move_into_guest(&mut spec, id);
    }
    if role == Role::Member {
        role::join_pod(&mut spec);
    }
    let console = spec::console_size(&spec);
    Ok(ContainerPlan {
        role,
        guest_spec: spec,
        root_path,
        root_read_only,
        binds,
        disks,
        network,
        users,
        hooks,
        console,
    })
}

/// Sysctls for the pod's own namespaces. Those of a single container go to it alone.
pub fn pod_sysctls(spec: &Spec) -> HashMap<String, String> {
    match role(spec) {
        Role::Sandbox => spec::pod_sysctls(spec),
        Role::Alone | Role::Member => HashMap::new(),
    }
}

/// The size of the machine for a sandbox whose first container has `spec`.
pub fn machine(config: &Config, spec: &Spec, facts: &HostFacts) -> Result<Sizing, Fault> {
    sizing::size(config, spec, facts)
}

/// The network namespace of a sandbox whose first container has `spec`; without one the sandbox has its own.
pub fn network(spec: &Spec) -> Option<PathBuf> {
    spec::network(spec)
}

/// How the user namespace of a sandbox whose first container has `spec` maps, if it has one.
pub fn users(spec: &Spec) -> Result<Option<IdMaps>, Fault> {
    users::of_spec(spec)
}

/// The block devices of a sandbox whose first container has `spec`.
pub fn disks(spec: &Spec) -> Vec<Disk> {
    devices::disks(spec)
}

/// The size of the machine for a pod that the sandbox API makes; what it cannot have is refused.
pub fn pod(config: &Config, pod: &PodConfig, facts: &HostFacts) -> Result<Sizing, Fault> {
    pod.check()?;
    Ok(sizing::of_pod(config, pod, facts))
}

/// A refusal of something that a machine of its own cannot give.
fn refused(what: impl std::fmt::Display, why: &str) -> Fault {
    Fault::new(Kind::InvalidArgument, format!("{what} is not supported: {why}"))
}

#[cfg(test)]
mod tests;
