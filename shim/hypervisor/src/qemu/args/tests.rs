use bulkhead_vmm_spec::{BlockBinding, BlockShape, NetShape};

use super::*;
use crate::testing::shape_and_bindings;

fn wiring() -> Wiring<'static> {
    Wiring {
        cpu: "max,-cx16",
        tsc_khz: Some(2_300_000),
        memory: None,
        translation_buffer: SizeMib(128),
        share: Some(11),
        vsock: 12,
        block_drivers: &[],
        taps: Vec::new(),
        spares: &[],
        qmp: None,
    }
}

/// One option and its value a line, as a person would write them.
fn shown(args: &[OsString]) -> String {
    let mut out = String::new();
    for arg in args {
        let arg = arg.to_str().unwrap();
        out.push_str(if arg.starts_with('-') { "\n" } else { " " });
        out.push_str(arg);
    }
    out.push('\n');
    out
}

#[test]
fn golden_machine_with_a_share() {
    let (shape, bindings) = shape_and_bindings();
    let expected = "
-no-user-config
-nodefaults
-no-reboot
-display none
-monitor none
-name bulkhead,debug-threads=on
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine microvm,acpi=off,rtc=on,pit=on,pic=on,isa-serial=on,graphics=off,memory-backend=memory
-accel tcg,thread=multi,tb-size=128
-cpu max,-cx16
-smp 2,maxcpus=2
-m 256M
-object memory-backend-memfd,id=memory,size=256M,share=on
-kernel /k/vmlinux
-initrd /k/initrd
-append console=ttyS0 quiet panic=-1 reboot=t noreplace-smp virtiofs.rewrite=1 no_timer_check tsc_early_khz=2300000 tsc=reliable agent.log=debug
-chardev stdio,id=console,signal=off
-serial chardev:console
-chardev socket,id=vsock,fd=12
-device vhost-user-vsock-device,chardev=vsock
-chardev socket,id=share,fd=11
-device vhost-user-fs-device,chardev=share,tag=share
";
    assert_eq!(shown(&qemu(&shape, &bindings, &wiring())), expected);
}

#[test]
fn golden_network_cards() {
    let (mut shape, bindings) = shape_and_bindings();
    shape.nets = vec![
        NetShape { mac: [2, 0xb, 0, 0, 0, 0], mtu: None },
        NetShape { mac: [2, 0xb, 0, 0, 0, 1], mtu: Some(9000) },
    ];
    let mut wiring = wiring();
    wiring.taps = vec![13, 14];
    let shown = shown(&qemu(&shape, &bindings, &wiring));
    let expected = "
-netdev tap,id=net0,fd=13,vhost=off
-device virtio-net-device,netdev=net0,mac=02:0b:00:00:00:00
-netdev tap,id=net1,fd=14,vhost=off
-device virtio-net-device,netdev=net1,mac=02:0b:00:00:00:01,host_mtu=9000
";
    assert!(shown.ends_with(expected), "{shown}");
}

#[test]
fn golden_block_devices() {
    let (mut shape, mut bindings) = shape_and_bindings();
    shape.share_tag = None;
    bindings.share = None;
    shape.blocks = vec![
        BlockShape { serial: "base".into(), read_only: true },
        BlockShape { serial: "data,1".into(), read_only: false },
    ];
    bindings.blocks =
        vec![BlockBinding { path: "/var/a,b.img".into() }, BlockBinding { path: "/dev/loop7".into() }];
    let wiring = Wiring { share: None, block_drivers: &["file", "host_device"], ..wiring() };
    let text = shown(&qemu(&shape, &bindings, &wiring));
    let devices = &text[text.find("\n-device").unwrap()..];
    assert_eq!(
        devices,
        "
-device vhost-user-vsock-device,chardev=vsock
-blockdev driver=raw,node-name=block0,read-only=on,discard=unmap,file.driver=file,file.filename=/var/a,,b.img
-device virtio-blk-device,drive=block0,serial=base
-blockdev driver=raw,node-name=block1,read-only=off,discard=unmap,file.driver=host_device,file.filename=/dev/loop7
-device virtio-blk-device,drive=block1,serial=data,,1
"
    );
}

#[test]
fn golden_disks_for_later() {
    let (shape, bindings) = shape_and_bindings();
    let wiring = Wiring { spares: &[false, true], qmp: Some(15), ..wiring() };
    let shown = shown(&qemu(&shape, &bindings, &wiring));
    let expected = "
-blockdev driver=null-co,node-name=nothing0,size=0
-blockdev driver=raw,node-name=spare0,read-only=off,discard=unmap,file=nothing0
-device virtio-blk-device,drive=spare0,serial=spare0
-blockdev driver=null-co,node-name=nothing1,size=0
-blockdev driver=raw,node-name=spare1,read-only=on,discard=unmap,file=nothing1
-device virtio-blk-device,drive=spare1,serial=spare1
-chardev socket,id=qmp,fd=15
-mon chardev=qmp,mode=control
";
    assert!(shown.ends_with(expected), "{shown}");
}

#[test]
fn golden_vsock() {
    assert_eq!(
        shown(&vsock(Path::new("/r/vhost-vsock"), Path::new("/r/vsock"))),
        "
--guest-cid 3
--socket /r/vhost-vsock
--uds-path /r/vsock
"
    );
}

#[test]
fn golden_room_for_more() {
    let (mut shape, bindings) = shape_and_bindings();
    (shape.vcpus, shape.max_vcpus) = (1, 4);
    (shape.memory, shape.growth) = (SizeMib(200), SizeMib(1024));
    let wiring = Wiring { memory: Some(9), ..wiring() };
    let shown = shown(&qemu(&shape, &bindings, &wiring));
    for line in [
        "-smp 4,maxcpus=4",
        "-m 1280M",
        "-object memory-backend-file,id=memory,mem-path=/proc/self/fd/9,size=1280M,share=on",
    ] {
        assert!(shown.contains(&format!("\n{line}\n")), "{shown}");
    }
}
