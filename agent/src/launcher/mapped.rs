//! What a container in a user namespace cannot do for itself, since its root is nobody in the guest.
//! Knows files and limits; the namespace is made by `podns`, and entered by libcontainer and `join`.
//!
//! libcontainer enters the user namespace first and does everything else from within.

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::AT_FDCWD,
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        stat::{FchmodatFlags, Mode, SFlag, fchmodat, makedev, mknod},
    },
    unistd::{Gid, Uid, chown, setfsgid, setfsuid},
};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount, PosixRlimit, PosixRlimitType, Process};

use super::{
    Create,
    last_mile::{own_stream, why},
};
use crate::users::Users;

/// Nodes of devices, on a file system that allows them.
const DEVICES: &str = "/dev/bulkhead";

/// Devices that every container has (OCI runtime specification, config-linux.md, "Default Devices"); libcontainer binds
/// the guest's own.
const DEFAULT_DEVICES: [(&str, i64, i64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Where the nodes of a container's devices lie.
pub(super) fn devices(id: &str) -> PathBuf {
    Path::new(DEVICES).join(id)
}

/// Does with the guest's powers what is needed before they are given up.
pub(super) fn prepare(create: &mut Create, users: &Users, stdio: &[OwnedFd]) -> Result<(), String> {
    give_streams(stdio, users)?;
    if let Some(process) = create.spec.process() {
        raise_limits(process)?;
    }
    bind_devices(create, users)
}

/// Makes streams the container's root's, who gives them to the user that it becomes.
pub(super) fn give_streams(stdio: &[OwnedFd], users: &Users) -> Result<(), String> {
    let (uid, gid) = users.root();
    for stream in stdio {
        own_stream(stream.as_fd(), uid, Some(gid))
            .map_err(|e| format!("give the streams to uid {uid}: {}", why(&e)))?;
    }
    Ok(())
}

/// Only who has power in the guest may raise a hard limit. Those that are to be higher are raised, so that all can be
/// set from within; nothing comes of it until then.
pub(super) fn raise_limits(process: &Process) -> Result<(), String> {
    for rlimit in process.rlimits().iter().flatten() {
        let failed = |e: nix::Error| format!("raise {}: {}", rlimit.typ(), why(&e.into()));
        let resource = resource(rlimit);
        let (soft, hard) = getrlimit(resource).map_err(failed)?;
        if rlimit.hard() > hard {
            setrlimit(resource, soft, rlimit.hard()).map_err(failed)?;
        }
    }
    Ok(())
}

fn resource(rlimit: &PosixRlimit) -> Resource {
    match rlimit.typ() {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    }
}

/// No node can be made in a user namespace. Ours are made outside, and bound to where the specification has them;
/// libcontainer would bind what the guest has at the same path, whatever that is.
fn bind_devices(create: &mut Create, users: &Users) -> Result<(), String> {
    let Some(mut linux) = create.spec.linux().clone() else { return Ok(()) };
    let mut mounts = create.spec.mounts().clone().unwrap_or_default();
    let mut kept = Vec::new();
    for (number, device) in linux.devices().clone().unwrap_or_default().into_iter().enumerate() {
        let path = device.path();
        // Always that of the container's own terminals.
        if path == Path::new("/dev/ptmx") {
            continue;
        }
        let numbers = (device.major(), device.minor());
        match DEFAULT_DEVICES.iter().find(|(default, ..)| path == Path::new(default)) {
            Some(&(_, major, minor)) if numbers == (major, minor) => kept.push(device),
            Some(_) => {
                return Err(format!(
                    "linux.devices: {} is another device in every container",
                    path.display()
                ));
            }
            None => {
                let node = devices(&create.id).join(number.to_string());
                make_node(&device, &node, users)
                    .map_err(|e| format!("make a node for device {}: {}", path.display(), why(&e.into())))?;
                let mut mount = Mount::default();
                mount
                    .set_destination(path.clone())
                    .set_typ(Some("bind".into()))
                    .set_source(Some(node))
                    .set_options(Some(["bind", "nosuid", "noexec"].map(str::to_owned).to_vec()));
                mounts.push(mount);
            }
        }
    }
    linux.set_devices(Some(kept));
    create.spec.set_linux(Some(linux)).set_mounts(Some(mounts));
    Ok(())
}

fn make_node(device: &LinuxDevice, node: &Path, users: &Users) -> nix::Result<()> {
    let kind = match device.typ() {
        LinuxDeviceType::B => SFlag::S_IFBLK,
        LinuxDeviceType::P => SFlag::S_IFIFO,
        LinuxDeviceType::A | LinuxDeviceType::C | LinuxDeviceType::U => SFlag::S_IFCHR,
    };
    let mode = Mode::from_bits_truncate(device.file_mode().unwrap_or(0o666));
    let numbers = makedev(device.major() as u64, device.minor() as u64);
    if let Some(dir) = node.parent() {
        fs::create_dir_all(dir).map_err(|e| nix::Error::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
    }
    mknod(node, kind, mode, numbers)?;
    // Past the umask.
    fchmodat(AT_FDCWD, node, mode, FchmodatFlags::FollowSymlink)?;
    // Who is not mapped cannot own anything in the container.
    let uid = users.uid(device.uid().unwrap_or(0)).ok_or(nix::Error::EINVAL)?;
    let gid = users.gid(device.gid().unwrap_or(0)).ok_or(nix::Error::EINVAL)?;
    chown(node, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
}

/// Does something with files as the container's root would, who owns what is made.
pub(super) fn as_root_of<T>(users: Option<&Users>, work: impl FnOnce() -> T) -> T {
    let Some(users) = users else { return work() };
    let (uid, gid) = users.root();
    let before = (setfsgid(Gid::from_raw(gid)), setfsuid(Uid::from_raw(uid)));
    let done = work();
    setfsuid(before.1);
    setfsgid(before.0);
    done
}
