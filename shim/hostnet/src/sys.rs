//! The one system call that no crate wraps: making a tap.
//! Knows no namespace: a tap is made in that of the calling thread.

#![allow(unsafe_code)]

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use crate::{NetError, error::Doing};

/// Opens the tap `name` with IFF_NO_PI and IFF_VNET_HDR and one queue, not blocking; makes it if there is none.
/// A tap that was made here goes when the last copy of the descriptor is closed.
///
/// # Errors
/// [`NetError::Busy`] when somebody holds it; the name has no 1 to 15 bytes; the host has no /dev/net/tun.
pub fn open_tap(name: &str) -> Result<OwnedFd, NetError> {
    // From linux/if_tun.h: _IOW('T', 202, int).
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "a name has 1 to 15 bytes");
        return Err(error).doing(|| format!("make the tap {name}"));
    }
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .doing(|| "open /dev/net/tun (module tun)".into())?;
    // SAFETY: an all-zero ifreq is valid: integers and byte arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the kernel reads and writes one ifreq, which outlives the call.
    if unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) } == 0 {
        return Ok(tun.into());
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::EBUSY) => Err(NetError::Busy(name.to_owned())),
        e => Err(e).doing(|| format!("make the tap {name}")),
    }
}
