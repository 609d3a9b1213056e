//! What on the host backs each slot of a [`crate::Shape`].
//! Knows paths and nothing else; the backend opens them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What backs a block device: a device node or a file of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockBinding {
    /// The node or file.
    pub path: PathBuf,
}

/// What backs a network card: a tap. One that does not exist is made, and goes with the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetBinding {
    /// Its name.
    pub tap: String,
    /// The network namespace that it is in, if not the caller's.
    pub netns: Option<PathBuf>,
}

/// The host's side of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bindings {
    /// Uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// Initial root file system (cpio, newc).
    pub initrd: PathBuf,
    /// Directory behind the virtio-fs device; present exactly where the shape has a share.
    pub share: Option<PathBuf>,
    /// Unix socket of the vsock device. Guest-to-host port N arrives at `<path>_<N>`.
    pub vsock: PathBuf,
    /// One for each block device of the shape, in the same order.
    pub blocks: Vec<BlockBinding>,
    /// One for each network card of the shape, in the same order.
    pub nets: Vec<NetBinding>,
    /// The network namespace that the VMM runs in, by which others find that of its pod; an empty one of its
    /// own if there is none.
    pub netns: Option<PathBuf>,
    /// Directory for the sockets of the machine's helper programs; private to the machine.
    pub run_dir: PathBuf,
}
