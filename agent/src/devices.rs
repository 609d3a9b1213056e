//! Devices that the machine held back: the kernel found their places empty when it booted, so that it reached
//! us sooner. And those that come and go. Knows sysfs; must not know what the devices are for.

use std::{fs, io, path::Path};

/// Where the kernel lists what its command line named.
const DEVICES: &str = "/sys/bus/platform/devices";
/// The driver that looks into a place when it is told a place's name.
const BIND: &str = "/sys/bus/platform/drivers/virtio-mmio/bind";
/// And that leaves it.
const UNBIND: &str = "/sys/bus/platform/drivers/virtio-mmio/unbind";
const PREFIX: &str = "virtio-mmio.";

/// Has the driver look again into every place without a device, in the order of their numbers: disks and
/// network cards get their names in this order. A machine that holds nothing back has no such place.
pub(crate) fn find_the_rest() {
    let found = places(Path::new(DEVICES)).and_then(|places| {
        for place in places {
            match fs::write(BIND, &place) {
                // Still empty: room for a device that may come later.
                Err(e) if e.raw_os_error() == Some(libc::ENODEV) => {}
                Err(e) => return Err(io::Error::new(e.kind(), format!("{place}: {e}"))),
                Ok(()) => {}
            }
        }
        Ok(())
    });
    if let Err(error) = found {
        tracing::error!(%error, "the machine's devices cannot be found");
    }
}

/// Has the driver look again into the place of a device: what is there may have changed. `device` is anything that
/// sysfs has below it.
pub(crate) fn look_anew(device: &Path) -> io::Result<()> {
    let place = place_of(device)?;
    tell(UNBIND, &place)?;
    tell(BIND, &place)
}

/// Has the driver leave the place of a device, which the machine may then take.
pub(crate) fn leave(device: &Path) -> io::Result<()> {
    tell(UNBIND, &place_of(device)?)
}

fn tell(file: &str, place: &str) -> io::Result<()> {
    fs::write(file, place).map_err(|e| io::Error::new(e.kind(), format!("{place}: {e}")))
}

/// The name of the place that a device is in: `/sys/devices/platform/virtio-mmio.3/virtio3/block/vda` is in
/// `virtio-mmio.3`.
fn place_of(device: &Path) -> io::Result<String> {
    let path = fs::canonicalize(device)?;
    let names = path.components().filter_map(|part| part.as_os_str().to_str());
    let place = names.into_iter().find(|name| name.starts_with(PREFIX));
    place.map(str::to_owned).ok_or_else(|| {
        let text = format!("{} is not in a place that changes", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, text)
    })
}

/// The names of the places that no driver serves, by their numbers.
fn places(devices: &Path) -> io::Result<Vec<String>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(devices)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|n| n.strip_prefix(PREFIX)?.parse::<u32>().ok());
        if let Some(number) = number.filter(|_| !entry.path().join("driver").exists()) {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers.into_iter().map(|n| format!("{PREFIX}{n}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_without_a_driver_come_by_number() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["virtio-mmio.10", "virtio-mmio.9", "virtio-mmio.0/driver", "serial8250", "virtio-mmio.x"]
        {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        assert_eq!(places(dir.path()).unwrap(), ["virtio-mmio.9", "virtio-mmio.10"]);
    }

    #[test]
    fn the_place_of_a_device_is_in_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("virtio-mmio.3/virtio2/block/vda");
        fs::create_dir_all(&disk).unwrap();
        std::os::unix::fs::symlink(&disk, dir.path().join("vda")).unwrap();
        assert_eq!(place_of(&dir.path().join("vda")).unwrap(), "virtio-mmio.3");
        assert!(place_of(dir.path()).is_err());
    }
}
