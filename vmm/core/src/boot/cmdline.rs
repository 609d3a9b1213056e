//! The kernel's command line for a machine of this VMM.
//! Pure: values in, text out.

use bulkhead_vmm_spec::Shape;

use crate::arch::layout;

/// What every machine is told, each with its reason.
const PARAMETERS: &[&str] = &[
    // Every byte of the console is two exits. Errors and panics still come through. First: the early console
    // begins with what was said before the kernel read it.
    "quiet",
    // The early console needs two exits where the port's driver, which gets no port, looks at it by 63. It
    // stays, and /dev/console leads to it by the kernel's log (CONFIG_TTY_PRINTK).
    "earlycon=uart8250,io,0x3f8",
    "keep_bootcon",
    "8250.nr_uarts=0",
    "console=ttyprintk",
    // A panic restarts at once; the machine ends then, and a dead guest is a dead process.
    "panic=-1",
    // Restart by triple fault: there is no firmware to ask.
    "reboot=t",
    // The pair of 8259s serves all devices there are; setting up an I/O APIC costs some 600 exits.
    "noapic",
    // Atomic instructions stay as they are for several processors: to patch 10,000 of them out for one, and
    // back in when a second comes, costs more than they do.
    "noreplace-smp",
];

/// How the kernel finds a device (drivers/virtio/virtio_mmio.c).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceWord {
    /// Number of the window.
    pub(crate) window: u32,
    /// Its interrupt line.
    pub(crate) irq: u32,
}

/// Everything that the command line says beside the shape's own words.
#[derive(Debug)]
pub(crate) struct Words<'a> {
    /// The devices, in the order of their numbers.
    pub(crate) devices: &'a [DeviceWord],
}

impl Words<'_> {
    /// Puts the command line together; what the shape adds comes last and thus wins.
    pub(crate) fn line(&self, shape: &Shape) -> String {
        let mut line = PARAMETERS.join(" ");
        if shape.max_vcpus > shape.vcpus {
            // The table names all; this many start, the others can be brought online.
            line.push_str(&format!(" maxcpus={}", shape.vcpus));
        }
        if shape.growth.0 > 0 {
            // What is plugged is used at once: for what can be moved out of it again, as long as there is enough
            // other memory for what cannot, which is three times as much (memory-hotplug.rst).
            line.push_str(" memhp_default_state=online memory_hotplug.online_policy=auto-movable");
        }
        for device in self.devices {
            let at = layout::VIRTIO + u64::from(device.window) * layout::VIRTIO_STEP;
            line.push_str(&format!(" virtio_mmio.device=512@{at:#x}:{}", device.irq));
        }
        for word in shape.cmdline.split_ascii_whitespace() {
            line.push(' ');
            line.push_str(word);
        }
        line
    }
}
