//! The shim with places where it fails or is killed, for tests; never shipped. `failing-shim failpoints` names them.

use std::io::Write;

fn main() {
    if std::env::args().skip(1).eq(["failpoints"]) {
        let list = bulkhead_shim::failpoints();
        std::process::exit(std::io::stdout().write_all(list.as_bytes()).is_err().into());
    }
    std::process::exit(bulkhead_shim::entry::main());
}
