//! Registers at the first instruction: the 64-bit entry of the Linux boot protocol
//! (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"): long mode, flat segments, the first GiB mapped
//! one to one, RSI at the boot parameters. Chosen over PVH, which measured 260 exits more.

use std::io;

use bulkhead_virtio::Memory;
use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::layout;

/// Segment selectors as boot.rst wants them: code at 0x10, data at 0x18.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
/// CR0: protection, coprocessor error reporting, paging.
const CR0: u64 = 1 | 1 << 5 | 1 << 31;
/// CR4: physical address extension.
const CR4: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER: u64 = 1 << 8 | 1 << 10;
/// Page table entries: present and writable; a page of 2 MiB.
const PRESENT: u64 = 0b11;
const LARGE: u64 = 1 << 7;

fn segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        // Execute/read or read/write, accessed.
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Writes the descriptor table and the page tables that the first instruction runs on.
///
/// # Errors
/// Memory is too small for them.
pub(crate) fn write_tables(memory: &Memory) -> io::Result<()> {
    let put = |value: u64, at: u64| memory.write_obj(value, GuestAddress(at)).map_err(io::Error::other);
    // Null, unused, 64-bit code, data.
    for (n, entry) in [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].into_iter().enumerate() {
        put(entry, layout::GDT + 8 * n as u64)?;
    }
    let (upper, middle) = (layout::PAGE_TABLES + 0x1000, layout::PAGE_TABLES + 0x2000);
    put(upper | PRESENT, layout::PAGE_TABLES)?;
    put(middle | PRESENT, upper)?;
    for n in 0..512 {
        put(n << 21 | PRESENT | LARGE, middle + 8 * n)?;
    }
    Ok(())
}

/// Sets the registers of the processor that boots.
///
/// # Errors
/// KVM refuses a value.
pub(crate) fn boot(cpu: &VcpuFd, entry: GuestAddress) -> Result<(), kvm_ioctls::Error> {
    cpu.set_regs(&kvm_regs {
        // Bit 1 is always set; interrupts are off.
        rflags: 2,
        rip: entry.0,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: layout::ZERO_PAGE,
        ..kvm_regs::default()
    })?;
    let mut special = cpu.get_sregs()?;
    special.gdt.base = layout::GDT;
    special.gdt.limit = 4 * 8 - 1;
    special.idt.base = 0;
    special.idt.limit = 0;
    special.cs = segment(CODE, true);
    let data = segment(DATA, false);
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.cr0 = CR0;
    special.cr3 = layout::PAGE_TABLES;
    special.cr4 = CR4;
    special.efer = EFER;
    cpu.set_sregs(&special)?;
    // The state after FNINIT, and MXCSR as after reset (SDM 1, 8.1.5 and 10.2.3).
    cpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..kvm_fpu::default() })
}

/// Model-specific registers that differ from KVM's own reset values.
const MSRS: [(u32, u64); 1] = [
    // IA32_MISC_ENABLE: fast string operations, which firmware switches on (SDM 4, 2.1).
    (0x1a0, 1),
];

/// Sets the model-specific registers of any processor.
///
/// # Errors
/// KVM refuses one; its number is in the text.
pub(crate) fn set_msrs(cpu: &VcpuFd) -> io::Result<()> {
    let entries = MSRS.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(|_| io::Error::other("too many registers"))?;
    let set = cpu.set_msrs(&msrs).map_err(io::Error::from)?;
    match MSRS.get(set) {
        None => Ok(()),
        Some((index, _)) => Err(io::Error::other(format!("KVM refuses model-specific register {index:#x}"))),
    }
}
