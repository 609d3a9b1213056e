//! Plain data that describes one virtual machine: what the guest can see, and what on the host backs it.
//! Knows nothing of KVM, QEMU or containers, and does no I/O.

mod bindings;
mod shape;
pub mod wire;

pub use bindings::{Bindings, BlockBinding, NetBinding};
pub use shape::{BlockShape, NetShape, Shape, SizeMib};
