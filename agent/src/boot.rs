//! From the kernel's hand-over to a machine that can hold containers, and the end of that machine.
//! Knows file systems and cgroup roots; must not know containers.

use std::{fs, io, path::Path};

use anyhow::Context;
use nix::{
    mount::{MsFlags, mount},
    sys::reboot::{RebootMode, reboot},
    unistd::{chdir, chroot, dup2_stderr, dup2_stdin, dup2_stdout},
};

use crate::cgroup;

/// What is ours below /run.
pub(crate) const RUN_DIR: &str = "/run/bulkhead";

const FAST: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Source and type, target, flags, data: in order, since some lie on others.
const MOUNTS: &[(&str, &str, MsFlags, &str)] = &[
    ("proc", "/proc", FAST, ""),
    ("sysfs", "/sys", FAST, ""),
    ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755"),
    ("devpts", "/dev/pts", MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC), "mode=0620,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", FAST, "mode=1777"),
    ("tmpfs", "/run", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), "mode=0755"),
    ("tmpfs", "/tmp", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), "mode=1777"),
    ("cgroup2", cgroup::ROOT, FAST, "nsdelegate,memory_recursiveprot"),
];

/// Mounts what containers and we need, opens the console, enables every cgroup controller, sets `lo` up.
pub(crate) fn prepare() -> anyhow::Result<()> {
    leave_rootfs().context("make a root that containers can pivot from")?;
    for (kind, target, flags, data) in MOUNTS {
        fs::create_dir_all(target).with_context(|| format!("create {target}"))?;
        mount(Some(*kind), *target, Some(*kind), *flags, Some(*data))
            .or_else(|e| if e == nix::Error::EBUSY { Ok(()) } else { Err(e) })
            .with_context(|| format!("mount {kind} at {target}"))?;
    }
    open_console().context("open /dev/console")?;
    for dir in [RUN_DIR, crate::netns::DIR] {
        fs::create_dir_all(dir).with_context(|| format!("create {dir}"))?;
    }
    cgroup::enable_controllers(Path::new(cgroup::ROOT))?;
    fs::create_dir_all(cgroup::PODS).with_context(|| format!("create {}", cgroup::PODS))?;
    cgroup::enable_controllers(Path::new(cgroup::PODS))?;
    crate::sys::loopback_up().context("set lo up")?;
    Ok(())
}

/// The kernel's command line; empty if it cannot be read.
pub(crate) fn cmdline() -> String {
    fs::read_to_string("/proc/cmdline").unwrap_or_default()
}

/// Writes everything out and ends the machine.
pub(crate) fn end_machine() -> ! {
    nix::unistd::sync();
    // A machine without ACPI cannot power off, it halts and the host would wait for ever; a reset ends the
    // VMM, which is told not to boot again.
    let Err(e) = reboot(RebootMode::RB_AUTOBOOT);
    panic!("end the machine: {e}")
}

/// The kernel refuses pivot_root away from its first root, an initramfs. A bind of it, moved on top of it,
/// is a mount like any other.
fn leave_rootfs() -> io::Result<()> {
    const NEW: &str = "/newroot";
    fs::create_dir_all(NEW)?;
    mount(Some("/"), NEW, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    chdir(NEW)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    chdir("/")?;
    fs::remove_dir(NEW)
}

/// The kernel may have started us without a console, or with one of the old root.
fn open_console() -> io::Result<()> {
    let console = fs::OpenOptions::new().write(true).open("/dev/console")?;
    dup2_stdin(fs::File::open("/dev/null")?)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)?;
    Ok(())
}
