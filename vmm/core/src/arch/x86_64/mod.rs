//! A PC without firmware: what the guest finds in memory and in its registers at the first instruction.

pub(crate) mod boot_params;
pub(crate) mod cpuid;
pub(crate) mod layout;
pub(crate) mod mptable;
pub(crate) mod registers;
