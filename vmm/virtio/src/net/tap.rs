//! What the frames go through: a tap of the host; a socket stands for it in tests.
//! Knows nothing of rings.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsRawFd, RawFd},
};

use super::{HEADER, sys};

/// A descriptor where each read and write is one frame with its header.
pub(super) trait Tap: AsRawFd + Send {
    /// What may be left undone to what is read (TUN_F_* of Linux).
    fn set_offload(&self, flags: u32) -> io::Result<()>;

    /// Throws the next frame away. WouldBlock: there is none.
    fn discard(&self) -> io::Result<()>;
}

/// Enough of a frame to be taken from the queue: the rest of it is dropped.
const FRONT: usize = 64;

/// A tap of Linux.
pub(super) struct Kernel(File);

impl Kernel {
    /// Checks that it is a tap as this device needs it, and sets the length of its header.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        match sys::interface_flags(&file) {
            Ok(flags) if flags & wanted == wanted => {}
            Ok(_) => return refuse("the tap was not made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"),
            Err(error) => {
                let why = format!("the network's descriptor is no tap with an interface: {error}");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
            }
        }
        if !sys::is_non_blocking(&file)? {
            return refuse("the tap is not open with O_NONBLOCK");
        }
        sys::set_header(&file, HEADER as libc::c_int)?;
        Ok(Self(file))
    }
}

impl AsRawFd for Kernel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Tap for Kernel {
    fn set_offload(&self, flags: u32) -> io::Result<()> {
        sys::set_offload(&self.0, flags)
    }

    fn discard(&self) -> io::Result<()> {
        (&self.0).read(&mut [0; FRONT]).map(drop)
    }
}

/// A socket whose datagrams are frames with headers.
#[cfg(any(test, feature = "testing"))]
pub(super) struct Socket(pub(super) std::os::unix::net::UnixDatagram);

#[cfg(any(test, feature = "testing"))]
impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(any(test, feature = "testing"))]
impl Tap for Socket {
    fn set_offload(&self, _flags: u32) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self) -> io::Result<()> {
        self.0.recv(&mut [0; FRONT]).map(drop)
    }
}
