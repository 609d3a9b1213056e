//! The virtual machine in the kernel: its memory slots, interrupt lines and processors.
//! Knows KVM's interface (Documentation/virt/kvm/api.rst); knows no device.

mod cpu;
mod slots;
mod vm;

pub(crate) use cpu::Cpus;
pub(crate) use slots::Growth;
pub(crate) use vm::{KvmError, Vm};
