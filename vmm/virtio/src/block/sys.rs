//! What a disk's file is: its size, its block, what it was opened for.
//! One of the few files with unsafe code: ioctls on a block device, and fcntl.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileTypeExt},
};

use vmm_sys_util::ioctl::ioctl_with_mut_ref;

// linux/fs.h: BLKGETSIZE64 is _IOR(0x12, 114, size_t), BLKSSZGET is _IO(0x12, 104).
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
const BLKSSZGET: libc::c_ulong = 0x1268;

/// Bytes of the file or block device.
pub(super) fn size(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.file_type().is_file() {
        return Ok(metadata.len());
    }
    if !metadata.file_type().is_block_device() {
        let error = "a disk is a regular file or a block device, and this is neither";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
    }
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64, which `bytes` is.
    if unsafe { ioctl_with_mut_ref(file, BLKGETSIZE64, &mut bytes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes)
}

/// Bytes of a block that can be written by itself: 512 for a regular file.
pub(super) fn block_size(file: &File) -> io::Result<u32> {
    if file.metadata()?.file_type().is_file() {
        return Ok(super::SECTOR as u32);
    }
    let mut bytes: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int, which `bytes` is.
    if unsafe { ioctl_with_mut_ref(file, BLKSSZGET, &mut bytes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Whether the file was opened for writing too.
pub(super) fn is_writable(file: &File) -> io::Result<bool> {
    // SAFETY: F_GETFL takes no argument and touches no memory of ours.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) } {
        -1 => Err(io::Error::last_os_error()),
        flags => Ok(flags & libc::O_ACCMODE == libc::O_RDWR),
    }
}
