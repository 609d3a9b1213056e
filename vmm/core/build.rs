//! Compiles the filters of system calls: seccomp.json becomes BPF programs inside the binary.

use std::{env, fmt::Write, fs, path::Path};

fn main() {
    const SOURCE: &str = "src/seccomp.json";
    println!("cargo::rerun-if-changed={SOURCE}");
    let text = fs::read(SOURCE).expect("read seccomp.json");
    let arch = "x86_64".try_into().expect("the only architecture");
    let filters = seccompiler::compile_from_json(&text[..], arch).expect("compile seccomp.json");
    let mut out = String::new();
    for (kind, program) in filters {
        let name = kind.to_uppercase();
        writeln!(out, "static {name}: [Instruction; {}] = [", program.len()).expect("write to memory");
        for i in program {
            writeln!(out, "    ({}, {}, {}, {}),", i.code, i.jt, i.jf, i.k).expect("write to memory");
        }
        out.push_str("];\n");
    }
    let dir = env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    fs::write(Path::new(&dir).join("filters.rs"), out).expect("write the filters");
}
