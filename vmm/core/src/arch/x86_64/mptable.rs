//! The table of processors for a machine without ACPI (Intel MultiProcessor Specification 1.4, 4).
//! Names every processor that there can be; how many start is the kernel's parameter `maxcpus`.

use std::io;

use bulkhead_virtio::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::layout;

/// Local APIC and I/O APIC versions of KVM (virt/kvm, APIC_VERSION and IOAPIC_VERSION_ID).
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
/// Entry types (4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
/// Interrupt types (table 4-11).
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;
/// Processor flags: usable, and the one that boots.
const ENABLED: u8 = 1;
const BOOTSTRAP: u8 = 2;
/// Every local APIC.
const ALL: u8 = 0xff;

/// The most processors: their APIC ids have 8 bits, the I/O APIC takes one, and 0xff is "all".
pub(crate) const MAX_CPUS: u32 = 254;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &b| sum.wrapping_add(b))
}

/// The configuration table with its entries.
fn table(cpus: u8) -> Vec<u8> {
    let io_apic_id = cpus;
    let mut entries = Vec::new();
    for cpu in 0..cpus {
        let flags = ENABLED | if cpu == 0 { BOOTSTRAP } else { 0 };
        // Signature and features are what CPUID says; Linux does not read them here.
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[PROCESSOR, cpu, LOCAL_APIC_VERSION, flags]);
        entries.extend_from_slice(&entry);
    }
    entries.extend_from_slice(&[BUS, 0]);
    entries.extend_from_slice(b"ISA   ");
    entries.extend_from_slice(&[IO_APIC, io_apic_id, IO_APIC_VERSION, ENABLED]);
    entries.extend_from_slice(&layout::IO_APIC.to_le_bytes());
    for irq in 0..16 {
        entries.extend_from_slice(&[IO_INTERRUPT, VECTORED, 0, 0, 0, irq, io_apic_id, irq]);
    }
    // The 8259s reach the first processor's pin 0, and an NMI everybody's pin 1.
    entries.extend_from_slice(&[LOCAL_INTERRUPT, EXTERNAL, 0, 0, 0, 0, 0, 0]);
    entries.extend_from_slice(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL, 1]);

    let count = u16::from(cpus) + 20;
    let mut header = Vec::new();
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&(44 + entries.len() as u16).to_le_bytes());
    header.extend_from_slice(&[4, 0]); // revision 1.4, checksum
    header.extend_from_slice(b"BULKHEAD");
    header.extend_from_slice(b"VMM         ");
    header.extend_from_slice(&[0; 6]); // no OEM table
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]); // no extended entries
    header.extend_from_slice(&entries);
    header[7] = 0u8.wrapping_sub(sum(&header));
    header
}

/// The pointer that a kernel looks for, 16 bytes.
fn pointer(to: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(b"_MP_");
    bytes[4..8].copy_from_slice(&to.to_le_bytes());
    bytes[8] = 1; // in paragraphs
    bytes[9] = 4; // revision 1.4
    bytes[10] = 0u8.wrapping_sub(sum(&bytes));
    bytes
}

/// Writes the tables for that many processors.
///
/// # Errors
/// They do not fit.
pub(crate) fn write(memory: &Memory, cpus: u32) -> io::Result<()> {
    let cpus = u8::try_from(cpus).map_err(io::Error::other)?;
    let table = table(cpus);
    // The pointer is looked for in the last KiB of conventional memory; a table of many processors
    // begins where there is room above it.
    let at = if table.len() as u64 + 16 <= layout::CONVENTIONAL_END - layout::MP_TABLE {
        layout::MP_TABLE + 16
    } else {
        layout::CONVENTIONAL_END
    };
    memory.write_slice(&pointer(at as u32), GuestAddress(layout::MP_TABLE)).map_err(io::Error::other)?;
    memory.write_slice(&table, GuestAddress(at)).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_lengths_true() {
        for cpus in [1, 2, 64, 254] {
            let table = table(cpus);
            assert_eq!(sum(&table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(
                table.iter().skip(44).step_by(20).take(cpus as usize).filter(|&&t| t == 0).count(),
                cpus as usize
            );
        }
        assert_eq!(sum(&pointer(0x9fc10)), 0);
    }
}
