//! Disks of the machine that stand for block devices of the host: those of its boot, and others that come and go.
//! Knows sysfs and device numbers; must not know whose devices they are.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use bulkhead_proto::agent::Disk;
use oci_spec::runtime::{Linux, LinuxDeviceType};

use crate::devices;

/// Where the kernel lists disks.
const BLOCK: &str = "/sys/block";

/// Numbers of a device: major, minor.
type Numbers = (i64, i64);

/// The guest's numbers for some of the host's.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disks(Vec<(Numbers, Numbers)>);

impl Disks {
    /// Finds the disks by their serial numbers. One that the kernel does not know yet came since it last looked. May
    /// block: the kernel reads what partitions there are.
    ///
    /// # Errors
    /// One is missing, or the kernel does not tell.
    pub(crate) fn find(wanted: &[Disk]) -> io::Result<Self> {
        let block = Path::new(BLOCK);
        for disk in wanted {
            match place(block, &disk.serial)? {
                Some(place) if size(&place)? == 0 => devices::look_anew(&place)?,
                Some(_) => {}
                None => devices::find_the_rest(),
            }
        }
        wanted.iter().map(|disk| Ok(((disk.major, disk.minor), numbers(block, &disk.serial)?))).collect()
    }

    /// The guest's numbers for a device of the host, if it has it.
    pub(crate) fn guests(&self, major: i64, minor: i64) -> Option<Numbers> {
        self.0.iter().find(|(host, _)| *host == (major, minor)).map(|(_, guest)| *guest)
    }

    /// Puts the guest's numbers in the place of the host's: in the list of devices and in the rules for them.
    pub(crate) fn translate(&self, linux: &mut Linux) {
        let mut devices = linux.devices().clone().unwrap_or_default();
        for device in devices.iter_mut().filter(|d| d.typ() == LinuxDeviceType::B) {
            if let Some((major, minor)) = self.guests(device.major(), device.minor()) {
                device.set_major(major).set_minor(minor);
            }
        }
        linux.set_devices(Some(devices));
        let Some(mut resources) = linux.resources().clone() else { return };
        let mut rules = resources.devices().clone().unwrap_or_default();
        for rule in rules.iter_mut().filter(|r| r.typ() == Some(LinuxDeviceType::B)) {
            if let (Some(major), Some(minor)) = (rule.major(), rule.minor())
                && let Some((major, minor)) = self.guests(major, minor)
            {
                rule.set_major(Some(major)).set_minor(Some(minor));
            }
        }
        resources.set_devices(Some(rules));
        linux.set_resources(Some(resources));
    }
}

impl FromIterator<(Numbers, Numbers)> for Disks {
    fn from_iter<T: IntoIterator<Item = (Numbers, Numbers)>>(pairs: T) -> Self {
        Self(pairs.into_iter().collect())
    }
}

/// Lets go of disks, so that the machine can take what is behind them. One that is not there is no error.
///
/// # Errors
/// The kernel does not let go.
pub(crate) fn leave(serials: &[String]) -> io::Result<()> {
    for serial in serials {
        if let Some(place) = place(Path::new(BLOCK), serial)? {
            devices::leave(&place)?;
        }
    }
    Ok(())
}

fn numbers(block: &Path, serial: &str) -> io::Result<Numbers> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, format!("the guest has no disk {serial}"));
    let numbers = said(&place(block, serial)?.ok_or_else(missing)?, "dev");
    let pair = numbers.split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    pair.ok_or_else(|| io::Error::other(format!("disk {serial} has the numbers {numbers:?}")))
}

/// Where sysfs has the disk with this serial number.
fn place(block: &Path, serial: &str) -> io::Result<Option<PathBuf>> {
    let mut places = fs::read_dir(block)?.flatten().map(|entry| entry.path());
    Ok(places.find(|place| said(place, "serial") == serial))
}

/// The size of a disk in sectors.
fn size(place: &Path) -> io::Result<u64> {
    let size = said(place, "size");
    size.parse().map_err(|_| io::Error::other(format!("{} has the size {size:?}", place.display())))
}

fn said(place: &Path, file: &str) -> String {
    fs::read_to_string(place.join(file)).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_disk_is_found_by_its_serial() {
        let dir = tempfile::tempdir().unwrap();
        for (name, serial, dev) in [("vda", "one", "254:0"), ("vdb", "two", "254:16")] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("serial"), serial).unwrap();
            fs::write(dir.path().join(name).join("dev"), format!("{dev}\n")).unwrap();
            fs::write(dir.path().join(name).join("size"), "2048\n").unwrap();
        }
        fs::create_dir(dir.path().join("loop0")).unwrap();
        assert_eq!(numbers(dir.path(), "two").unwrap(), (254, 16));
        assert_eq!(size(&place(dir.path(), "two").unwrap().unwrap()).unwrap(), 2048);
        let missing = numbers(dir.path(), "three").unwrap_err().to_string();
        assert_eq!(missing, "the guest has no disk three");
    }

    #[test]
    fn devices_and_their_rules_get_the_guests_numbers() {
        let mut linux: Linux = serde_json::from_value(json!({
            "devices": [
                {"path": "/dev/disk", "type": "b", "major": 8, "minor": 1},
                {"path": "/dev/null", "type": "c", "major": 8, "minor": 1},
            ],
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "b", "major": 8, "minor": 1, "access": "r"},
                {"allow": true, "type": "b", "major": 8, "minor": 2, "access": "r"},
            ]},
        }))
        .unwrap();
        let disks: Disks = [((8, 1), (254, 16))].into_iter().collect();
        disks.translate(&mut linux);
        let devices: Vec<_> = linux.devices().iter().flatten().map(|d| (d.major(), d.minor())).collect();
        assert_eq!(devices, [(254, 16), (8, 1)]);
        let resources = linux.resources().clone().unwrap();
        let rules: Vec<_> = resources.devices().iter().flatten().map(|r| (r.major(), r.minor())).collect();
        assert_eq!(rules, [(None, None), (Some(254), Some(16)), (Some(8), Some(2))]);
    }
}
