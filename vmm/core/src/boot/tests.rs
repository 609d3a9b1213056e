use std::{io::Write, sync::Arc};

use bulkhead_vmm_spec::SizeMib;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::*;

fn file(content: &[u8]) -> File {
    let mut file = File::from(memfd_create("test", MFdFlags::empty()).unwrap());
    file.write_all(content).unwrap();
    file
}

fn memory(mib: usize) -> Memory {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap())
}

fn shape(mib: u64) -> Shape {
    Shape {
        vcpus: 1,
        max_vcpus: 2,
        memory: SizeMib(mib),
        growth: SizeMib(0),
        cmdline: "  agent.log=debug  quiet ".into(),
        share_tag: None,
        blocks: Vec::new(),
        nets: Vec::new(),
        spare_slots: 0,
    }
}

/// The smallest kernel there is: one program segment at 16 MiB.
fn kernel() -> Vec<u8> {
    let mut elf = vec![0; 64 + 56];
    elf[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2u16.to_le_bytes()); // executable
    put(18, &62u16.to_le_bytes()); // x86-64
    put(20, &1u32.to_le_bytes());
    put(24, &0x100_0000u64.to_le_bytes()); // entry
    put(32, &64u64.to_le_bytes()); // program headers
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes()); // load
    put(72, &120u64.to_le_bytes()); // offset
    put(88, &0x100_0000u64.to_le_bytes()); // physical address
    put(96, &4u64.to_le_bytes()); // in the file
    put(104, &4096u64.to_le_bytes()); // in memory
    elf.extend_from_slice(b"code");
    elf
}

const NO_DEVICES: Words<'static> = Words { devices: &[] };

fn error(mib: u64, kernel: &[u8], initrd: &[u8]) -> String {
    let memory = memory(mib as usize);
    load(&memory, &shape(mib), &mut file(kernel), &mut file(initrd), &NO_DEVICES).unwrap_err().to_string()
}

#[test]
fn everything_is_where_the_kernel_looks() {
    let memory = memory(32);
    let entry = load(&memory, &shape(32), &mut file(&kernel()), &mut file(b"archive"), &NO_DEVICES).unwrap();
    assert_eq!(entry, GuestAddress(0x100_0000));
    let mut code = [0; 4];
    memory.read_slice(&mut code, entry).unwrap();
    assert_eq!(&code, b"code");
    let params: linux_loader::loader::bootparam::boot_params =
        memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
    let mut archive = [0; 7];
    let (at, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
    memory.read_slice(&mut archive, GuestAddress(u64::from(at))).unwrap();
    assert_eq!((&archive, size), (b"archive", 7));
    let mut line = vec![0; params.hdr.cmdline_size as usize];
    memory.read_slice(&mut line, GuestAddress(layout::CMDLINE)).unwrap();
    let line = String::from_utf8(line).unwrap();
    assert!(line.ends_with("maxcpus=1 agent.log=debug quiet\0"), "{line}");
}

#[test]
fn what_is_no_kernel_is_refused_by_name() {
    for bad in [&b"#!/bin/sh"[..], b"", &[0; 4096], b"\x7fELF\x01\x01\x01"] {
        let text = error(32, bad, b"");
        assert!(
            text.contains("not an uncompressed x86-64 ELF") && text.contains("hypervisor.kernel"),
            "{text}"
        );
    }
    // A kernel for more memory than there is.
    assert!(error(8, &kernel(), b"").contains("the kernel"));
}

#[test]
fn an_initrd_larger_than_memory_is_refused_with_the_figures() {
    let text = error(32, &kernel(), &vec![0; 20 << 20]);
    assert!(text.contains("20971520 bytes") && text.contains("more memory"), "{text}");
}

#[test]
fn a_command_line_without_end_is_refused() {
    let long = Shape { cmdline: "x".repeat(4000), ..shape(32) };
    let answer = load(&memory(32), &long, &mut file(&kernel()), &mut file(b""), &NO_DEVICES);
    assert!(answer.unwrap_err().to_string().contains("command line"));
}

#[test]
fn devices_are_named_in_order() {
    let devices = [DeviceWord { window: 0, irq: 5 }, DeviceWord { window: 3, irq: 9 }];
    let line = Words { devices: &devices }.line(&shape(32));
    assert!(
        line.contains("virtio_mmio.device=512@0xd0000000:5 virtio_mmio.device=512@0xd0003000:9"),
        "{line}"
    );
}
