//! Has the linker keep one of several functions with the same code: generics leave many.

fn main() {
    // Known to LLVM's linker, which rustc brings and uses on this target (since 1.90).
    println!("cargo::rustc-link-arg-bins=-Wl,--icf=all");
    println!("cargo::rerun-if-changed=build.rs");
}
