//! Which devices of a spec the guest has itself, and which cannot be given.
//! Knows device numbers; opens no device.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

use super::refused;
use crate::error::Fault;

/// Character devices that the guest has under the same numbers (Linux admin-guide/devices.txt).
const GUEST_DEVICES: [(i64, i64); 10] = [
    (1, 3),    // null
    (1, 5),    // zero
    (1, 7),    // full
    (1, 8),    // random
    (1, 9),    // urandom
    (1, 11),   // kmsg
    (5, 0),    // tty
    (5, 2),    // ptmx
    (10, 200), // net/tun
    (10, 229), // fuse
];

/// Whether the spec allows every device, which is how "privileged" reaches a runtime.
pub(super) fn is_privileged(spec: &Spec) -> bool {
    let rules = spec
        .linux()
        .as_ref()
        .and_then(|l| l.resources().as_ref())
        .and_then(|r| r.devices().clone())
        .unwrap_or_default();
    rules.iter().any(allows_all)
}

fn allows_all(rule: &LinuxDeviceCgroup) -> bool {
    rule.allow()
        && rule.major().is_none_or(|n| n == -1)
        && rule.minor().is_none_or(|n| n == -1)
        && rule.typ().is_none_or(|t| t == LinuxDeviceType::A)
}

/// A block device of the host that a container is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The host's numbers.
    pub major: i64,
    /// The host's numbers.
    pub minor: i64,
    /// In the container, for messages.
    pub path: PathBuf,
    /// The container may not write to it.
    pub read_only: bool,
}

impl Disk {
    /// Whether both are the same device.
    pub fn is(&self, other: &Disk) -> bool {
        (self.major, self.minor) == (other.major, other.minor)
    }
}

/// The block devices of a spec. A privileged container's list is all of the host's devices and asks for none.
pub(super) fn disks(spec: &Spec) -> Vec<Disk> {
    let Some(linux) = spec.linux() else { return Vec::new() };
    let rules = linux.resources().as_ref().and_then(|r| r.devices().clone()).unwrap_or_default();
    if rules.iter().any(allows_all) {
        return Vec::new();
    }
    let block = |d: &&LinuxDevice| d.typ() == LinuxDeviceType::B;
    let disk = |d: &LinuxDevice| Disk {
        major: d.major(),
        minor: d.minor(),
        path: d.path().clone(),
        read_only: !rules.iter().any(|rule| allows_writing(rule, d)),
    };
    linux.devices().iter().flatten().filter(block).map(disk).collect()
}

fn allows_writing(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    let same = |number: Option<i64>, wanted| number.is_none_or(|n| n == -1 || n == wanted);
    rule.allow()
        && rule.typ().is_none_or(|t| matches!(t, LinuxDeviceType::A | LinuxDeviceType::B))
        && same(rule.major(), device.major())
        && same(rule.minor(), device.minor())
        && rule.access().as_ref().is_none_or(|letters| letters.contains('w'))
}

/// Leaves the devices that the guest has or can be given, and refuses the others by name. A privileged
/// container's list is all of the host's devices: it gets all of the guest's and nothing else.
pub(super) fn translate(spec: &mut Spec, privileged: bool) -> Result<(), Fault> {
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    let mut kept = Vec::new();
    for device in linux.devices().clone().unwrap_or_default() {
        let numbers = (device.major(), device.minor());
        let possible = match device.typ() {
            LinuxDeviceType::P => true,
            LinuxDeviceType::B => !privileged,
            _ => GUEST_DEVICES.contains(&numbers),
        };
        if possible {
            kept.push(device);
        } else if !privileged {
            let (path, (major, minor)) = (device.path().display(), numbers);
            return Err(refused(
                format!("device {path} (character {major}:{minor})"),
                "it belongs to the host and cannot be given to a virtual machine",
            ));
        }
    }
    linux.set_devices(Some(kept));
    Ok(())
}
