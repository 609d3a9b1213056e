//! A small program for the kernel's lookup of sockets, assembled here, and the calls that load it.
//! Knows bpf(2) and linux/bpf.h; does not know what the sockets are for.

#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_DETACH: libc::c_long = 34;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
/// The size of `union bpf_attr` that is passed: more than any of the calls reads, the rest zero.
const ATTRIBUTES: usize = 128;

/// One instruction: operation, registers (source, destination), offset, immediate value.
const fn op(code: u8, to: u8, from: u8, offset: i16, value: i32) -> [u8; 8] {
    let (offset, value) = (offset.to_ne_bytes(), value.to_ne_bytes());
    [code, from << 4 | to, offset[0], offset[1], value[0], value[1], value[2], value[3]]
}

/// Gives every TCP connection the socket at 0 of the map, or that at 1 for IPv6; leaves all others alone.
fn program(map: RawFd) -> [[u8; 8]; 23] {
    const MAP_LOOKUP: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;
    const PASS: i16 = 21;
    /// How far it is from the instruction after `at` to the end.
    const fn to_pass(at: i16) -> i16 {
        PASS - at - 1
    }
    // Offsets in struct bpf_sk_lookup: family 8, protocol 12.
    [
        op(0xbf, 6, 1, 0, 0),                          //  0 r6 = context
        op(0x61, 2, 6, 12, 0),                         //  1 r2 = protocol
        op(0x55, 2, 0, to_pass(2), libc::IPPROTO_TCP), //  2 not TCP: pass
        op(0x61, 2, 6, 8, 0),                          //  3 r2 = family
        op(0xb7, 3, 0, 0, 0),                          //  4 r3 = 0
        op(0x55, 2, 0, 1, libc::AF_INET6),             //  5 not IPv6: skip
        op(0xb7, 3, 0, 0, 1),                          //  6 r3 = 1
        op(0x63, 10, 3, -4, 0),                        //  7 key = r3
        op(0x18, 1, 1, 0, map),                        //  8 r1 = map
        op(0, 0, 0, 0, 0),                             //  9
        op(0xbf, 2, 10, 0, 0),                         // 10 r2 = frame
        op(0x07, 2, 0, 0, -4),                         // 11 r2 = address of the key
        op(0x85, 0, 0, 0, MAP_LOOKUP),                 // 12 r0 = socket
        op(0x15, 0, 0, to_pass(13), 0),                // 13 none: pass
        op(0xbf, 7, 0, 0, 0),                          // 14 r7 = socket
        op(0xbf, 1, 6, 0, 0),                          // 15 r1 = context
        op(0xbf, 2, 0, 0, 0),                          // 16 r2 = socket
        op(0xb7, 3, 0, 0, 0),                          // 17 r3 = no flags
        op(0x85, 0, 0, 0, SK_ASSIGN),                  // 18
        op(0xbf, 1, 7, 0, 0),                          // 19 r1 = socket
        op(0x85, 0, 0, 0, SK_RELEASE),                 // 20
        op(0xb7, 0, 0, 0, 1),                          // 21 SK_PASS
        op(0x95, 0, 0, 0, 0),                          // 22 end
    ]
}

/// A program that is attached to a network namespace until this is dropped. Detached by name: closing the
/// descriptor would not do while a child that was just forked has another one.
#[derive(Debug)]
pub struct Attached(OwnedFd);

impl Drop for Attached {
    fn drop(&mut self) {
        // It fails only where the namespace is gone, and the program with it.
        let _ = bpf_done(BPF_LINK_DETACH, &words(&[self.0.as_raw_fd() as u32]));
    }
}

/// From now on every TCP connection to the stack of `netns` goes to the listening socket of its family, IPv4's
/// first, until the answer is dropped.
pub(crate) fn take_connections(netns: BorrowedFd<'_>, sockets: &[BorrowedFd<'_>]) -> io::Result<Attached> {
    let map = bpf(BPF_MAP_CREATE, &words(&[BPF_MAP_TYPE_SOCKMAP, 4, 8, 2]))?;
    for (key, socket) in sockets.iter().enumerate() {
        let (key, value) = ((key as u32).to_ne_bytes(), (socket.as_raw_fd() as u64).to_ne_bytes());
        let pointers = [key.as_ptr() as u64, value.as_ptr() as u64, 0];
        let attributes = [words(&[map.as_raw_fd() as u32, 0]), longs(&pointers)].concat();
        bpf_done(BPF_MAP_UPDATE_ELEM, &attributes)?;
    }
    let program = program(map.as_raw_fd());
    let license = c"Apache-2.0";
    let attributes = [
        words(&[BPF_PROG_TYPE_SK_LOOKUP, program.len() as u32]),
        longs(&[program.as_ptr() as u64, license.as_ptr() as u64]),
        // No log; a kernel that refuses this program refuses such programs.
        words(&[0, 0]),
        longs(&[0]),
        words(&[0, 0]),
        b"bulkhead_pod\0\0\0\0".to_vec(),
        words(&[0, BPF_SK_LOOKUP]),
    ]
    .concat();
    let program = bpf(BPF_PROG_LOAD, &attributes)?;
    let link = words(&[program.as_raw_fd() as u32, netns.as_raw_fd() as u32, BPF_SK_LOOKUP, 0]);
    bpf(BPF_LINK_CREATE, &link).map(Attached)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

/// A call that makes something.
fn bpf(command: libc::c_long, attributes: &[u8]) -> io::Result<OwnedFd> {
    let fd = call(command, attributes)?;
    // SAFETY: the kernel has just made this descriptor for us, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A call that makes nothing.
fn bpf_done(command: libc::c_long, attributes: &[u8]) -> io::Result<()> {
    call(command, attributes).map(drop)
}

fn call(command: libc::c_long, attributes: &[u8]) -> io::Result<RawFd> {
    let mut whole = [0; ATTRIBUTES];
    whole[..attributes.len()].copy_from_slice(attributes);
    // SAFETY: the kernel reads the attributes, whose size is passed and which outlive the call, and what they
    // point to: keys, values, instructions and the license, which the callers keep until the call is over.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, whole.as_ptr(), ATTRIBUTES) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer as RawFd) }
}
