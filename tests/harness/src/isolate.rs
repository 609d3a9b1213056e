//! Namespaces of a worker thread: its own mounts, its own `/run`, its own network with a loopback only.
//! Knows nothing of containerd. What the thread starts inherits them; they vanish with the last process.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};

/// Takes the calling thread into namespaces of its own.
pub(crate) fn isolate_thread() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
        .context("new mount and network namespaces: the tests need root")?;
    // First away from the machine's own mounts, then shared among ourselves, as systemd leaves `/` on a
    // real host: a shim that mounts must cope with propagation.
    let root = Path::new("/");
    mount_change(root, MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("make / private")?;
    drop_foreign_mounts();
    mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), c"mode=755").context("mount a private /run")?;
    mount_change(root, MountPropagationFlags::SHARED | MountPropagationFlags::REC)
        .context("make / shared")?;
    let up =
        Command::new("ip").args(["link", "set", "lo", "up"]).output().context("run ip (package iproute2)")?;
    if !up.status.success() {
        bail!("ip link set lo up: {}", String::from_utf8_lossy(&up.stderr));
    }
    Ok(())
}

/// Lets go of what other programs of the machine have mounted: a copy of a mount in our namespace would
/// keep its file system busy for them, and its end would look like a loss to us.
fn drop_foreign_mounts() {
    let text = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let points = text.lines().filter_map(|l| l.split(' ').nth(4)).map(Path::new);
    let systems = ["/proc", "/sys", "/dev"];
    let foreign = |p: &&Path| *p != Path::new("/") && !systems.iter().any(|s| p.starts_with(s));
    let mut points: Vec<&Path> = points.filter(foreign).collect();
    points.sort_by_key(|p| std::cmp::Reverse(p.components().count()));
    for point in points {
        unmount(point, UnmountFlags::DETACH).ok();
    }
}
