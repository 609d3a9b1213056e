//! `bulkhead-vmm`: one process, one virtual machine.
//! Started by the shim with one end of a socket; everything else arrives by that (see `bulkhead_vmm_spec::wire`).

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

use std::process::ExitCode;

use bulkhead_vmm_spec::wire::status;

const USAGE: &str = "\
Usage: bulkhead-vmm --control-fd FD

Runs one virtual machine for the shim, which passes a connected SOCK_SEQPACKET socket as FD.

Options:
  --control-fd FD  The socket to the shim
  --version        Print the version
  --help           Print this text";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let fd = match words[..] {
        ["--version"] => {
            println!("bulkhead-vmm {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["--help"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        ["--control-fd", fd] => fd.parse().ok().filter(|&fd| fd > 2),
        _ => None,
    };
    let Some(fd) = fd else {
        eprintln!("{USAGE}");
        return exit(status::USAGE);
    };
    match machine::serve(fd) {
        Ok(status) => exit(status),
        Err(error) => {
            eprintln!("bulkhead-vmm: {error}");
            exit(status::FAILED)
        }
    }
}

fn exit(status: i32) -> ExitCode {
    ExitCode::from(status as u8)
}
