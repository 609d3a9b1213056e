//! What of an OCI spec can be honoured in a machine of its own, and how its paths read there.
//! Knows neither mounts nor devices; those have rooms of their own.

use std::{collections::HashMap, path::PathBuf};

use bulkhead_proto::SHARE_DIR;
use oci_spec::runtime::{LinuxNamespaceBuilder, LinuxNamespaceType, Spec};

use super::{HostHooks, Role, refused, role};
use crate::{
    error::{Fault, Kind},
    ids::ContainerId,
};

const NETWORK: LinuxNamespaceType = LinuxNamespaceType::Network;

/// Refuses by name what cannot be honoured; nothing is ignored.
pub(super) fn check(spec: &Spec, role: Role) -> Result<(), Fault> {
    let missing = |what| Fault::new(Kind::InvalidArgument, format!("config.json has no {what}"));
    let process = spec.process().as_ref().ok_or_else(|| missing("process"))?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(missing("process.args: there is no command to run"));
    }
    spec.root().as_ref().ok_or_else(|| missing("root"))?;
    let linux = spec.linux().as_ref().ok_or_else(|| missing("linux section"))?;

    role::check(spec, role)?;
    if let Some(mode) = linux.rootfs_propagation()
        && mode.contains("shared")
    {
        return Err(refused(
            format!("rootfsPropagation {mode:?}"),
            "mounts do not travel from a guest to the host",
        ));
    }
    if linux.intel_rdt().is_some() {
        return Err(refused("linux.intelRdt", "the guest has no resctrl"));
    }
    if linux.mount_label().as_ref().is_some_and(|l| !l.is_empty()) {
        return Err(refused("linux.mountLabel", "the guest does not enforce SELinux"));
    }
    Ok(())
}

/// The network namespace of the host that the pod's links are in, if the spec names one.
pub(super) fn network(spec: &Spec) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let path = namespaces.iter().find(|n| n.typ() == NETWORK)?.path().as_ref()?;
    Some(path.clone()).filter(|path| !path.as_os_str().is_empty())
}

/// Takes the hooks of the runtime's namespace out of the spec.
pub(super) fn take_host_hooks(spec: &mut Spec) -> Result<HostHooks, Fault> {
    let Some(mut hooks) = spec.hooks().clone() else { return Ok(HostHooks::default()) };
    if let Some(hook) = hooks.create_container().as_ref().and_then(|list| list.first()) {
        let what = format!("createContainer hook {}", hook.path().display());
        return Err(refused(
            what,
            "it lies on the host but would have to run in the guest; use createRuntime",
        ));
    }
    #[allow(deprecated)]
    let mut create = hooks.prestart().clone().unwrap_or_default();
    create.extend(hooks.create_runtime().clone().unwrap_or_default());
    let taken = HostHooks {
        create,
        poststart: hooks.poststart().clone().unwrap_or_default(),
        poststop: hooks.poststop().clone().unwrap_or_default(),
    };
    #[allow(deprecated)]
    hooks.set_prestart(None);
    hooks.set_create_runtime(None).set_poststart(None).set_poststop(None);
    spec.set_hooks(hooks.start_container().is_some().then_some(hooks));
    Ok(taken)
}

/// Gives the spec the paths of the guest.
pub(super) fn move_into_guest(spec: &mut Spec, id: &ContainerId) {
    if let Some(root) = spec.root_mut() {
        root.set_path(format!("{SHARE_DIR}/{id}/rootfs").into());
    }
    if let Some(linux) = spec.linux_mut() {
        // containerd leaves the cgroup namespace out where the host has cgroup v1; the guest has v2.
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        for namespace in namespaces.iter_mut().filter(|n| n.typ() == NETWORK) {
            // The guest has one for the pod.
            namespace.set_path(None);
        }
        if !namespaces.iter().any(|n| n.typ() == LinuxNamespaceType::Cgroup) {
            let namespace = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Cgroup).build();
            namespaces.push(namespace.expect("a namespace needs only its type"));
            linux.set_namespaces(Some(namespaces));
        }
    }
}

/// Sysctls of the pod: what the container that stands for it asks for.
pub(super) fn pod_sysctls(spec: &Spec) -> HashMap<String, String> {
    spec.linux().as_ref().and_then(|linux| linux.sysctl().clone()).unwrap_or_default()
}

/// First size of the terminal: width, height.
pub(super) fn console_size(spec: &Spec) -> Option<(u32, u32)> {
    let size = spec.process().as_ref()?.console_size()?;
    let (width, height) = (u32::try_from(size.width()).ok()?, u32::try_from(size.height()).ok()?);
    (width > 0 && height > 0).then_some((width, height))
}
