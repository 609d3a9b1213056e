//! What a container is to its pod, and which namespaces of the pod it shares.
//! Knows the annotations of containerd's CRI (contract, C2); everything else of a spec is the others' affair.

use std::path::{Path, PathBuf};

use bulkhead_proto::NAMESPACE_DIR;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::refused;
use crate::error::Fault;

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";

/// What a container is to its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A pod of its own: all that `ctr` and nerdctl make.
    Alone,
    /// The pod itself, as CRI's pause container is: no process of it runs, the machine stands for it.
    Sandbox,
    /// One of the containers of a pod.
    Member,
}

/// Reads the role from what containerd's CRI writes into a spec.
pub fn role(spec: &Spec) -> Role {
    let kind = spec.annotations().as_ref().and_then(|a| a.get(CONTAINER_TYPE));
    match kind.map(String::as_str) {
        Some("sandbox") => Role::Sandbox,
        Some("container") => Role::Member,
        _ => Role::Alone,
    }
}

/// Refuses namespaces of the host: those that are left out, and those that are named but not the pod's.
pub(super) fn check(spec: &Spec, role: Role) -> Result<(), Fault> {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().clone()).unwrap_or_default();
    for (kind, name) in [
        (LinuxNamespaceType::Network, "Network"),
        (LinuxNamespaceType::Pid, "PID"),
        (LinuxNamespaceType::Ipc, "IPC"),
        (LinuxNamespaceType::Uts, "UTS"),
        (LinuxNamespaceType::Mount, "Mount"),
    ] {
        if !namespaces.iter().any(|n| n.typ() == kind) {
            let what = format!("the host's {} namespace (host{name})", name.to_lowercase());
            return Err(refused(what, "the container runs in a virtual machine with namespaces of its own"));
        }
    }
    for namespace in &namespaces {
        let Some(path) = namespace.path().as_ref().filter(|p| !p.as_os_str().is_empty()) else { continue };
        let of_the_pod = match role {
            Role::Alone => namespace.typ() == LinuxNamespaceType::Network,
            // containerd keeps one to tell how users are mapped, which the spec does as well.
            Role::Sandbox => {
                matches!(namespace.typ(), LinuxNamespaceType::Network | LinuxNamespaceType::User)
            }
            Role::Member => shared_path(namespace.typ()).is_some(),
        };
        if !of_the_pod {
            let what = format!("joining the {} namespace {}", namespace.typ(), path.display());
            return Err(refused(what, "a namespace of the host cannot be entered from a virtual machine"));
        }
    }
    Ok(())
}

/// Lets a container of a pod join the pod's namespaces of the guest where its spec names the sandbox's.
///
/// All paths are taken for the sandbox's: they lead to a process of the host, and every process that
/// containerd is told of is the machine (contract, C6).
pub(super) fn join_pod(spec: &mut Spec) {
    let Some(linux) = spec.linux_mut() else { return };
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for namespace in &mut namespaces {
        if namespace.path().as_ref().is_some_and(|path| !path.as_os_str().is_empty())
            && let Some(path) = shared_path(namespace.typ())
        {
            namespace.set_path(Some(path));
        }
    }
    linux.set_namespaces(Some(namespaces));
}

/// Where the guest keeps the pod's namespace of this kind.
fn shared_path(kind: LinuxNamespaceType) -> Option<PathBuf> {
    let name = match kind {
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::User => "user",
        _ => return None,
    };
    Some(Path::new(NAMESPACE_DIR).join(name))
}
