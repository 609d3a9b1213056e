//! Generates messages and ttrpc stubs from `agent.proto`; needs no `protoc`.

use std::{env, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    println!("cargo:rerun-if-changed=agent.proto");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    Codegen::new()
        .input("agent.proto")
        .include(".")
        .out_dir(&out)
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()
        .expect("agent.proto compiles");
    // `include!` takes no inner attributes, and the generated files begin with some.
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        let path = out.join(name);
        let text = fs::read_to_string(&path).expect("generated file is readable");
        let body: Vec<&str> =
            text.lines().filter(|l| !l.starts_with("#!") && !l.starts_with("//!")).collect();
        fs::write(&path, body.join("\n")).expect("generated file is writable");
    }
}
