//! The kernel's command line for a machine of this backend.
//! Pure: text in, text out.

use bulkhead_vmm_spec::Shape;

use super::kept;

/// The longest command line of an x86 kernel, in bytes with its end (`COMMAND_LINE_SIZE`).
pub(super) const MAX_LEN: usize = 2048;
/// Room left for what is added to the shape's own words here and by QEMU, which describes each
/// device by `virtio_mmio.device=512@0x…:N`.
pub(super) const RESERVED_LEN: usize = 576;

/// What every machine of this backend is told, each with its reason. The times are CPU time from
/// QEMU's start to the guest's hello, one processor, of about 1,030 ms without those below
/// "reboot" (docs/emulation.md). What made no difference is left out: `cryptomgr.notests`,
/// `random.trust_cpu`, `rcupdate.rcu_expedited`, `8250.nr_uarts`, `nokaslr`.
const PARAMETERS: &[&str] = &[
    // The only console there is; QEMU hands it to us.
    "console=ttyS0",
    // A verbose console costs more than the rest of the boot. Errors and panics still come through.
    "quiet",
    // A panic restarts at once, and QEMU (-no-reboot) ends then: a dead guest is a dead process.
    "panic=-1",
    // Restart by triple fault: the machine has no ACPI and no keyboard controller to ask.
    "reboot=t",
    // Leaves the lock prefixes in a kernel that runs on one processor. To take out 11,000 of them is
    // to write to pages of code, which makes the translator forget what it knows: -120 ms.
    "noreplace-smp",
    // virtiofsd writes code to memory behind the translator's back, which must not take it for what was there before
    // (guest-image/kernel/virtiofs-rewrite.patch).
    "virtiofs.rewrite=1",
    // The interval timer works, and need not be watched for four ticks: -10 ms.
    "no_timer_check",
];

/// What a guest is told of its clock, given the frequency of its time stamp counter, which under this
/// translator is the host's. Left to itself the guest finds nothing to measure the counter with, and
/// keeps time by counting ticks: 4 ms coarse, late when the host is busy, and never idle, for the
/// ticks must come (29 ms of CPU a second in place of 5 to 10).
fn clock(tsc_khz: u32, vcpus: u32) -> String {
    let mut words = format!("tsc_early_khz={tsc_khz} tsc=reliable");
    if vcpus == 1 {
        // Ticks come from the interval timer, for the kernel measures that of the processor for
        // 200 ms, and cannot be told its frequency. Between several processors the ticks would have to
        // be handed on by interrupts, which costs five times what an idle guest does.
        words.push_str(" nolapic_timer");
    }
    words
}

/// What a guest is told of what it may be given later.
fn room(shape: &Shape) -> Vec<String> {
    let mut words = Vec::new();
    if shape.max_vcpus > shape.vcpus {
        words.push(format!("maxcpus={}", shape.vcpus));
    }
    if shape.growth.0 > 0 {
        words.push(format!("mem={}M", kept::boot_end(shape).0));
        // As on KVM (vmm/core/src/boot/cmdline.rs): in use at once, and movable where there is enough other memory.
        words.push("memhp_default_state=online memory_hotplug.online_policy=auto-movable".into());
    }
    words
}

/// Puts the command line together; what the shape adds comes last and thus wins.
pub(super) fn build(shape: &Shape, tsc_khz: Option<u32>) -> String {
    let clock = tsc_khz.map(|khz| clock(khz, shape.vcpus));
    let room = room(shape);
    let words = PARAMETERS.iter().copied().chain(clock.as_deref()).chain(room.iter().map(String::as_str));
    words.chain(shape.cmdline.split_ascii_whitespace()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use bulkhead_vmm_spec::SizeMib;

    use super::*;
    use crate::testing::shape_and_bindings;

    const ALWAYS: &str =
        "console=ttyS0 quiet panic=-1 reboot=t noreplace-smp virtiofs.rewrite=1 no_timer_check";

    #[test]
    fn golden_command_lines() {
        let (mut shape, _) = shape_and_bindings();
        shape.cmdline = "  agent.log=debug   quiet ".into();
        assert_eq!(build(&shape, None), format!("{ALWAYS} agent.log=debug quiet"));
        shape.cmdline = String::new();
        let clock = "tsc_early_khz=2299998 tsc=reliable";
        (shape.vcpus, shape.max_vcpus) = (1, 1);
        assert_eq!(build(&shape, Some(2_299_998)), format!("{ALWAYS} {clock} nolapic_timer"));
        (shape.vcpus, shape.max_vcpus) = (2, 2);
        assert_eq!(build(&shape, Some(2_299_998)), format!("{ALWAYS} {clock}"));
    }

    #[test]
    fn room_for_more_is_kept_from_the_guest() {
        let (mut shape, _) = shape_and_bindings();
        shape.cmdline = String::new();
        (shape.vcpus, shape.max_vcpus) = (1, 8);
        (shape.memory, shape.growth) = (SizeMib(4096), SizeMib(128));
        let room = "maxcpus=1 mem=5120M memhp_default_state=online memory_hotplug.online_policy=auto-movable";
        assert_eq!(build(&shape, None), format!("{ALWAYS} {room}"));
    }

    #[test]
    fn the_room_reserved_is_enough() {
        let (mut shape, _) = shape_and_bindings();
        shape.cmdline = String::new();
        (shape.vcpus, shape.max_vcpus) = (1, 255);
        shape.growth = SizeMib(128);
        let devices = 8 * " virtio_mmio.device=512@0xfeb00e00:12".len();
        assert!(build(&shape, Some(u32::MAX)).len() + devices < RESERVED_LEN);
    }
}
