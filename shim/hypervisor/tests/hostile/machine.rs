//! The machine under the attacker: entry, page tables, faults, ports, memory.

use super::*;

// The processor comes in 64-bit mode with the first GiB mapped and RSI at the boot parameters (boot.rst).
global_asm!(
    ".globl _start",
    "_start:",
    "lea rsp, [rip + {stack} + {stack_size}]",
    "mov rdi, rsi",
    // SSE, which compiled code uses: CR0.EM off, CR0.MP on, CR4.OSFXSR and OSXMMEXCPT on.
    "mov rax, cr0",
    "and rax, -5",
    "or rax, 2",
    "mov cr0, rax",
    "mov rax, cr4",
    "or rax, 0x600",
    "mov cr4, rax",
    "call attack",
    // Faults with an error code: the instruction (RDMSR or WRMSR, 2 bytes) is left out.
    ".globl skip",
    "skip:",
    "add rsp, 8",
    "add qword ptr [rsp], 2",
    "iretq",
    // What registers at random bring about by themselves: it happened, and nothing more.
    ".globl shrug",
    "shrug:",
    "iretq",
    // Anything else is a mistake of the attack's: what is on the stack says which.
    ".globl fall",
    "fall:",
    "mov rdi, rsp",
    "and rsp, -16",
    "call fallen",
    stack = sym STACK,
    stack_size = const STACK_SIZE,
);

unsafe extern "C" {
    fn skip();
    fn shrug();
    fn fall();
}

const STACK_SIZE: usize = 64 << 10;
// Only its address is of use here.
#[allow(dead_code)]
#[repr(align(16))]
struct Stack([u8; STACK_SIZE]);
static mut STACK: Stack = Stack([0; STACK_SIZE]);

/// Page tables of its own, for four GiB in pages of 2 MiB: root, upper, four middle ones. As its program,
/// they are where no device is told to give pages back by chance.
const ROOT: u64 = 0x1b5_7000;
const UPPER: u64 = ROOT + 0x1000;
const MIDDLE: u64 = ROOT + 0x2000;
static mut FAULTS: [u64; 64] = [0; 64];
/// Null, unused, 64-bit code, data: as boot.rst wants them.
static mut SEGMENTS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    say(b"hostile guest: its own fault\n");
    halt()
}

/// Maps four GiB and lets faults be survived. Answers where memory ends.
pub fn start(boot_params: u64) -> u64 {
    for n in 0..2048 {
        // Present, writable, large.
        store(MIDDLE + 8 * n, n << 21 | 0x83);
    }
    (0..4).for_each(|n| store(UPPER + 8 * n, MIDDLE + 4096 * n | 3));
    store(ROOT, UPPER | 3);
    let faults = addr_of_mut!(FAULTS) as u64;
    for vector in 0..32 {
        // General protection; debug, NMI and machine check.
        let handler: unsafe extern "C" fn() = match vector {
            13 => skip,
            1 | 2 | 18 => shrug,
            _ => fall,
        };
        let (at, handler) = (faults + vector * 16, handler as *const () as u64);
        // An interrupt gate into the code segment at 0x10.
        store(at, handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48);
        store(at + 8, handler >> 32);
    }
    let (table, segments) = (Pointer(32 * 16 - 1, faults), Pointer(31, addr_of_mut!(SEGMENTS) as u64));
    // SAFETY: they are made above and stay.
    unsafe {
        asm!("mov cr3, {}", in(reg) ROOT);
        asm!("lidt [{}]", "lgdt [{}]", in(reg) addr_of!(table), in(reg) addr_of!(segments));
    }
    // The map of memory: entries at 0x2d0 of the boot parameters, their number at 0x1e8 (zero-page.rst).
    let count = u64::from(load::<u8>(boot_params + 0x1e8));
    let end = |n: u64| load::<u64>(boot_params + 0x2d0 + 20 * n) + load::<u64>(boot_params + 0x2d8 + 20 * n);
    (0..count).map(end).max().unwrap_or(POOL)
}

#[unsafe(no_mangle)]
extern "C" fn fallen(stack: u64) -> ! {
    say(b"hostile guest: an exception, with on the stack:");
    for n in 0..4 {
        say(b" ");
        let value: u64 = load(stack + 8 * n);
        (0..16).rev().for_each(|digit| say(&[b"0123456789abcdef"[(value >> (4 * digit)) as usize & 15]]));
    }
    say(b"\n");
    halt()
}

#[repr(C, packed)]
struct Pointer(u16, u64);

/// The letters of the word `attack=` of the command line; zeros after them.
pub fn attacks(boot_params: u64) -> [u8; 16] {
    let line = u64::from(load::<u32>(boot_params + 0x228));
    let word = b"attack=";
    let at = (0..2048).find(|at| (0..7).all(|n| load::<u8>(line + at + n as u64) == word[n]));
    let first = line + at.unwrap_or(0) + 7;
    let mut letters = [0; 16];
    let found = (first..).map(load::<u8>).take_while(|c| c.is_ascii_lowercase());
    letters.iter_mut().zip(found).for_each(|(letter, found)| *letter = found);
    letters
}

/// Numbers as an xorshift makes them.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

// SAFETY of all that follows: there is no one else in this machine, and breaking it is the purpose.

pub fn load<T>(at: u64) -> T {
    unsafe { (at as *const T).read_unaligned() }
}

pub fn store<T>(at: u64, value: T) {
    unsafe { (at as *mut T).write_unaligned(value) }
    core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
}

pub fn read(at: u64) -> u32 {
    unsafe { read_volatile(at as *const u32) }
}

pub fn write(at: u64, value: u32) {
    unsafe { write_volatile(at as *mut u32, value) }
}

/// An access of any width, as `how` says, where there may be no memory.
pub fn access(at: u64, how: u64, value: u64) {
    unsafe {
        match how % 8 {
            0 => asm!("mov {0}, byte ptr [{1}]", out(reg_byte) _, in(reg) at),
            1 => asm!("mov {0:x}, word ptr [{1}]", out(reg) _, in(reg) at),
            2 => asm!("mov {0:e}, dword ptr [{1}]", out(reg) _, in(reg) at),
            3 => asm!("mov {0}, qword ptr [{1}]", out(reg) _, in(reg) at),
            4 => asm!("mov byte ptr [{1}], {0}", in(reg_byte) value as u8, in(reg) at),
            5 => asm!("mov word ptr [{1}], {0:x}", in(reg) value, in(reg) at),
            6 => asm!("mov dword ptr [{1}], {0:e}", in(reg) value, in(reg) at),
            _ => asm!("mov qword ptr [{1}], {0}", in(reg) value, in(reg) at),
        }
    }
}

macro_rules! port_io {
    ($in:ident $out:ident $type:ty, $read:literal, $write:literal, $register:tt) => {
        pub fn $in(port: u16) -> $type {
            let value: $type;
            unsafe { asm!($read, out($register) value, in("dx") port) };
            value
        }

        pub fn $out(port: u16, value: $type) {
            unsafe { asm!($write, in($register) value, in("dx") port) };
        }
    };
}

port_io!(in8 out8 u8, "in al, dx", "out dx, al", "al");
port_io!(in16 out16 u16, "in ax, dx", "out dx, ax", "ax");
port_io!(in32 out32 u32, "in eax, dx", "out dx, eax", "eax");

/// String I/O: a run of several values in one exit.
pub fn strings(port: u16) {
    let (to, count) = (POOL, 16u64);
    unsafe {
        asm!("rep insb", in("dx") port, inout("rdi") to => _, inout("rcx") count => _);
        asm!("rep outsd", in("dx") port, inout("rsi") to => _, inout("rcx") count => _);
    }
}

pub fn read_msr(msr: u32) {
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") _, out("edx") _) };
}

pub fn write_msr(msr: u32, value: u64) {
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32) };
}

pub fn say(text: &[u8]) {
    text.iter().for_each(|&byte| out8(0x3f8, byte));
}

pub fn jump(to: u64) -> ! {
    unsafe { asm!("jmp {}", in(reg) to, options(noreturn)) }
}

pub fn halt() -> ! {
    loop {
        unsafe { asm!("cli", "hlt") };
    }
}

pub fn triple_fault() -> ! {
    let nothing = Pointer(0, 0);
    unsafe { asm!("lidt [{}]", "int3", in(reg) addr_of!(nothing), options(noreturn)) }
}

// What compiled code calls.

#[unsafe(no_mangle)]
extern "C" fn memcpy(to: u64, from: u64, len: u64) -> u64 {
    unsafe { asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _) };
    to
}

#[unsafe(no_mangle)]
extern "C" fn memset(to: u64, value: u32, len: u64) -> u64 {
    unsafe { asm!("rep stosb", inout("rdi") to => _, in("al") value as u8, inout("rcx") len => _) };
    to
}

/// The compiled library names it and never calls it: nothing unwinds.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
