//! Command lines of the programs of one machine.
//! Pure: values in, words out; nothing here looks at the system.

use std::{
    ffi::OsString,
    os::{
        fd::RawFd,
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::Path,
};

use bulkhead_vmm_spec::{Bindings, Shape, SizeMib};

use super::{cmdline, drives, kept};
use crate::words::Words;

/// Every guest has this address on its vsock device: each has a device of its own.
const GUEST_CID: u32 = 3;

/// What is known of a machine only when its helpers are up.
#[derive(Clone, Debug)]
pub(super) struct Wiring<'a> {
    /// `-cpu`.
    pub(super) cpu: &'a str,
    /// Frequency of the time stamp counter, if it is to be trusted.
    pub(super) tsc_khz: Option<u32>,
    /// The file for the guest's memory, where more than it has at boot may be wanted.
    pub(super) memory: Option<RawFd>,
    /// Size of the buffer of translated code.
    pub(super) translation_buffer: SizeMib,
    /// Connection to virtiofsd, where the shape has a share.
    pub(super) share: Option<RawFd>,
    /// Connection to the vsock device.
    pub(super) vsock: RawFd,
    /// QEMU's driver for each block device: `file` or `host_device`.
    pub(super) block_drivers: &'a [&'static str],
    /// The tap of each network card.
    pub(super) taps: Vec<RawFd>,
    /// Disks for later, and whether each may only be read.
    pub(super) spares: &'a [bool],
    /// The connection by which they are changed, where there are any.
    pub(super) qmp: Option<RawFd>,
}

/// Arguments of QEMU.
pub(super) fn qemu(shape: &Shape, bindings: &Bindings, wiring: &Wiring<'_>) -> Vec<OsString> {
    let mut args = Words::default();
    // Nothing but what is asked for below: no configuration of the host, no default devices.
    args.word("-no-user-config").word("-nodefaults").word("-no-reboot");
    args.pair("-display", "none").pair("-monitor", "none");
    args.pair("-name", "bulkhead,debug-threads=on");
    // QEMU is told to forbid itself what it does not need: a guest that breaks out into it can
    // neither start programs nor gain rights.
    args.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    args.pair(
        "-machine",
        "microvm,acpi=off,rtc=on,pit=on,pic=on,isa-serial=on,graphics=off,memory-backend=memory",
    );
    args.pair("-accel", format!("tcg,thread=multi,tb-size={}", wiring.translation_buffer.0));
    args.pair("-cpu", wiring.cpu);
    // Room for a second processor even where there is one: only then does the translator keep the guest's
    // memory barriers and locked instructions (it asks max_cpus, not cpus). Without them the guest and the
    // device programs, which do run in parallel, miss each other's last ring entry now and then, and a
    // stream stands still for ever.
    // A microvm has no processors that come: all are there, and the guest starts as many as it is told.
    args.pair("-smp", format!("{},maxcpus={}", shape.max_vcpus, shape.max_vcpus.max(2)));
    // Shared, for the helpers map the guest's memory too. Pages are taken when they are touched.
    let (size, backend) = match wiring.memory {
        None => (shape.memory, "memory-backend-memfd,id=memory".to_owned()),
        Some(fd) => {
            (kept::total(shape), format!("memory-backend-file,id=memory,mem-path=/proc/self/fd/{fd}"))
        }
    };
    args.pair("-m", format!("{}M", size.0));
    args.pair("-object", format!("{backend},size={}M,share=on", size.0));
    args.option("-kernel", &bindings.kernel).option("-initrd", &bindings.initrd);
    args.pair("-append", cmdline::build(shape, wiring.tsc_khz));
    args.pair("-chardev", "stdio,id=console,signal=off").pair("-serial", "chardev:console");

    args.pair("-chardev", format!("socket,id=vsock,fd={}", wiring.vsock));
    args.pair("-device", "vhost-user-vsock-device,chardev=vsock");
    if let (Some(tag), Some(fd)) = (&shape.share_tag, wiring.share) {
        args.pair("-chardev", format!("socket,id=share,fd={fd}"));
        args.pair("-device", format!("vhost-user-fs-device,chardev=share,tag={}", escaped(tag)));
    }
    let blocks = shape.blocks.iter().zip(&bindings.blocks).zip(wiring.block_drivers);
    for (slot, ((block, binding), driver)) in blocks.enumerate() {
        let read_only = if block.read_only { "on" } else { "off" };
        let mut node = OsString::from(format!(
            "driver=raw,node-name=block{slot},read-only={read_only},discard=unmap,file.driver={driver},file.filename="
        ));
        node.push(escaped_path(&binding.path));
        args.pair("-blockdev", node);
        args.pair(
            "-device",
            format!("virtio-blk-device,drive=block{slot},serial={}", escaped(&block.serial)),
        );
    }
    for (slot, (net, fd)) in shape.nets.iter().zip(&wiring.taps).enumerate() {
        // The kernel moves no frames for a guest that is emulated: QEMU's own thread reads and writes the tap.
        args.pair("-netdev", format!("tap,id=net{slot},fd={fd},vhost=off"));
        let mtu = net.mtu.map(|mtu| format!(",host_mtu={mtu}")).unwrap_or_default();
        args.pair("-device", format!("virtio-net-device,netdev=net{slot},mac={}{mtu}", hex(&net.mac)));
    }
    for (option, value) in drives::words(wiring.spares) {
        args.pair(option, value);
    }
    if let Some(fd) = wiring.qmp {
        args.pair("-chardev", format!("socket,id=qmp,fd={fd}")).pair("-mon", "chardev=qmp,mode=control");
    }
    args.0
}

/// A hardware address as people write it.
fn hex(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Arguments of vhost-device-vsock, which makes both sockets.
pub(super) fn vsock(device: &Path, host: &Path) -> Vec<OsString> {
    let mut args = Words::default();
    args.pair("--guest-cid", GUEST_CID.to_string());
    args.option("--socket", device).option("--uds-path", host);
    args.0
}

/// In a list of QEMU's options a comma ends a value unless it is doubled.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

fn escaped_path(path: &Path) -> OsString {
    let mut out = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        out.push(byte);
        if byte == b',' {
            out.push(b',');
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests;
