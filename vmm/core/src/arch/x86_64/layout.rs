//! Where everything lies in the guest's address space.
//!
//! ```text
//!  0x0000_0500  GDT                  0x0000_6000  seed of the random numbers
//!                                    0x0000_7000  boot_params ("zero page")
//!  0x0000_9000  page tables          0x0002_0000  command line
//!  0x0009_fc00  MP table             0x0100_0000  kernel (as its ELF says)
//!  end of low memory - n             initrd
//!  0xc000_0000  hole for devices     0xd000_0000  virtio-mmio windows, 4 KiB apart
//!  0xfec0_0000  I/O APIC             0xfee0_0000  local APIC
//!  0xfffb_c000  KVM's identity map and TSS (Intel without unrestricted guest)
//!  0x1_0000_0000 high memory, then the window of memory that can be added
//! ```

/// Global descriptor table.
pub(crate) const GDT: u64 = 0x500;
/// More boot parameters (boot.rst, setup_data): a seed.
pub(crate) const SETUP_DATA: u64 = 0x6000;
/// The page of boot parameters (Documentation/arch/x86/zero-page.rst).
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Stack of the first processor, which the 64-bit entry does not use before it has its own.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
/// Page tables of the 64-bit entry.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// The longest command line with its end (COMMAND_LINE_SIZE of x86).
pub(crate) const CMDLINE_MAX: usize = 2048;
/// MP table, in the last KiB of conventional memory, where Linux looks for it (MP 1.4, 4).
pub(crate) const MP_TABLE: u64 = 0x9_fc00;
/// End of conventional memory; above lies what firmware would keep.
pub(crate) const CONVENTIONAL_END: u64 = 0xa_0000;
/// Memory beyond the first MiB; kernels are loaded from here on.
pub(crate) const ABOVE_1M: u64 = 0x10_0000;
/// Where our kernels begin (CONFIG_PHYSICAL_START); one that begins elsewhere is loaded there, too.
pub(crate) const KERNEL: u64 = 0x100_0000;
/// End of memory below the hole for devices.
pub(crate) const LOW_MEMORY_END: u64 = 0xc000_0000;
/// Memory beyond the hole.
pub(crate) const HIGH_MEMORY: u64 = 1 << 32;
/// Memory is added and taken in such blocks.
pub(crate) const GROWTH_ALIGN: u64 = 128 << 20;
/// The first virtio-mmio window.
pub(crate) const VIRTIO: u64 = 0xd000_0000;
/// From one virtio-mmio window to the next: a page, so that none shares one with another.
pub(crate) const VIRTIO_STEP: u64 = 0x1000;
/// I/O APIC.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Where KVM may keep a page of identity-mapped page tables.
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Where KVM may keep three pages of task state.
pub(crate) const KVM_TSS: usize = 0xfffb_d000;

/// Interrupt line of the serial port.
pub(crate) const SERIAL_IRQ: u32 = 4;
/// Interrupt lines that devices get, in turn; more devices than lines share them, which the driver
/// allows (IRQF_SHARED). All below 16, so that the pair of 8259s serves them: the guest runs without an
/// I/O APIC, whose registers cost some 600 exits at boot. 0, 1, 2, 8 and 13 are the PC's own.
pub(crate) const DEVICE_IRQS: [u32; 10] = [5, 6, 7, 9, 10, 11, 12, 14, 15, 3];
