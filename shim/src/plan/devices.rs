//! Which devices of a spec the guest has itself, and which cannot be given.
//! Knows device numbers; opens no device.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, Spec};

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

/// Leaves the devices that the guest has and refuses the others by name. A privileged container's list is
/// all of the host's devices: it gets all of the guest's and nothing else.
pub(super) fn translate(spec: &mut Spec, privileged: bool) -> Result<(), Fault> {
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    let mut kept = Vec::new();
    for device in linux.devices().clone().unwrap_or_default() {
        let numbers = (device.major(), device.minor());
        let word = match device.typ() {
            LinuxDeviceType::P => None,
            LinuxDeviceType::C | LinuxDeviceType::U if GUEST_DEVICES.contains(&numbers) => None,
            LinuxDeviceType::B => Some("block"),
            _ => Some("character"),
        };
        match word {
            None => kept.push(device),
            Some(_) if privileged => {}
            Some(word) => {
                let (path, (major, minor)) = (device.path().display(), numbers);
                return Err(refused(
                    format!("device {path} ({word} {major}:{minor})"),
                    "it belongs to the host and cannot be given to a virtual machine",
                ));
            }
        }
    }
    linux.set_devices(Some(kept));
    Ok(())
}
