//! Which devices a container may use: a BPF program on its cgroup, the way of cgroup v2.
//! Knows the rules of the specification and the instruction set; must not know which rules are sensible.
//!
//! The program asks the rules from the last to the first; the first that speaks of the access decides:
//! an allowing rule when it covers all of it, a denying rule when it touches any of it. None: denied.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType};

use super::last_mile::why;

/// One instruction (`struct bpf_insn`, linux/bpf.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Insn {
    code: u8,
    /// Destination in the low four bits, source in the high four.
    regs: u8,
    off: i16,
    imm: i32,
}

// Values of linux/bpf_common.h and linux/bpf.h.
const LDX_MEM_W: u8 = 0x61;
const ALU_AND_K: u8 = 0x54;
const ALU_RSH_K: u8 = 0x74;
const ALU_MOV_X: u8 = 0xbc;
const MOV_K: u8 = 0xb7;
const JMP_JNE_K: u8 = 0x55;
const JMP_JEQ_K: u8 = 0x15;
const EXIT: u8 = 0x95;

const BLOCK: i32 = 1;
const CHAR: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;

// Registers of the program: r0 answer, r1 context, then type, access, major, minor, scratch.
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// Attaches the rules to `cgroup`.
pub(super) fn restrict(cgroup: &Path, rules: &[LinuxDeviceCgroup]) -> Result<(), String> {
    if let Some(true) = rules.last().map(allows_everything) {
        return Ok(());
    }
    let program = compile(rules);
    let attach = || -> io::Result<()> {
        let program = bpf::load(&program)?;
        bpf::attach(&File::open(cgroup)?, &program)
    };
    attach().map_err(|e| format!("restrict devices of {}: {}", cgroup.display(), why(&e)))
}

/// What every container gets, as runc has it: mknod, the harmless devices, terminals.
pub(crate) fn defaults() -> Vec<LinuxDeviceCgroup> {
    let rule = |typ, major: Option<i64>, minor: Option<i64>, access: &str| {
        let mut rule = LinuxDeviceCgroupBuilder::default()
            .allow(true)
            .typ(typ)
            .access(access)
            .build()
            .expect("all fields have defaults");
        rule.set_major(major).set_minor(minor);
        rule
    };
    let c = LinuxDeviceType::C;
    let mut rules = vec![rule(c, None, None, "m"), rule(LinuxDeviceType::B, None, None, "m")];
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)] {
        rules.push(rule(c, Some(major), Some(minor), "rwm"));
    }
    rules.push(rule(c, Some(136), None, "rwm"));
    rules
}

/// Is this the rule of a privileged container?
pub(crate) fn allows_everything(rule: &LinuxDeviceCgroup) -> bool {
    rule.allow()
        && types(rule).is_none()
        && wild(rule.major()).is_none()
        && wild(rule.minor()).is_none()
        && access(rule) == MKNOD | READ | WRITE
}

/// The kind that a rule speaks of; none for all.
fn types(rule: &LinuxDeviceCgroup) -> Option<i32> {
    match rule.typ() {
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
        Some(LinuxDeviceType::A | LinuxDeviceType::P) | None => None,
    }
}

/// A number that is absent or -1 stands for all.
fn wild(number: Option<i64>) -> Option<i64> {
    number.filter(|n| *n >= 0)
}

fn access(rule: &LinuxDeviceCgroup) -> i32 {
    let letters = rule.access().as_deref().unwrap_or("rwm");
    letters.chars().fold(0, |bits, letter| {
        bits | match letter {
            'm' => MKNOD,
            'r' => READ,
            'w' => WRITE,
            _ => 0,
        }
    })
}

fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    Insn { code, regs: dst | src << 4, off, imm }
}

fn compile(rules: &[LinuxDeviceCgroup]) -> Vec<Insn> {
    // struct bpf_cgroup_dev_ctx: (access << 16) | type, major, minor.
    let mut program = vec![
        insn(LDX_MEM_W, TYPE, 1, 0, 0),
        insn(ALU_MOV_X, ACCESS, TYPE, 0, 0),
        insn(ALU_AND_K, TYPE, 0, 0, 0xffff),
        insn(ALU_RSH_K, ACCESS, 0, 0, 16),
        insn(LDX_MEM_W, MAJOR, 1, 4, 0),
        insn(LDX_MEM_W, MINOR, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        program.extend(block(rule));
    }
    program.extend([insn(MOV_K, 0, 0, 0, 0), insn(EXIT, 0, 0, 0, 0)]);
    program
}

/// The instructions of one rule; they end the program, or fall through to the next rule.
fn block(rule: &LinuxDeviceCgroup) -> Vec<Insn> {
    let mut block = Vec::new();
    if let Some(kind) = types(rule) {
        block.push(insn(JMP_JNE_K, TYPE, 0, 0, kind));
    }
    let bits = access(rule);
    block.push(insn(ALU_MOV_X, SCRATCH, ACCESS, 0, 0));
    if rule.allow() {
        // Anything asked for beyond the rule?
        block.push(insn(ALU_AND_K, SCRATCH, 0, 0, !bits & (MKNOD | READ | WRITE)));
        block.push(insn(JMP_JNE_K, SCRATCH, 0, 0, 0));
    } else {
        // Nothing asked for that the rule speaks of?
        block.push(insn(ALU_AND_K, SCRATCH, 0, 0, bits));
        block.push(insn(JMP_JEQ_K, SCRATCH, 0, 0, 0));
    }
    for (register, number) in [(MAJOR, rule.major()), (MINOR, rule.minor())] {
        if let Some(number) = wild(number) {
            block.push(insn(JMP_JNE_K, register, 0, 0, number as i32));
        }
    }
    block.push(insn(MOV_K, 0, 0, 0, rule.allow().into()));
    block.push(insn(EXIT, 0, 0, 0, 0));
    // Every jump leaves the block: its offset counts from the instruction after it.
    let len = block.len();
    for (at, insn) in block.iter_mut().enumerate() {
        if matches!(insn.code, JMP_JNE_K | JMP_JEQ_K) {
            insn.off = (len - at - 1) as i16;
        }
    }
    block
}

#[allow(unsafe_code)]
mod bpf {
    //! The two calls of bpf(2).

    use super::*;

    const PROG_LOAD: libc::c_long = 5;
    const PROG_ATTACH: libc::c_long = 8;
    const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    const ATTACH_CGROUP_DEVICE: u32 = 6;
    const F_ALLOW_MULTI: u32 = 2;

    /// The head of `union bpf_attr` for BPF_PROG_LOAD.
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
    }

    /// The head of `union bpf_attr` for BPF_PROG_ATTACH.
    #[repr(C)]
    struct Attach {
        target_fd: u32,
        attach_bpf_fd: u32,
        attach_type: u32,
        attach_flags: u32,
    }

    pub(super) fn load(program: &[Insn]) -> io::Result<OwnedFd> {
        let attr = Load {
            prog_type: PROG_TYPE_CGROUP_DEVICE,
            insn_cnt: program.len() as u32,
            insns: program.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: `attr` is the head of a bpf_attr and its size is told; the program and the licence outlive
        // the call, and the verifier refuses any program that is not sound.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &attr, size_of::<Load>()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    pub(super) fn attach(cgroup: &File, program: &OwnedFd) -> io::Result<()> {
        let attr = Attach {
            target_fd: cgroup.as_raw_fd() as u32,
            attach_bpf_fd: program.as_raw_fd() as u32,
            attach_type: ATTACH_CGROUP_DEVICE,
            attach_flags: F_ALLOW_MULTI,
        };
        // SAFETY: as above; both descriptors are open for the duration of the call.
        let answer = unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &attr, size_of::<Attach>()) };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs the few instructions that the compiler uses.
    fn run(program: &[Insn], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [(access << 16) | kind, major, minor];
        let mut regs = [0i32; 11];
        let mut at = 0;
        loop {
            let Insn { code, regs: pair, off, imm } = program[at];
            let (dst, src) = ((pair & 15) as usize, (pair >> 4) as usize);
            at += 1;
            match code {
                LDX_MEM_W => regs[dst] = context[off as usize / 4],
                ALU_AND_K => regs[dst] &= imm,
                ALU_RSH_K => regs[dst] = ((regs[dst] as u32) >> imm) as i32,
                ALU_MOV_X => regs[dst] = regs[src],
                MOV_K => regs[dst] = imm,
                JMP_JNE_K if regs[dst] != imm => at += off as usize,
                JMP_JEQ_K if regs[dst] == imm => at += off as usize,
                JMP_JNE_K | JMP_JEQ_K => {}
                EXIT => return regs[0] == 1,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn rule(
        allow: bool,
        typ: Option<LinuxDeviceType>,
        major: Option<i64>,
        minor: Option<i64>,
        letters: &str,
    ) -> LinuxDeviceCgroup {
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(allow).set_typ(typ).set_major(major).set_minor(minor).set_access(Some(letters.into()));
        rule
    }

    #[test]
    fn a_plain_container_has_null_but_no_disk() {
        let mut rules = vec![rule(false, None, None, None, "rwm")];
        rules.extend(defaults());
        let program = compile(&rules);
        assert!(run(&program, CHAR, READ | WRITE, 1, 3));
        assert!(run(&program, CHAR, READ | WRITE, 136, 7));
        assert!(run(&program, BLOCK, MKNOD, 8, 0));
        assert!(!run(&program, BLOCK, READ, 8, 0));
        assert!(!run(&program, CHAR, READ, 1, 1));
        assert!(!run(&program, CHAR, READ | MKNOD, 10, 200));
    }

    #[test]
    fn a_privileged_container_is_recognised() {
        assert!(allows_everything(&rule(true, None, None, None, "rwm")));
        assert!(allows_everything(&rule(true, Some(LinuxDeviceType::A), Some(-1), Some(-1), "rwm")));
        assert!(!allows_everything(&rule(true, None, None, None, "rw")));
        assert!(!allows_everything(&rule(false, None, None, None, "rwm")));
        assert!(!allows_everything(&rule(true, Some(LinuxDeviceType::C), None, None, "rwm")));
    }

    fn any_rule() -> impl Strategy<Value = LinuxDeviceCgroup> {
        let number = || prop::option::of(-1i64..3);
        let kind = prop::sample::select(vec![
            None,
            Some(LinuxDeviceType::B),
            Some(LinuxDeviceType::C),
            Some(LinuxDeviceType::A),
        ]);
        (any::<bool>(), kind, number(), number(), "r?w?m?").prop_map(|(a, k, x, y, l)| rule(a, k, x, y, &l))
    }

    proptest! {
        /// The program answers what reading the rules aloud answers.
        #[test]
        fn the_program_is_the_rules(
            rules in prop::collection::vec(any_rule(), 0..6),
            kind in 1..3i32, wanted in 1..8i32, major in 0..3i32, minor in 0..3i32,
        ) {
            let expected = rules.iter().rev().find_map(|rule| {
                let same = |n: Option<i64>, m: i32| wild(n).is_none_or(|n| n == m as i64);
                let bits = access(rule);
                let speaks = types(rule).is_none_or(|k| k == kind) && same(rule.major(), major) && same(rule.minor(), minor)
                    && if rule.allow() { wanted & !bits == 0 } else { wanted & bits != 0 };
                speaks.then_some(rule.allow())
            }).unwrap_or(false);
            prop_assert_eq!(run(&compile(&rules), kind, wanted, major, minor), expected);
        }
    }
}
