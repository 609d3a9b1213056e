//! What the guest learns of its processors: what KVM can give on this host, less what a pod has no use for.
//!
//! The base is KVM_GET_SUPPORTED_CPUID: features of the host that KVM virtualises, mitigation bits among
//! them, so that a guest's kernel protects itself as the host's does. Changed on purpose (Intel SDM 3A
//! "CPUID", AMD APM 3 appendix E):
//!
//! | leaf | change | why |
//! |---|---|---|
//! | 1 | APIC id, number of processors, HTT | each processor has its own |
//! | 1 ECX | HYPERVISOR set | the guest is to look for 0x40000000 |
//! | 1 ECX | TSC_DEADLINE set where KVM has it | the cheapest timer; KVM leaves the bit to us |
//! | 1 EDX | MTRR cleared | KVM does not act on them, and a kernel reads all of them three times: 90 exits |
//! | 1 ECX | MONITOR, VMX cleared | idle is HLT; no machines within the machine |
//! | 4, 0x8000001d | sharing of caches cut to this machine | topology of the host is none of the guest's |
//! | 0xa | zero | no performance counters: a side channel, and state to save |
//! | 0xb, 0x1f | one thread a core, one package | the scheduler sees what there is |
//! | 0x80000001 ECX, 0x8000000a | SVM cleared | no machines within the machine |
//! | 0x80000008, 0x8000001e | number of cores, APIC id | as above, on AMD |

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// A processor among its like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Its number and APIC id.
    pub(crate) id: u32,
    /// How many there can be.
    pub(crate) cpus: u32,
}

impl Place {
    /// Bits of an APIC id that tell processors apart.
    fn id_bits(self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }
}

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const MONITOR: u32 = 1 << 3;
const VMX: u32 = 1 << 5;
const MTRR: u32 = 1 << 12;
const HTT: u32 = 1 << 28;
const SVM: u32 = 1 << 2;

/// Makes the answers for one processor out of what KVM supports.
pub(crate) fn shape(cpuid: &mut CpuId, place: Place, tsc_deadline: bool) {
    for entry in cpuid.as_mut_slice() {
        shape_entry(entry, place, tsc_deadline);
    }
}

fn shape_entry(entry: &mut kvm_cpuid_entry2, place: Place, tsc_deadline: bool) {
    let Place { id, cpus } = place;
    match entry.function {
        0x1 => {
            entry.ebx = entry.ebx & 0x0000_ffff | (cpus & 0xff) << 16 | (id & 0xff) << 24;
            entry.ecx = (entry.ecx | HYPERVISOR) & !(MONITOR | VMX | TSC_DEADLINE);
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            entry.edx = if cpus > 1 { entry.edx | HTT } else { entry.edx & !HTT } & !MTRR;
        }
        // Cache parameters: bits 25:14 say how many processors share it, less one. Level 3 is everybody's,
        // the others are one core's.
        0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 == 3 { cpus - 1 } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | (sharing & 0xfff) << 14;
            if entry.function == 0x4 {
                let cores = (1 << place.id_bits()) - 1;
                entry.eax = entry.eax & !(0x3f << 26) | (cores & 0x3f) << 26;
            }
        }
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // Levels: threads of a core (one), cores of the package (all), nothing above.
        0xb | 0x1f => {
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, 1 << 8),
                1 => (place.id_bits(), cpus, 2 << 8 | 1),
                n => (0, 0, n),
            };
            entry.edx = id;
        }
        0x8000_0001 => entry.ecx &= !SVM,
        0x8000_0008 => entry.ecx = place.id_bits() << 12 | (cpus - 1) & 0xff,
        0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shaped(function: u32, index: u32, fill: u32, place: Place) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 {
            function,
            index,
            eax: fill,
            ebx: fill,
            ecx: fill,
            edx: fill,
            ..Default::default()
        };
        shape_entry(&mut entry, place, false);
        entry
    }

    #[test]
    fn each_processor_has_its_id() {
        let place = Place { id: 2, cpus: 3 };
        assert_eq!(shaped(1, 0, 0, place).ebx, 3 << 16 | 2 << 24);
        assert_eq!(shaped(0xb, 1, 0, place).edx, 2);
        assert_eq!(shaped(0x8000_001e, 0, 0, place).eax, 2);
    }

    #[test]
    fn no_machines_within_the_machine_and_no_counters() {
        let place = Place { id: 0, cpus: 1 };
        assert_eq!(shaped(1, 0, u32::MAX, place).ecx & (VMX | MONITOR), 0);
        assert_eq!(shaped(0x8000_0001, 0, u32::MAX, place).ecx & SVM, 0);
        assert_eq!(shaped(0xa, 0, u32::MAX, place).eax, 0);
    }

    #[test]
    fn the_topology_is_one_package() {
        let place = Place { id: 1, cpus: 4 };
        let (threads, cores) = (shaped(0xb, 0, 0, place), shaped(0xb, 1, 0, place));
        assert_eq!((threads.ebx, cores.eax, cores.ebx), (1, 2, 4));
        assert_eq!(shaped(0x4, 3, 3 << 5 | 3, place).eax >> 14 & 0xfff, 3);
        assert_eq!(shaped(0x4, 0, 1 << 5 | 1, place).eax >> 14 & 0xfff, 0);
    }
}
