//! `bulkhead-vmm`: one process, one virtual machine.
//! Started by the shim with one end of a socket; everything else arrives by that (see `bulkhead_vmm_spec::wire`).
//!
//! Entered by the C library, without the start of Rust's: that one prepares to name a stack overflow, for which
//! it asks the system a dozen things and each thread gets a further stack. Such a fault ends the process in
//! either case.
#![allow(unsafe_code)]
#![cfg_attr(not(test), no_main)]

mod arch;
mod boot;
mod bus;
mod control;
mod devices;
mod door;
mod jail;
mod kvm;
mod legacy;
mod machine;
mod memory;
mod outcome;
mod seccomp;
mod sys;

use bulkhead_vmm_spec::wire::status;

const USAGE: &str = "\
Usage: bulkhead-vmm --control-fd FD

Runs one virtual machine for the shim, which passes a connected SOCK_SEQPACKET socket as FD.

Options:
  --control-fd FD  The socket to the shim
  --version        Print the version
  --help           Print this text";

/// The program's entry; the standard library has the arguments from where the C library put them.
// SAFETY: the only symbol of this name, with the signature that the C library calls it by.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn main() -> libc::c_int {
    sys::share_heaps();
    // As Rust's own start does: a reader that is gone is an error of a write, not the end of us.
    if let Err(error) = sys::ignore_broken_pipes() {
        eprintln!("bulkhead-vmm: cannot ignore SIGPIPE: {error}");
        return status::FAILED;
    }
    run()
}

/// Does what the command line says; answers the exit status.
fn run() -> i32 {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let fd = match words[..] {
        ["--version"] => {
            println!("bulkhead-vmm {}", env!("CARGO_PKG_VERSION"));
            return 0;
        }
        ["--help"] => {
            println!("{USAGE}");
            return 0;
        }
        ["--control-fd", fd] => fd.parse().ok().filter(|&fd| fd > 2),
        _ => None,
    };
    let Some(fd) = fd else {
        eprintln!("{USAGE}");
        return status::USAGE;
    };
    match machine::serve(fd) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("bulkhead-vmm: {error}");
            status::FAILED
        }
    }
}
