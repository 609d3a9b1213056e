//! The ways in which the shim's binary is run: by containerd `start`, serving, `delete`, `-info`, `-v`; by the shim
//! itself as a container's stand-in.
//! Knows containerd's command line (contract, sections 2 and 3); does not know what a task is.

mod abandoned;
mod bootstrap;
mod connections;
mod delete;
mod info;
mod serve;
pub(crate) mod stand_in;
mod start;

use std::io::Write;

use containerd_shim::Flags;

/// The name under which containerd knows this runtime.
pub const RUNTIME_NAME: &str = "io.containerd.bulkhead.v2";

/// Does what the arguments say and answers the exit status.
///
/// containerd reads standard output and standard error of `start` together, so nothing is written there but
/// the answer, or the reason of a failure.
pub fn main() -> i32 {
    if std::env::args_os().next().is_some_and(|name| name == stand_in::NAME) {
        return stand_in::main();
    }
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let flags = match containerd_shim::parse(&args) {
        Ok(flags) => flags,
        Err(error) => return failed(&error.to_string()),
    };
    let result = if flags.version {
        version()
    } else if flags.info {
        info::info()
    } else {
        match flags.action.as_str() {
            "start" => start::start(&flags),
            "delete" => delete::delete(&flags),
            "" if !flags.socket.is_empty() => serve::serve(&flags),
            "" => Err("no action: containerd runs this program with \"start\" or \"delete\"".into()),
            other => Err(format!(
                "unknown action {other:?}: containerd runs this program with \"start\" or \"delete\""
            )),
        }
    };
    match result {
        Ok(()) => 0,
        Err(reason) => failed(&reason),
    }
}

fn failed(reason: &str) -> i32 {
    let _ = writeln!(std::io::stderr(), "{RUNTIME_NAME}: {reason}");
    1
}

/// As the Go shims print it.
fn version() -> Result<(), String> {
    println!(
        "containerd-shim-bulkhead-v2:\n  Version:  {}\n  Runtime:  {RUNTIME_NAME}",
        env!("CARGO_PKG_VERSION")
    );
    Ok(())
}

/// Refuses ids that would lead out of their directories.
fn check_flags(flags: &Flags) -> Result<(), String> {
    crate::ids::ContainerId::parse(&flags.id).map_err(|e| format!("-id: {e}"))?;
    crate::ids::ContainerId::parse(&flags.namespace).map_err(|e| format!("-namespace: {e}"))?;
    Ok(())
}
