//! Which of a spec's mounts the guest makes by itself, and which need something of the host.
//! Knows mounts only by their words; looks at no file.

use std::path::PathBuf;

use bulkhead_proto::SHARE_DIR;
use oci_spec::runtime::Spec;

use super::refused;
use crate::{
    error::{Fault, Kind},
    ids::ContainerId,
};

/// File systems that the guest mounts by itself.
const GUEST_KINDS: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// A file or directory of the host that the guest sees as `share/<container>/mounts/<slot>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Its number among the container's binds.
    pub slot: usize,
    /// On the host.
    pub source: PathBuf,
    /// In the container, for messages.
    pub destination: PathBuf,
    /// With what is mounted below it.
    pub recursive: bool,
    /// The guest must not write through it, whatever its kernel says.
    pub read_only: bool,
}

/// Gives every bind mount of the spec a place in the share and answers what must be put there.
pub(super) fn translate(spec: &mut Spec, id: &ContainerId) -> Result<Vec<Bind>, Fault> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let mut binds = Vec::new();
    for mount in &mut mounts {
        let options = mount.options().clone().unwrap_or_default();
        let has = |word: &str| options.iter().any(|o| o == word);
        let kind = mount.typ().clone().unwrap_or_default();
        let destination = mount.destination().clone();
        if has("shared") || has("rshared") {
            let what = format!("bidirectional mount propagation at {}", destination.display());
            return Err(refused(what, "mounts do not travel from a guest to the host"));
        }
        if !(kind == "bind" || has("bind") || has("rbind")) {
            if !GUEST_KINDS.contains(&kind.as_str()) {
                let what = format!("a mount of type {kind:?} at {}", destination.display());
                return Err(refused(
                    what,
                    "only bind mounts and the kernel's own file systems can be mounted",
                ));
            }
            continue;
        }
        let source = mount.source().clone().ok_or_else(|| {
            let text = format!("the bind mount at {} has no source", destination.display());
            Fault::new(Kind::InvalidArgument, text)
        })?;
        let slot = binds.len();
        mount.set_source(Some(format!("{SHARE_DIR}/{id}/mounts/{slot}").into()));
        binds.push(Bind {
            slot,
            source,
            destination,
            recursive: has("rbind"),
            read_only: has("ro") || has("rro"),
        });
    }
    spec.set_mounts(Some(mounts));
    Ok(binds)
}
