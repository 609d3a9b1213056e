//! What depends on the processor's architecture.

mod x86_64;

pub(crate) use x86_64::{boot_params, cpuid, layout, mptable, registers};
