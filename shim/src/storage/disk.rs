//! Block devices of the host that are disks of the machine: which there are, and for whom.
//! Knows the host's device numbers and where their nodes are; how a machine gets a disk is the backend's.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use bulkhead_hypervisor::Drive;
use bulkhead_proto::agent;
use bulkhead_vmm_spec::{Bindings, BlockBinding, BlockShape, Shape};
use nix::sys::stat::{major, minor};

use crate::{ids::ContainerId, plan::Disk};

/// Why a container cannot have a block device of the host.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The kernel has no such device, or nobody made a node for it.
    #[error("block device {} ({major}:{minor}): the host has no node for it", container.display())]
    Node {
        /// In the container.
        container: PathBuf,
        /// Numbers.
        major: i64,
        /// Numbers.
        minor: i64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The machine was launched without it, and has no room.
    #[error(
        "block device {} ({major}:{minor}): the machine runs already and was made without room for more disks (storage.spare_disks)",
        container.display()
    )]
    Late {
        /// In the container.
        container: PathBuf,
        /// Numbers.
        major: i64,
        /// Numbers.
        minor: i64,
    },
    /// The machine refuses it.
    #[error("block device {} ({major}:{minor}): {reason}", container.display())]
    Refused {
        /// In the container.
        container: PathBuf,
        /// Numbers.
        major: i64,
        /// Numbers.
        minor: i64,
        /// In the machine's words.
        reason: String,
    },
}

impl DiskError {
    /// The machine has no room for it.
    pub fn late(disk: &Disk) -> Self {
        Self::Late { container: disk.path.clone(), major: disk.major, minor: disk.minor }
    }

    /// The machine does not take it.
    pub fn refused(disk: &Disk, reason: String) -> Self {
        Self::Refused { container: disk.path.clone(), major: disk.major, minor: disk.minor, reason }
    }
}

/// A device of the host that the machine has as a disk.
#[derive(Debug)]
struct Known {
    disk: Disk,
    node: PathBuf,
    /// By which the guest finds it.
    serial: String,
    /// By which a running machine gives it back; one that was there at the launch stays.
    slot: Option<u32>,
    users: BTreeSet<ContainerId>,
}

/// The disks of one machine, in the order in which it got them.
#[derive(Debug, Default)]
pub struct Disks(Vec<Known>);

impl Disks {
    /// Finds the host's node of each device.
    ///
    /// # Errors
    /// There is none.
    pub fn find(wanted: Vec<Disk>) -> Result<Self, DiskError> {
        let mut found: Vec<Known> = Vec::new();
        for disk in wanted {
            if let Some(known) = found.iter_mut().find(|known| known.disk.is(&disk)) {
                known.disk.read_only &= disk.read_only;
                known.serial = serial(&known.disk);
                continue;
            }
            let BlockBinding { path: node } = binding(&disk)?;
            found.push(Known { serial: serial(&disk), disk, node, slot: None, users: BTreeSet::new() });
        }
        Ok(Self(found))
    }

    /// Gives them to a machine that is to be launched.
    pub fn equip(&self, shape: &mut Shape, bindings: &mut Bindings) {
        for Known { disk, node, serial, .. } in &self.0 {
            shape.blocks.push(BlockShape { serial: serial.clone(), read_only: disk.read_only });
            bindings.blocks.push(BlockBinding { path: node.clone() });
        }
    }

    /// What the guest has to know of a device for this container, which uses it from now on; none if the machine has no
    /// disk that will do. One that is written to may be given to somebody who only reads: the guest sees to that.
    pub fn used_by(&mut self, id: &ContainerId, disk: &Disk) -> Option<agent::Disk> {
        let fits = |known: &&mut Known| known.disk.is(disk) && (disk.read_only || !known.disk.read_only);
        let known = self.0.iter_mut().find(fits)?;
        known.users.insert(id.clone());
        Some(agent::Disk {
            major: disk.major,
            minor: disk.minor,
            serial: known.serial.clone(),
            ..Default::default()
        })
    }

    /// The running machine has been given a device.
    pub fn add(&mut self, disk: Disk, node: PathBuf, drive: Drive) {
        let Drive { slot, serial } = drive;
        self.0.push(Known { disk, node, serial, slot: Some(slot), users: BTreeSet::new() });
    }

    /// A container is gone: what nobody uses any more is forgotten, and answered, if the machine can give it back.
    pub fn left_by(&mut self, id: &ContainerId) -> Vec<Drive> {
        let mut left = Vec::new();
        self.0.retain_mut(|known| {
            let used = known.users.remove(id);
            match known.slot {
                Some(slot) if used && known.users.is_empty() => {
                    left.push(Drive { slot, serial: known.serial.clone() });
                    false
                }
                _ => true,
            }
        });
        left
    }
}

/// What a machine is to be given for a device, but for where it is.
pub fn shape(disk: &Disk) -> BlockShape {
    BlockShape { serial: serial(disk), read_only: disk.read_only }
}

/// Where a device is.
///
/// # Errors
/// The host has no node for it.
pub fn binding(disk: &Disk) -> Result<BlockBinding, DiskError> {
    let (major, minor) = (disk.major, disk.minor);
    let path = node(major, minor);
    let path =
        path.map_err(|source| DiskError::Node { container: disk.path.clone(), major, minor, source })?;
    Ok(BlockBinding { path })
}

/// At most 20 bytes, as virtio has it. One device may be two disks, one of which may only be read.
fn serial(disk: &Disk) -> String {
    format!("host-{:x}-{:x}{}", disk.major, disk.minor, if disk.read_only { "-ro" } else { "" })
}

/// The node that udev, or devtmpfs, made for a device.
fn node(wanted_major: i64, wanted_minor: i64) -> io::Result<PathBuf> {
    let uevent = fs::read_to_string(format!("/sys/dev/block/{wanted_major}:{wanted_minor}/uevent"))?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| io::Error::other("its uevent names no node"))?;
    let path = Path::new("/dev").join(name);
    let meta = fs::metadata(&path)?;
    let numbers = (major(meta.rdev()) as i64, minor(meta.rdev()) as i64);
    if !meta.file_type().is_block_device() || numbers != (wanted_major, wanted_minor) {
        return Err(io::Error::other(format!("{} is another device", path.display())));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(minor: i64) -> Disk {
        Disk { major: 8, minor, path: "/dev/x".into(), read_only: false }
    }

    fn id(name: &str) -> ContainerId {
        ContainerId::parse(name).unwrap()
    }

    #[test]
    fn a_device_that_the_host_has_not_is_named() {
        let error = Disks::find(vec![Disk { major: 4095, ..disk(77) }]).unwrap_err();
        assert_eq!(error.to_string(), "block device /dev/x (4095:77): the host has no node for it");
        let late = DiskError::late(&disk(16)).to_string();
        assert!(late.contains("(8:16)") && late.contains("storage.spare_disks"), "{late}");
    }

    #[test]
    fn serials_fit_and_tell_disks_apart() {
        let largest = Disk { major: 4095, read_only: true, ..disk((1 << 20) - 1) };
        assert!(serial(&largest).len() <= 20);
        assert_ne!(serial(&largest), serial(&Disk { read_only: false, ..largest.clone() }));
    }

    #[test]
    fn a_disk_goes_with_its_last_user_and_one_of_the_launch_stays() {
        let at_launch = Known {
            disk: disk(0),
            node: "/dev/sda".into(),
            serial: "a".into(),
            slot: None,
            users: [].into(),
        };
        let mut disks = Disks(vec![at_launch]);
        assert_eq!(disks.used_by(&id("one"), &disk(0)).unwrap().serial, "a");
        assert_eq!(disks.used_by(&id("one"), &disk(16)), None);
        let drive = Drive { slot: 3, serial: "spare0".into() };
        disks.add(disk(16), "/dev/sdb".into(), drive.clone());
        for user in ["one", "two"] {
            let told = disks.used_by(&id(user), &disk(16)).unwrap();
            assert_eq!((told.major, told.minor, told.serial.as_str()), (8, 16, "spare0"));
        }
        assert_eq!(disks.left_by(&id("one")), []);
        assert_eq!(disks.left_by(&id("two")), [drive]);
        assert_eq!(disks.left_by(&id("two")), []);
        assert_eq!(disks.used_by(&id("three"), &disk(16)), None);
        assert!(disks.used_by(&id("three"), &disk(0)).is_some());
    }

    #[test]
    fn who_wants_to_write_gets_no_disk_that_may_only_be_read() {
        let mut disks = Disks::default();
        let reading = Disk { read_only: true, ..disk(16) };
        disks.add(reading.clone(), "/dev/sdb".into(), Drive { slot: 0, serial: "r".into() });
        assert_eq!(disks.used_by(&id("c"), &disk(16)), None);
        disks.add(disk(16), "/dev/sdb".into(), Drive { slot: 1, serial: "w".into() });
        assert_eq!(disks.used_by(&id("c"), &disk(16)).unwrap().serial, "w");
        assert_eq!(disks.used_by(&id("d"), &reading).unwrap().serial, "r");
    }
}
