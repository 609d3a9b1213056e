//! What of the host's file systems a container sees: its root and its bind mounts, gathered in the share.
//! Knows mounts and paths of the host, nothing of the guest beyond the share's layout.

mod mount;
mod pod;
mod share;

pub use mount::{MountError, mount};
pub use pod::PodFiles;
pub use share::{Share, ShareError};
