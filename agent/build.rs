//! Tells the linker what is the agent's own: it lies in the memory of every pod, twice while the guest boots.

fn main() {
    // One copy of functions that are the same instructions, of which generic code makes many: 3 % of the program.
    // LLD and gold know the word; LLD is what rustc brings for this target (since 1.90).
    println!("cargo::rustc-link-arg-bins=-Wl,--icf=all");
    println!("cargo::rerun-if-changed=build.rs");
}
