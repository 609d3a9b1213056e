//! What of the host's storage a container sees: its root and its bind mounts, gathered in the share, and disks.
//! Knows mounts, devices and paths of the host, nothing of the guest beyond the share's layout.

mod disk;
mod idmap;
mod memory;
mod mount;
mod places;
mod pod;
mod points;
mod share;
mod socket;
mod volume;

pub use disk::{DiskError, Disks, binding, shape};
pub use memory::MemoryVolume;
pub use mount::{MountError, bind, make_read_only, mount};
pub use places::Places;
pub use pod::PodFiles;
pub use share::{Share, ShareError, Shown};
pub use socket::{Facts, HostSocket, NotAllowed, find as find_sockets};
pub use volume::{Follower, Volume, version};
