//! The ioctls of a tap, and the one of vhost-net that the vhost crate keeps to itself.
//! One of the few files with unsafe code.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
};

use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

// linux/if_tun.h, as libc::c_ulong: _IOR('T', 210, unsigned int), _IOW('T', 208, unsigned int) and
// _IOW('T', 216, int).
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The flags that a tap was made with (IFF_*).
pub(super) fn interface_flags(tap: &impl AsRawFd) -> io::Result<libc::c_int> {
    // struct ifreq: a name of 16 bytes, then a union of 24 that begins with the flags.
    let mut request = [0u64; 5];
    // SAFETY: TUNGETIFF writes one struct ifreq, 40 bytes, which `request` has.
    checked(unsafe { ioctl_with_mut_ref(tap, TUNGETIFF, &mut request) })?;
    Ok(libc::c_int::from(request[2] as u16))
}

/// What the tap may leave undone to what it hands out.
pub(super) fn set_offload(tap: &impl AsRawFd, flags: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes a number and no memory.
    checked(unsafe { ioctl_with_val(tap, TUNSETOFFLOAD, flags.into()) })
}

/// Bytes of the header before each frame.
pub(super) fn set_header(tap: &impl AsRawFd, bytes: libc::c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int, which `bytes` is.
    checked(unsafe { ioctl_with_ref(tap, TUNSETVNETHDRSZ, &bytes) })
}

/// Whether calls on the descriptor answer instead of waiting.
pub(super) fn is_non_blocking(file: &impl AsRawFd) -> io::Result<bool> {
    // SAFETY: F_GETFL takes no argument and touches no memory of ours.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) } {
        -1 => Err(io::Error::last_os_error()),
        flags => Ok(flags & libc::O_NONBLOCK != 0),
    }
}

/// Ties a ring of vhost-net to a tap, or takes it away (`None`), after which it does not touch the ring.
pub(super) fn set_backend(vhost: &impl AsRawFd, ring: usize, tap: Option<RawFd>) -> io::Result<()> {
    let backend = vhost_vring_file { index: ring as u32, fd: tap.unwrap_or(-1) };
    // SAFETY: VHOST_NET_SET_BACKEND reads one vhost_vring_file, which `backend` is.
    checked(unsafe { ioctl_with_ref(vhost, VHOST_NET_SET_BACKEND(), &backend) })
}
