//! What a machine stands on: opened here, by name, for a process that opens nothing.
//! Knows files and what is wrong with them; sends nothing.
#![allow(unsafe_code)]

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use bulkhead_vmm_spec::{Bindings, NetBinding, Shape};
use nix::sched::{CloneFlags, setns};

use super::MINIMUM_MEMORY;
use crate::{LaunchError, probe};

/// Refuses what no machine of this backend can be, where the VMM could only say it by numbers.
pub(super) fn check(shape: &Shape, bindings: &Bindings) -> Result<(), LaunchError> {
    let impossible =
        |what: String, reason: &str| Err(LaunchError::Impossible { what, reason: reason.into() });
    if shape.memory < MINIMUM_MEMORY {
        return Err(LaunchError::MemoryTooSmall { asked: shape.memory, minimum: MINIMUM_MEMORY });
    }
    if shape.share_tag.is_some() != bindings.share.is_some() {
        return impossible("a share without its other half".into(), "it needs a tag and a directory");
    }
    if shape.blocks.len() != bindings.blocks.len() || shape.nets.len() != bindings.nets.len() {
        let what = format!(
            "{} block devices on {} files, {} network cards on {} taps",
            shape.blocks.len(),
            bindings.blocks.len(),
            shape.nets.len(),
            bindings.nets.len()
        );
        return impossible(what, "each needs one");
    }
    if let Some(share) = &bindings.share {
        std::fs::read_dir(share).map_err(|e| failed("share", share, e))?;
    }
    Ok(())
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> LaunchError {
    LaunchError::File { what, path: path.into(), source }
}

/// Opens /dev/kvm.
pub(super) fn kvm() -> Result<File, LaunchError> {
    let path = Path::new(probe::DEVICE);
    OpenOptions::new().read(true).write(true).open(path).map_err(|source| LaunchError::Kvm { source })
}

/// Opens a regular file for reading.
pub(super) fn regular(what: &'static str, path: &Path) -> Result<File, LaunchError> {
    let file = File::open(path).map_err(|e| failed(what, path, e))?;
    if file.metadata().map_err(|e| failed(what, path, e))?.is_file() {
        return Ok(file);
    }
    Err(failed(what, path, io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")))
}

/// Opens an image or a block device.
pub(super) fn disk(path: &Path, read_only: bool) -> Result<File, LaunchError> {
    let file = OpenOptions::new().read(true).write(!read_only).open(path);
    let file = file.map_err(|e| failed("block device", path, e))?;
    let kind = file.metadata().map_err(|e| failed("block device", path, e))?.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(file);
    }
    let source = io::Error::new(io::ErrorKind::InvalidInput, "neither a regular file nor a block device");
    Err(failed("block device", path, source))
}

/// Opens /dev/vhost-net, where the host has it.
pub(super) fn vhost_net() -> Option<File> {
    OpenOptions::new().read(true).write(true).open("/dev/vhost-net").ok()
}

/// Opens a tap that exists, in its network namespace.
pub(super) fn tap(net: &NetBinding) -> Result<File, LaunchError> {
    let NetBinding { tap, netns } = net.clone();
    let name = tap.clone();
    let opened = match netns {
        None => open_tap(&tap),
        // A thread's network namespace is its own: this one enters it, opens the tap and ends.
        Some(netns) => std::thread::spawn(move || enter(netns).and_then(|()| open_tap(&tap)))
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that opens it ended"))),
    };
    opened.map_err(|e| LaunchError::system(format!("open the tap {name}"), e))
}

fn enter(netns: PathBuf) -> io::Result<()> {
    Ok(setns(File::open(netns)?, CloneFlags::CLONE_NEWNET)?)
}

fn open_tap(name: &str) -> io::Result<File> {
    // From linux/if_tun.h: _IOW('T', 202, int).
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let tun =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: an all-zero ifreq is valid: integers and byte arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a name has 1 to 15 bytes"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the kernel reads and writes one ifreq, which outlives the call.
    match unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) } {
        0 => Ok(tun),
        _ => Err(io::Error::last_os_error()),
    }
}
