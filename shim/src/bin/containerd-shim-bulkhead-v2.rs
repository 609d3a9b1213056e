//! The shim: started by containerd, once for each pod.

fn main() {
    std::process::exit(bulkhead_shim::entry::main());
}
