//! Block devices of the host for containers of a pod that runs already.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use harness::{Context, Pod, Run, Test};
use serde_json::json;

use crate::SLEEPER;

pub(crate) const TESTS: &[Test] = &[
    Test::common("disks::one_is_written_to_and_given_back", written_and_given_back),
    Test::common("disks::one_that_may_only_be_read", only_read),
    Test::common("disks::containers_of_a_pod_share_one", shared),
    Test::bulkhead("disks::more_than_the_machine_has_room_for", OURS, too_many),
    Test::bulkhead("disks::none_with_no_room", OURS, no_room),
];

const OURS: &str = "only a machine has room for some number of disks";

/// A block device of the host on a file of the test's own.
struct Device {
    path: String,
    file: PathBuf,
    /// Its number is ours only as long as this holds.
    attached: bool,
}

impl Device {
    /// One of `mib` MiB that begins with the line `name`.
    fn new(t: &Context<'_>, name: &str, mib: usize) -> Result<Self> {
        let file = t.dir().join(name);
        let mut content = vec![0; mib << 20];
        content[..=name.len()].copy_from_slice(format!("{name}\n").as_bytes());
        fs::write(&file, content)?;
        let path = Run::new("losetup").args(["--find", "--show"]).arg(&file).output()?.ok()?.out();
        Ok(Self { path, file, attached: true })
    }

    /// Whether the host's kernel could let go of it at once: nobody has it open.
    fn detach(&mut self) -> Result<bool> {
        self.attached = false;
        Run::new("losetup").arg("--detach").arg(&self.path).output()?.ok()?;
        let left = Run::new("losetup").arg("--associated").arg(&self.file).output()?.ok()?.out();
        Ok(left.is_empty())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.attached {
            let _ = self.detach();
        }
    }
}

/// Starts a container that has the devices as /dev/disk0, /dev/disk1, …
fn with_devices(t: &Context<'_>, pod: &Pod, name: &str, devices: &[(&Device, &str)]) -> Result<String> {
    let device = |(n, (device, permissions)): (usize, &(&Device, &str))| json!({ "container_path": format!("/dev/disk{n}"), "host_path": device.path, "permissions": permissions });
    let devices: Vec<_> = devices.iter().enumerate().map(device).collect();
    let id = t.create_in(pod, name, SLEEPER, |c| c["devices"] = json!(devices))?;
    t.crictl_ok(&["start", &id])?;
    Ok(id)
}

fn written_and_given_back(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    // Each takes the place of the one before, and has another size.
    for (name, mib) in [("first", 2), ("second", 5)] {
        let mut device = Device::new(t, name, mib)?;
        let id = with_devices(t, &pod, name, &[(&device, "rwm")])?;
        let said = t.exec_in(&id, "head -n 1 /dev/disk0; wc -c </dev/disk0")?;
        ensure!(said == format!("{name}\n{}", mib << 20), "{said}");
        t.exec_in(&id, "echo written | dd of=/dev/disk0 bs=512 seek=1 conv=fsync 2>/dev/null")?;
        let disk = fs::read(&device.file)?;
        ensure!(disk[512..].starts_with(b"written\n"), "what the container wrote is not on the device");
        t.crictl_ok(&["rm", "--force", &id])?;
        ensure!(device.detach()?, "the container is gone, and somebody has its device open");
    }
    t.remove_pod(&pod)
}

fn only_read(t: &mut Context<'_>) -> Result<()> {
    let device = Device::new(t, "precious", 1)?;
    let pod = t.pod("p", |_| {})?;
    let id = with_devices(t, &pod, "a", &[(&device, "rm")])?;
    let said = t.exec_in(&id, "head -n 1 /dev/disk0; { echo x >/dev/disk0; } 2>&1; true")?;
    ensure!(said.starts_with("precious\n"), "{said}");
    ensure!(said.contains("Operation not permitted") || said.contains("Permission denied"), "{said}");
    t.remove_pod(&pod)?;
    ensure!(fs::read(&device.file)?.starts_with(b"precious\n"), "it was written to");
    Ok(())
}

fn shared(t: &mut Context<'_>) -> Result<()> {
    let device = Device::new(t, "common", 1)?;
    let pod = t.pod("p", |_| {})?;
    let one = with_devices(t, &pod, "one", &[(&device, "rwm")])?;
    let two = with_devices(t, &pod, "two", &[(&device, "rwm")])?;
    t.exec_in(&one, "echo from one | dd of=/dev/disk0 bs=512 seek=1 conv=fsync 2>/dev/null")?;
    t.crictl_ok(&["rm", "--force", &one])?;
    let said = t.exec_in(&two, "dd if=/dev/disk0 bs=512 skip=1 count=1 2>/dev/null | head -n 1")?;
    ensure!(said == "from one", "{said}");
    t.remove_pod(&pod)
}

fn too_many(t: &mut Context<'_>) -> Result<()> {
    t.set_config("storage", "spare_disks", 1.into())?;
    let (first, second) = (Device::new(t, "first", 1)?, Device::new(t, "second", 1)?);
    let pod = t.pod("p", |_| {})?;
    let id = with_devices(t, &pod, "a", &[(&first, "rwm")])?;
    let refused = with_devices(t, &pod, "b", &[(&second, "rwm")]).unwrap_err().to_string();
    ensure!(refused.contains("block device /dev/disk0 (7:"), "{refused}");
    ensure!(
        refused.contains("storage.spare_disks") || refused.contains("no spare slot is free"),
        "{refused}"
    );
    let said = t.exec_in(&id, "head -n 1 /dev/disk0")?;
    ensure!(said == "first", "the pod does not go on: {said}");
    t.crictl_ok(&["rm", "--force", &id])?;
    let id = with_devices(t, &pod, "c", &[(&second, "rwm")])?;
    let said = t.exec_in(&id, "head -n 1 /dev/disk0")?;
    ensure!(said == "second", "the place that became free is not used: {said}");
    t.remove_pod(&pod)
}

fn no_room(t: &mut Context<'_>) -> Result<()> {
    t.set_config("storage", "spare_disks", 0.into())?;
    let device = Device::new(t, "d", 1)?;
    let pod = t.pod("p", |_| {})?;
    let refused = with_devices(t, &pod, "a", &[(&device, "rwm")]).unwrap_err().to_string();
    ensure!(refused.contains("made without room for more disks (storage.spare_disks)"), "{refused}");
    t.remove_pod(&pod)
}
