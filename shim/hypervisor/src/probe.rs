//! Finds out whether /dev/kvm runs guests at the processor's speed, by running one.
//! Knows nothing of our machines: the guest here is a counting loop in one page.
//!
//! A device that opens and creates machines may still execute them in an instruction emulator. So the same loop
//! runs in a guest and natively, and the ratio of their times is the verdict.

// ioctls on /dev/kvm and the memory that a guest runs in; nothing above this module sees either.
#![allow(unsafe_code)]

use std::arch::asm;
use std::fs::{File, OpenOptions};
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use thiserror::Error as ThisError;

/// The device node of KVM.
pub const DEVICE: &str = "/dev/kvm";

/// A guest this much slower than the processor is being emulated. Hardware, nested or not, stays below 2;
/// emulators are beyond 20.
const MOST_SLOWDOWN: f64 = 5.0;

/// Rounds of the loop between two looks at the clock: some 25 microseconds natively, so that the microseconds
/// of leaving the guest do not count.
const ROUNDS: u32 = 100_000;

/// Rounds of a first, short look: an emulator needs milliseconds for them and is found out at once, so that a pod
/// which starts on such a machine does not wait for the full measurement.
const FIRST_ROUNDS: u32 = 2_000;

/// No processor takes so long for [`FIRST_ROUNDS`], the cost of entering and leaving the guest included.
const FIRST_LIMIT: Duration = Duration::from_millis(1);

/// Enough to find one round that no other process disturbed.
const SAMPLES: usize = 20;

/// After this, what was measured so far is the answer.
const PATIENCE: Duration = Duration::from_millis(300);

/// What executes guests on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acceleration {
    /// The processor does.
    Hardware {
        /// How that was found out.
        how: String,
    },
    /// Software does.
    Emulated {
        /// Why the processor does not.
        why: String,
    },
}

/// Finds out what executes guests here: the processor's flags, then a probe guest through [`DEVICE`].
/// Takes a few milliseconds.
pub fn acceleration() -> Acceleration {
    judge(virtualisation_flag().as_deref(), probe(Path::new(DEVICE)))
}

/// As [`acceleration`], but a processor that has proved itself since the host's boot is believed: the file at
/// `memory` remembers it. A host that emulates is asked each time, for a module may have been loaded since.
pub fn acceleration_remembered(memory: &Path) -> Acceleration {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let remembered = std::fs::read_to_string(memory).unwrap_or_default();
    if let Some((when, how)) = remembered.split_once('\n')
        && when == boot.trim()
        && !when.is_empty()
    {
        return Acceleration::Hardware { how: how.to_owned() };
    }
    let found = acceleration();
    if let Acceleration::Hardware { how } = &found {
        // Whole or not at all; where it cannot be written, the next one asks again.
        let draft = memory.with_extension(std::process::id().to_string());
        let written = std::fs::write(&draft, format!("{}\n{how}", boot.trim()));
        let _ = written.and_then(|()| std::fs::rename(&draft, memory));
    }
    found
}

fn judge(flag: Option<&str>, probed: Result<Probe, ProbeError>) -> Acceleration {
    let flags = match flag {
        Some(flag) => format!("the processor has {flag}"),
        None => "the processor shows neither vmx nor svm".to_owned(),
    };
    match probed {
        Ok(probe) if probe.accelerates() => {
            Acceleration::Hardware { how: format!("{flags}, and a probe guest ran {}", probe.speed()) }
        }
        Ok(probe) => Acceleration::Emulated {
            why: format!("{flags}; {DEVICE} opens, but its probe guest ran {}", probe.speed()),
        },
        Err(error) => Acceleration::Emulated { why: format!("{flags}; {error}") },
    }
}

/// The flag of the processor that promises hardware virtualisation: `vmx` or `svm`, if it has one.
pub fn virtualisation_flag() -> Option<String> {
    flag_in(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn flag_in(cpuinfo: &str) -> Option<String> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    flags.split_whitespace().find(|flag| ["vmx", "svm"].contains(flag)).map(str::to_owned)
}

/// What a probe guest took.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// The shortest time of the loop outside a guest.
    pub native: Duration,
    /// The shortest time of the loop in the guest.
    pub guest: Duration,
    /// What KVM_CREATE_VM took; some hosts make it 27 ms in place of 0.35.
    pub create_vm: Duration,
}

impl Probe {
    /// How many times slower the guest was.
    pub fn slowdown(&self) -> f64 {
        self.guest.as_secs_f64() / self.native.as_secs_f64().max(1e-9)
    }

    /// Whether the guest ran at the processor's speed.
    pub fn accelerates(&self) -> bool {
        self.slowdown() <= MOST_SLOWDOWN
    }

    /// The slowdown as the end of a sentence that begins with "the guest ran".
    pub fn speed(&self) -> String {
        match self.slowdown() {
            slow if slow < 1.5 => "at the processor's own speed".into(),
            slow if slow < 10.0 => format!("{slow:.1} times slower than the processor"),
            slow => format!("{slow:.0} times slower than the processor"),
        }
    }
}

/// Why no probe guest ran.
#[derive(Debug, ThisError)]
pub enum ProbeError {
    /// The device cannot be opened.
    #[error("{} cannot be opened: {source}", path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// Why not.
        source: Error,
    },
    /// A call failed.
    #[error("{call} failed: {source}")]
    Call {
        /// The ioctl or system call.
        call: &'static str,
        /// Why.
        source: Error,
    },
    /// Another interface than the one of every Linux since 2.6.22.
    #[error("KVM speaks version {0} of its interface, not 12")]
    Version(i32),
    /// The guest left the loop in a way that it cannot.
    #[error("the probe guest ended with KVM exit reason {reason}, which its code cannot cause")]
    Exit {
        /// `KVM_EXIT_*` (linux/kvm.h).
        reason: u32,
    },
}

/// Runs the probe guest.
///
/// # Errors
/// A device that cannot be opened, or a step on the way to the guest that fails.
pub fn probe(device: &Path) -> Result<Probe, ProbeError> {
    let kvm = OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .map_err(|source| ProbeError::Open { path: device.to_owned(), source })?;
    let mut machine = Machine::new(&kvm)?;
    let measure = |machine: &mut Machine, rounds, samples| {
        let native = shortest(samples, || {
            native_loop(rounds);
            Ok(())
        })?;
        let guest = shortest(samples, || machine.run_loop(rounds))?;
        Ok(Probe { native, guest, create_vm: machine.create_vm })
    };
    // More than once, because the first entry also faults the guest's pages in and other work may interrupt one.
    let first = measure(&mut machine, FIRST_ROUNDS, 5)?;
    if first.guest > FIRST_LIMIT { Ok(first) } else { measure(&mut machine, ROUNDS, SAMPLES) }
}

fn shortest(samples: usize, mut run: impl FnMut() -> Result<(), ProbeError>) -> Result<Duration, ProbeError> {
    let begun = Instant::now();
    let mut best = Duration::MAX;
    for _ in 0..samples {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed());
        if begun.elapsed() > PATIENCE {
            break;
        }
    }
    Ok(best)
}

/// The guest's loop, outside a guest.
fn native_loop(rounds: u32) {
    // SAFETY: the loop changes the register that it declares, and the flags, which asm! expects to change.
    unsafe {
        asm!("2:", "dec {rounds:e}", "jnz 2b", rounds = inout(reg) rounds => _, options(nomem, nostack));
    }
}

// From linux/kvm.h and asm/kvm.h; the numbers are part of the kernel's stable interface.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_CREATE_VM: libc::c_ulong = 0xae01;
const KVM_GET_SUPPORTED_CPUID: libc::c_ulong = 0xc008_ae05;
const KVM_SET_CPUID2: libc::c_ulong = 0x4008_ae90;
const KVM_CREATE_IRQCHIP: libc::c_ulong = 0xae60;
const KVM_GET_VCPU_MMAP_SIZE: libc::c_ulong = 0xae04;
const KVM_SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_ae46;
const KVM_CREATE_VCPU: libc::c_ulong = 0xae41;
const KVM_RUN: libc::c_ulong = 0xae80;
const KVM_SET_REGS: libc::c_ulong = 0x4090_ae82;
const KVM_GET_SREGS: libc::c_ulong = 0x8138_ae83;
const KVM_SET_SREGS: libc::c_ulong = 0x4138_ae84;
const KVM_EXIT_IO: u32 = 2;
/// Of `exit_reason` in `struct kvm_run`.
const EXIT_REASON_OFFSET: usize = 8;

#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_address: u64,
    size: u64,
    host_address: u64,
}

/// As many entries as KVM's own limit (KVM_MAX_CPUID_ENTRIES).
const CPUID_ENTRIES: usize = 256;

/// The header, and entries of ten words that are only passed on.
#[repr(C)]
struct Cpuid {
    count: u32,
    padding: u32,
    entries: [[u32; 10]; CPUID_ENTRIES],
}

#[repr(C)]
#[derive(Default)]
struct Registers {
    /// rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15.
    general: [u64; 16],
    rip: u64,
    rflags: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Segment {
    base: u64,
    limit: u32,
    selector: u16,
    kind: u8,
    present: u8,
    dpl: u8,
    db: u8,
    s: u8,
    l: u8,
    g: u8,
    avl: u8,
    unusable: u8,
    padding: u8,
}

#[repr(C)]
#[derive(Default)]
struct SystemRegisters {
    cs: Segment,
    /// ds, es, fs, gs, ss.
    data: [Segment; 5],
    /// tr, ldt.
    system: [Segment; 2],
    /// gdt, idt: base, limit.
    tables: [[u64; 2]; 2],
    cr0: u64,
    cr2: u64,
    cr3: u64,
    cr4: u64,
    cr8: u64,
    efer: u64,
    apic_base: u64,
    interrupts: [u64; 4],
}

// The sizes are encoded in the ioctl numbers, so a struct of another size is a memory error.
const _: () = assert!(size_of::<MemoryRegion>() == 0x20);
const _: () = assert!(size_of::<Registers>() == 0x90);
const _: () = assert!(size_of::<SystemRegisters>() == 0x138);

const PAGE: usize = 4096;
const CODE: u64 = 0;
/// Where the guest reads how often to count.
const ROUNDS_ADDRESS: usize = 0x200;
const PAGE_TABLES: u64 = PAGE as u64;
const GUEST_PAGES: usize = 4;

/// A machine of four pages, one processor and no devices.
struct Machine {
    /// Dropped before the memory that the guest runs in.
    vcpu: OwnedFd,
    _vm: OwnedFd,
    run: Mapping,
    memory: Mapping,
    create_vm: Duration,
}

impl Machine {
    fn new(kvm: &File) -> Result<Self, ProbeError> {
        let version = ioctl(kvm, "KVM_GET_API_VERSION", KVM_GET_API_VERSION, 0)?;
        if version != 12 {
            return Err(ProbeError::Version(version));
        }
        let begun = Instant::now();
        let vm = owned(ioctl(kvm, "KVM_CREATE_VM", KVM_CREATE_VM, 0)?);
        let create_vm = begun.elapsed();
        let mut memory = Mapping::new(GUEST_PAGES * PAGE, None)?;
        memory.write(0, &guest_memory());
        let region = MemoryRegion {
            slot: 0,
            flags: 0,
            guest_address: 0,
            size: (GUEST_PAGES * PAGE) as u64,
            host_address: memory.address as u64,
        };
        ioctl(
            &vm,
            "KVM_SET_USER_MEMORY_REGION",
            KVM_SET_USER_MEMORY_REGION,
            &raw const region as libc::c_ulong,
        )?;
        // The loop needs no interrupts. But the first processor of a host without a local APIC makes KVM patch
        // its own code, on all of the host's processors, and its end once more.
        ioctl(&vm, "KVM_CREATE_IRQCHIP", KVM_CREATE_IRQCHIP, 0)?;
        let vcpu = owned(ioctl(&vm, "KVM_CREATE_VCPU", KVM_CREATE_VCPU, 0)?);
        let size = ioctl(kvm, "KVM_GET_VCPU_MMAP_SIZE", KVM_GET_VCPU_MMAP_SIZE, 0)?;
        let run = Mapping::new(usize::try_from(size).unwrap_or_default(), Some(vcpu.as_raw_fd()))?;
        // Without a CPUID that says so, the guest has no long mode and KVM refuses the registers below.
        let mut cpuid = Cpuid { count: CPUID_ENTRIES as u32, padding: 0, entries: [[0; 10]; CPUID_ENTRIES] };
        ioctl(kvm, "KVM_GET_SUPPORTED_CPUID", KVM_GET_SUPPORTED_CPUID, &raw mut cpuid as libc::c_ulong)?;
        ioctl(&vcpu, "KVM_SET_CPUID2", KVM_SET_CPUID2, &raw const cpuid as libc::c_ulong)?;
        set_registers(&vcpu)?;
        Ok(Self { vcpu, _vm: vm, run, memory, create_vm })
    }

    /// Runs the guest until it has counted so many rounds.
    fn run_loop(&mut self, rounds: u32) -> Result<(), ProbeError> {
        self.memory.write(ROUNDS_ADDRESS, &rounds.to_le_bytes());
        loop {
            match ioctl(&self.vcpu, "KVM_RUN", KVM_RUN, 0) {
                // A signal; the guest goes on where it was.
                Err(ProbeError::Call { source, .. }) if source.raw_os_error() == Some(libc::EINTR) => {
                    continue;
                }
                outcome => outcome?,
            };
            // SAFETY: the kernel filled in this mapping, which is page-aligned and at least a page long.
            let reason = unsafe { self.run.address.add(EXIT_REASON_OFFSET).cast::<u32>().read_volatile() };
            return if reason == KVM_EXIT_IO { Ok(()) } else { Err(ProbeError::Exit { reason }) };
        }
    }
}

/// The code, and behind it the tables that map the first 2 MiB to themselves.
///
/// Long mode, because every virtualising processor runs it in hardware; early Intel ones leave real mode to an
/// emulator and would be misjudged.
fn guest_memory() -> Vec<u8> {
    let mut memory = vec![0; GUEST_PAGES * PAGE];
    let mut code = vec![0x8b, 0x0c, 0x25]; // mov ecx, [ROUNDS_ADDRESS]
    code.extend((ROUNDS_ADDRESS as u32).to_le_bytes());
    code.extend([0xff, 0xc9]); // dec ecx
    code.extend([0x75, 0xfc]); // jnz back to dec
    code.extend([0xe6, 0x80]); // out 0x80, al: leaves the guest
    code.extend([0xeb, 0xf1]); // jmp to the start
    memory[..code.len()].copy_from_slice(&code);
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let tables = PAGE_TABLES as usize;
    let entries = [
        (tables, (PAGE_TABLES + PAGE as u64) | PRESENT_WRITABLE),
        (tables + PAGE, (PAGE_TABLES + 2 * PAGE as u64) | PRESENT_WRITABLE),
        (tables + 2 * PAGE, LARGE | PRESENT_WRITABLE),
    ];
    for (at, entry) in entries {
        memory[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }
    memory
}

fn set_registers(vcpu: &OwnedFd) -> Result<(), ProbeError> {
    let mut system = SystemRegisters::default();
    ioctl(vcpu, "KVM_GET_SREGS", KVM_GET_SREGS, &raw mut system as libc::c_ulong)?;
    let flat = Segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Segment::default() };
    system.cs = Segment { selector: 8, kind: 11, l: 1, ..flat };
    system.data = [Segment { selector: 16, kind: 3, db: 1, ..flat }; 5];
    system.cr3 = PAGE_TABLES;
    system.cr4 = 1 << 5; // PAE
    system.cr0 = 1 << 31 | 1 << 5 | 1 << 4 | 1; // PG, NE, ET, PE
    system.efer = 1 << 10 | 1 << 8; // LMA, LME
    ioctl(vcpu, "KVM_SET_SREGS", KVM_SET_SREGS, &raw const system as libc::c_ulong)?;
    // Bit 1 of the flags is always set; interrupts stay off.
    let registers = Registers { rip: CODE, rflags: 2, ..Registers::default() };
    ioctl(vcpu, "KVM_SET_REGS", KVM_SET_REGS, &raw const registers as libc::c_ulong)?;
    Ok(())
}

/// An ioctl whose argument is a number or the address of a value that outlives the call.
fn ioctl(
    file: &impl AsRawFd,
    call: &'static str,
    request: libc::c_ulong,
    argument: libc::c_ulong,
) -> Result<i32, ProbeError> {
    // SAFETY: every caller passes 0 or the address of a live struct of the size that the request encodes, writable
    // where the request writes; the asserts above hold the sizes.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if result < 0 { Err(ProbeError::Call { call, source: Error::last_os_error() }) } else { Ok(result) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Pages that are unmapped when dropped.
struct Mapping {
    address: *mut u8,
    size: usize,
}

impl Mapping {
    /// Maps `size` bytes: of a file, shared, or private and zeroed.
    fn new(size: usize, file: Option<RawFd>) -> Result<Self, ProbeError> {
        let flags = if file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel wants it touches no memory of ours.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), size, access, flags, file.unwrap_or(-1), 0) };
        if address == libc::MAP_FAILED {
            return Err(ProbeError::Call { call: "mmap", source: Error::last_os_error() });
        }
        Ok(Self { address: address.cast(), size })
    }

    /// Copies `bytes` to `offset`; both must lie within the mapping.
    fn write(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.size);
        // SAFETY: the target lies within the mapping (just asserted), which `bytes` cannot overlap because no
        // reference into it is ever made; the guest's only processor runs on this thread, so it stands still.
        unsafe { self.address.add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: new() mapped exactly this, and nothing keeps a reference into it.
        unsafe { libc::munmap(self.address.cast(), self.size) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn took(native_us: u64, guest_us: u64) -> Probe {
        let us = Duration::from_micros;
        Probe { native: us(native_us), guest: us(guest_us), create_vm: us(350) }
    }

    #[test]
    fn a_guest_at_native_speed_is_hardware_whatever_the_flags_say() {
        for flag in [Some("svm"), None] {
            assert!(matches!(judge(flag, Ok(took(25, 27))), Acceleration::Hardware { .. }));
        }
    }

    #[test]
    fn a_slow_guest_is_emulated_whatever_the_flags_say() {
        let Acceleration::Emulated { why } = judge(None, Ok(took(25, 25_000))) else {
            panic!("not emulated")
        };
        assert_eq!(
            why,
            "the processor shows neither vmx nor svm; /dev/kvm opens, \
             but its probe guest ran 1000 times slower than the processor"
        );
        assert!(matches!(judge(Some("vmx"), Ok(took(25, 2_500))), Acceleration::Emulated { .. }));
    }

    #[test]
    fn a_verdict_is_believed_until_the_next_boot() {
        let dir = tempfile::tempdir().unwrap();
        let memory = dir.path().join("acceleration");
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        std::fs::write(&memory, format!("{}\nit was seen", boot.trim())).unwrap();
        assert_eq!(acceleration_remembered(&memory), Acceleration::Hardware { how: "it was seen".into() });
        std::fs::write(&memory, "another-boot\nit was seen").unwrap();
        let asked = acceleration_remembered(&memory);
        assert_ne!(asked, Acceleration::Hardware { how: "it was seen".into() });
        let kept = std::fs::read_to_string(&memory).unwrap();
        assert_eq!(kept.contains("another-boot"), matches!(asked, Acceleration::Emulated { .. }), "{kept}");
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let error = probe(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(error.to_string().starts_with("/nonexistent/kvm cannot be opened: No such file"), "{error}");
    }

    #[test]
    fn a_device_that_is_not_kvm_is_refused() {
        let error = probe(Path::new("/dev/null")).unwrap_err();
        assert!(error.to_string().starts_with("KVM_GET_API_VERSION failed: "), "{error}");
    }

    #[test]
    fn flags_are_whole_words() {
        assert_eq!(flag_in("model name : svm\nflags : fpu svm_lock vmx\n").as_deref(), Some("vmx"));
        assert_eq!(flag_in("flags\t\t: fpu svmx\n"), None);
    }

    #[test]
    fn the_code_jumps_where_it_says() {
        let code = guest_memory();
        let after = |at: usize| at as i64 + 2 + i64::from(code[at + 1] as i8);
        assert_eq!((code[9], after(9)), (0x75, 7));
        assert_eq!((code[13], after(13)), (0xeb, 0));
    }

    #[test]
    fn a_real_device_gives_a_verdict() {
        if !Path::new(DEVICE).exists() {
            return;
        }
        match probe(Path::new(DEVICE)) {
            Ok(probe) => {
                println!("{probe:?}: {}", probe.speed());
                assert!(probe.guest > Duration::ZERO && probe.native > Duration::ZERO);
            }
            // Present without permission, as in many containers.
            Err(error) => assert!(matches!(error, ProbeError::Open { .. }), "{error}"),
        }
    }
}
