//! The operator's command.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_shim::cli::main()
}
