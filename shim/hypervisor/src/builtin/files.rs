//! What a machine stands on: opened here, by name, for a process that opens nothing.
//! Knows files and what is wrong with them; sends nothing.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileTypeExt,
    path::Path,
};

use bulkhead_vmm_spec::{Bindings, Shape};

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
