//! Which of a spec's mounts the guest makes by itself, and which need something of the host.
//! Knows mounts only by their words; looks at no file.

use std::path::{Path, PathBuf};

use bulkhead_proto::{SHARE_DIR, SHM_DIR};
use oci_spec::runtime::{Mount, Spec};

use super::{ContainerPlan, IdMaps, Role, refused, users};
use crate::{
    error::{Fault, Kind},
    ids::ContainerId,
};

/// File systems that the guest mounts by itself.
const GUEST_KINDS: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// A file or directory of the host that the guest sees as `share/<container>/mounts/<slot>`, or where containers have
/// it together.
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
    pub read_only: ReadOnly,
    /// What the host mounts below it later is seen as well (rslave).
    pub follows_host: bool,
    /// How the owners of its files are mapped, if they are; and whether of what is mounted below it, too.
    pub owners: Option<(IdMaps, bool)>,
}

/// How much of a bind mount cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOnly {
    /// Nothing.
    No,
    /// The mount, but what is mounted below it as that says itself (ro).
    Itself,
    /// The mount and all below it (rro).
    WithAllBelow,
}

/// Gives every bind mount of the spec a place in the share and answers what must be put there.
pub(super) fn translate(
    spec: &mut Spec,
    id: &ContainerId,
    role: Role,
    users: Option<&IdMaps>,
) -> Result<Vec<Bind>, Fault> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let mut binds = Vec::new();
    for mount in &mut mounts {
        let owners = users::of_mount(mount, users)?;
        let options = mount.options().clone().unwrap_or_default();
        let has = |word: &str| options.iter().any(|o| o == word);
        let kind = mount.typ().clone().unwrap_or_default();
        let destination = mount.destination().clone();
        if has("shared") || has("rshared") {
            let what = format!("bidirectional mount propagation at {}", destination.display());
            return Err(refused(what, "mounts do not travel from a guest to the host"));
        }
        if role == Role::Member && is_shm(mount) {
            share_shm(mount);
            continue;
        }
        if !(kind == "bind" || has("bind") || has("rbind")) {
            if !GUEST_KINDS.contains(&kind.as_str()) {
                let what = format!("a mount of type {kind:?} at {}", destination.display());
                return Err(refused(
                    what,
                    "only bind mounts and the kernel's own file systems can be mounted",
                ));
            }
            if owners.is_some() {
                let what = format!("a mount of type {kind:?} at {} with mapped ids", destination.display());
                return Err(refused(what, "only the owners of a bind mount's files can be mapped"));
            }
            continue;
        }
        let source = mount.source().clone().ok_or_else(|| {
            let text = format!("the bind mount at {} has no source", destination.display());
            Fault::new(Kind::InvalidArgument, text)
        })?;
        let slot = binds.len();
        mount.set_source(Some(in_share(id, slot)));
        let read_only = match (has("rro"), has("ro")) {
            (true, _) => ReadOnly::WithAllBelow,
            (false, true) => ReadOnly::Itself,
            (false, false) => ReadOnly::No,
        };
        if read_only == ReadOnly::WithAllBelow {
            // To the guest a bind is one file system, with all that is mounted below it on the host. A mapping of
            // owners has left the options by now.
            let given = mount.options().iter().flatten();
            let mut plain: Vec<_> = given.filter(|o| *o != "rro" && *o != "ro").cloned().collect();
            plain.push("ro".to_owned());
            mount.set_options(Some(plain));
        }
        let recursive = has("rbind");
        let follows_host = !has("private") && !has("rprivate");
        binds.push(Bind { slot, source, destination, recursive, read_only, follows_host, owners });
    }
    spec.set_mounts(Some(mounts));
    Ok(binds)
}

impl ContainerPlan {
    /// Shows a file of the host at `destination`, unless the spec has something there; as writable as the root.
    pub fn add_file(&mut self, id: &ContainerId, source: PathBuf, destination: &str) {
        let mut mounts = self.guest_spec.mounts().clone().unwrap_or_default();
        if mounts.iter().any(|mount| mount.destination() == Path::new(destination)) {
            return;
        }
        let slot = self.binds.len();
        let read_only = self.root_read_only;
        let mut options = vec!["rbind".to_owned(), "rprivate".to_owned()];
        options.push(if read_only { "ro" } else { "rw" }.to_owned());
        mounts.push(bind(destination.into(), in_share(id, slot), options));
        self.guest_spec.set_mounts(Some(mounts));
        let read_only = if read_only { ReadOnly::Itself } else { ReadOnly::No };
        let (destination, recursive) = (destination.into(), true);
        let follows_host = false;
        self.binds.push(Bind { slot, source, destination, recursive, read_only, follows_host, owners: None });
    }

    /// Says where the guest finds the bind mount with the number `slot`, if not at the container's own place for it.
    pub fn is_at(&mut self, id: &ContainerId, slot: usize, place: &Path) {
        let source = in_share(id, slot);
        let mut mounts = self.guest_spec.mounts().clone().unwrap_or_default();
        for mount in mounts.iter_mut().filter(|mount| mount.source().as_ref() == Some(&source)) {
            mount.set_source(Some(place.to_owned()));
        }
        self.guest_spec.set_mounts(Some(mounts));
    }

    /// Where the container's root needs a mount point: what is not below an earlier mount, each with the number of
    /// the bind mount that it is for, if it is for one.
    pub fn mount_points(&self) -> Vec<(PathBuf, Option<usize>)> {
        let mut seen: Vec<PathBuf> = Vec::new();
        let mut points = Vec::new();
        for mount in self.guest_spec.mounts().iter().flatten() {
            let destination = mount.destination();
            if !seen.iter().any(|earlier| destination.starts_with(earlier)) {
                let bind = self.binds.iter().find(|bind| bind.destination == *destination);
                points.push((destination.clone(), bind.map(|bind| bind.slot)));
            }
            seen.push(destination.clone());
        }
        points
    }

    /// Leaves to the host what of the read-only bind with the number `slot` can be written: to the guest it is one
    /// file system with all that is mounted below it, of which each part has its own say.
    pub fn leave_to_host(&mut self, id: &ContainerId, slot: usize) {
        let source = in_share(id, slot);
        let mut mounts = self.guest_spec.mounts().clone().unwrap_or_default();
        for mount in mounts.iter_mut().filter(|mount| mount.source().as_ref() == Some(&source)) {
            let options = mount.options().iter().flatten();
            let options = options.map(|o| if o == "ro" { "rw".to_owned() } else { o.clone() });
            mount.set_options(Some(options.collect()));
        }
        self.guest_spec.set_mounts(Some(mounts));
    }
}

/// Where the guest finds the bind mount with the number `slot`.
pub fn in_share(id: &ContainerId, slot: usize) -> PathBuf {
    format!("{SHARE_DIR}/{id}/mounts/{slot}").into()
}

fn bind(destination: PathBuf, source: PathBuf, options: Vec<String>) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(destination)
        .set_typ(Some("bind".into()))
        .set_source(Some(source))
        .set_options(Some(options));
    mount
}

/// The /dev/shm that containerd means for the whole pod: what its CRI has made on the host, or, where that is
/// the sandbox's affair, the one that every spec has. A volume that a user mounts there is something else, though it
/// may be named so too.
fn is_shm(mount: &Mount) -> bool {
    let Some(source) = mount.source() else { return false };
    // `sandboxes/<id>/shm` below the directory of containerd's plugin (internal/cri/server/helpers.go).
    let mut names = source.iter().rev();
    let of_cri = names.next().is_some_and(|name| name == "shm")
        && names.next().is_some()
        && names.next().is_some_and(|name| name == "sandboxes");
    mount.destination() == Path::new("/dev/shm") && (source == Path::new("shm") || of_cri)
}

/// What containers of a pod share in memory is the guest's memory.
fn share_shm(mount: &mut Mount) {
    let options = ["rbind", "nosuid", "noexec", "nodev", "rw"].map(str::to_owned);
    mount.set_typ(Some("bind".into())).set_source(Some(SHM_DIR.into())).set_options(Some(options.to_vec()));
}
