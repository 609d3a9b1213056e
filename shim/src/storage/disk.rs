//! Block devices of the host that are disks of the machine.
//! Knows the host's device numbers and where their nodes are; how a machine gets a disk is the backend's.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use bulkhead_proto::agent;
use bulkhead_vmm_spec::{Bindings, BlockBinding, BlockShape, Shape};
use nix::sys::stat::{major, minor};

use crate::plan::Disk;

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
    /// The machine was launched without it.
    #[error(
        "block device {} ({major}:{minor}): the machine runs already and gets no more disks; name it in the pod's first container, or, in Kubernetes, where the machine comes before its containers, claim a volume with `volumeMode: Filesystem`",
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
}

/// The disks of one machine, in the order of their slots.
#[derive(Debug, Default)]
pub struct Disks(Vec<(Disk, PathBuf)>);

impl Disks {
    /// Finds the host's node of each device.
    ///
    /// # Errors
    /// There is none.
    pub fn find(wanted: Vec<Disk>) -> Result<Self, DiskError> {
        let mut found: Vec<(Disk, PathBuf)> = Vec::new();
        for disk in wanted {
            if let Some((known, _)) = found.iter_mut().find(|(known, _)| same(known, &disk)) {
                known.read_only &= disk.read_only;
                continue;
            }
            let node = node(disk.major, disk.minor).map_err(|source| DiskError::Node {
                container: disk.path.clone(),
                major: disk.major,
                minor: disk.minor,
                source,
            })?;
            found.push((disk, node));
        }
        Ok(Self(found))
    }

    /// Gives them to a machine that is to be launched.
    pub fn equip(&self, shape: &mut Shape, bindings: &mut Bindings) {
        for (disk, node) in &self.0 {
            shape.blocks.push(BlockShape { serial: serial(disk), read_only: disk.read_only });
            bindings.blocks.push(BlockBinding { path: node.clone() });
        }
    }

    /// What the guest has to know of a container's devices.
    ///
    /// # Errors
    /// The machine has not all of them.
    pub fn of_container(&self, wanted: &[Disk]) -> Result<Vec<agent::Disk>, DiskError> {
        let of = |disk: &Disk| match self.0.iter().find(|(known, _)| same(known, disk)) {
            Some((known, _)) => Ok(agent::Disk {
                major: disk.major,
                minor: disk.minor,
                serial: serial(known),
                ..Default::default()
            }),
            None => {
                Err(DiskError::Late { container: disk.path.clone(), major: disk.major, minor: disk.minor })
            }
        };
        wanted.iter().map(of).collect()
    }
}

fn same(a: &Disk, b: &Disk) -> bool {
    (a.major, a.minor) == (b.major, b.minor)
}

/// At most 20 bytes, as virtio has it.
fn serial(disk: &Disk) -> String {
    format!("host-{:x}-{:x}", disk.major, disk.minor)
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

    #[test]
    fn a_device_that_the_host_has_not_is_named() {
        let error = Disks::find(vec![Disk { major: 4095, ..disk(77) }]).unwrap_err();
        assert_eq!(error.to_string(), "block device /dev/x (4095:77): the host has no node for it");
    }

    #[test]
    fn serials_fit_and_what_the_machine_has_not_is_refused() {
        assert!(serial(&Disk { major: 4095, ..disk((1 << 20) - 1) }).len() <= 20);
        let disks = Disks(vec![(disk(0), "/dev/sda".into())]);
        let told = disks.of_container(&[disk(0)]).unwrap();
        assert_eq!((told[0].major, told[0].minor, told[0].serial.as_str()), (8, 0, "host-8-0"));
        let late = disks.of_container(&[disk(16)]).unwrap_err().to_string();
        assert!(
            late.contains("(8:16)") && late.contains("first container") && late.contains("Filesystem"),
            "{late}"
        );
    }
}
