//! The kernel's command line for a machine of this backend.
//! Pure: text in, text out.

use bulkhead_vmm_spec::Shape;

/// The longest command line of an x86 kernel, in bytes with its end (`COMMAND_LINE_SIZE`).
pub(super) const MAX_LEN: usize = 2048;
/// Room left for what QEMU adds itself: one `virtio_mmio.device=512@0x…:N` for each device.
pub(super) const RESERVED_LEN: usize = 512;

/// What every machine of this backend is told, each with its reason. Parameters that made no
/// measurable difference are left out (see docs/emulation.md).
const PARAMETERS: &[&str] = &[
    // The only console there is; QEMU hands it to us.
    "console=ttyS0",
    // A verbose console costs more than the rest of the boot. Errors and panics still come through.
    "quiet",
    // A panic restarts at once, and QEMU (-no-reboot) ends then: a dead guest is a dead process.
    "panic=-1",
    // Restart by triple fault: the machine has no ACPI and no keyboard controller to ask.
    "reboot=t",
];

/// Puts the command line together; what the shape adds comes last and thus wins.
pub(super) fn build(shape: &Shape) -> String {
    let mut words: Vec<&str> = PARAMETERS.to_vec();
    words.extend(shape.cmdline.split_ascii_whitespace());
    words.join(" ")
}
