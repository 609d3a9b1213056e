//! `bulkhead version`: what this is, and what it works with.

use std::io::Write;
use std::path::Path;

use serde::Serialize;

use super::output::{self, Format};
use super::{Report, check};
use crate::config::Config;

#[derive(Debug, Serialize)]
pub(super) struct Versions {
    bulkhead: &'static str,
    /// Between shim and agent.
    protocol: u32,
    /// Of the guest; absent where the kernel cannot be read.
    guest_kernel: Option<String>,
    vmm: Option<String>,
    qemu: Option<String>,
    virtiofsd: Option<String>,
    host_kernel: String,
}

/// What is installed, as the configuration names it.
pub(super) fn versions(config: &Config) -> Versions {
    let program =
        |path: Result<_, _>| path.ok().and_then(|path: std::path::PathBuf| check::version_of(&path).ok());
    Versions {
        bulkhead: env!("CARGO_PKG_VERSION"),
        protocol: bulkhead_proto::PROTOCOL_VERSION,
        guest_kernel: config.resolve_kernel().ok().and_then(|path| check::kernel_release(&path)),
        vmm: program(config.resolve_vmm()),
        qemu: program(config.resolve_qemu()),
        virtiofsd: program(config.resolve_virtiofsd()),
        host_kernel: check::host_kernel(),
    }
}

pub(super) fn run(report: Report, config: Option<&Path>, out: &mut dyn Write) -> anyhow::Result<()> {
    let versions = versions(&Config::load(config)?);
    if report.output == Format::Json {
        return output::json(out, &versions);
    }
    let or_none =
        |version: Option<String>| version.unwrap_or_else(|| "not found (see `bulkhead check`)".into());
    let rows = [
        ["bulkhead".into(), versions.bulkhead.to_owned()],
        ["protocol".into(), versions.protocol.to_string()],
        ["guest kernel".into(), or_none(versions.guest_kernel)],
        ["vmm".into(), or_none(versions.vmm)],
        ["qemu".into(), or_none(versions.qemu)],
        ["virtiofsd".into(), or_none(versions.virtiofsd)],
        ["host kernel".into(), versions.host_kernel],
    ];
    Ok(output::columns(out, &rows)?)
}
