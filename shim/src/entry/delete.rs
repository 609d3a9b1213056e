//! `delete`: takes back what a shim left that is not there any more. May be run twice, and in a bundle
//! where `start` never ran.
//! Knows the ledger and the bundle; asks no running shim for anything.
//!
//! A shim that still runs is ended first: containerd has given it up. It also gives up single containers of
//! a pod whose shim is alive (contract, D4); such a bundle has no sandbox of its own, so nothing of the pod
//! is touched.

use std::{
    io::Write,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::SystemTime,
};

use containerd_shim::Flags;
use containerd_shim_protos::{
    api::DeleteResponse,
    protobuf::{Message, MessageField, well_known_types::timestamp::Timestamp},
};

use super::check_flags;
use crate::{config::Config, error::chain, ledger, sandbox::host::sandbox_dir};

/// 128 + SIGKILL, by convention (contract, D1).
const STATUS: u32 = 137;

pub(super) fn delete(flags: &Flags) -> Result<(), String> {
    check_flags(flags)?;
    let bundle = match flags.bundle.as_str() {
        "" => std::env::current_dir().map_err(|e| format!("find the bundle: {e}"))?,
        path => PathBuf::from(path),
    };
    // The defaults name the same directory unless the file says otherwise; a broken file must not keep
    // anything from being taken back.
    let config = Config::load(None).unwrap_or_default();
    let dir = sandbox_dir(&config.state_dir, &flags.namespace, &flags.id);
    let mut left = Vec::new();
    if let Err(error) = ledger::release_left_behind(&dir) {
        left.push(chain(&error));
    }
    // Made before its ledger, so it may be there without one.
    if let Err(error) = std::fs::remove_dir(&dir)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        left.push(format!("{}: {error}", dir.display()));
    }
    remove_stale_sockets(&bundle, flags);
    if let Err(error) = ledger::unmount(&bundle.join("rootfs")) {
        left.push(format!("unmount {}: {error}", bundle.join("rootfs").display()));
    }
    for what in &left {
        // containerd logs it as a warning (contract, D3).
        let _ = writeln!(std::io::stderr(), "{what}");
    }
    let response = DeleteResponse {
        exit_status: STATUS,
        exited_at: MessageField::some(Timestamp::from(SystemTime::now())),
        ..Default::default()
    };
    let bytes = response.write_to_bytes().map_err(|e| format!("encode the answer: {e}"))?;
    let mut stdout = std::io::stdout();
    stdout.write_all(&bytes).and_then(|()| stdout.flush()).map_err(|e| format!("answer: {e}"))
}

/// Removes the socket unless somebody serves it, as a pod's shim does for a container of the pod.
///
/// The bundle says where it is, but containerd may have removed the bundle already: when it comes back
/// from a crash it does so while this runs. Then it is where `start` puts it without being told otherwise.
fn remove_stale_sockets(bundle: &Path, flags: &Flags) {
    let told = std::fs::read_to_string(bundle.join("address")).ok();
    let usual = containerd_shim::socket_address(&flags.address, &flags.namespace, &flags.id);
    for address in told.into_iter().chain([usual]) {
        let path = PathBuf::from(address.trim().trim_start_matches("unix://"));
        if UnixStream::connect(&path).is_err() {
            let _ = std::fs::remove_file(path);
        }
    }
}
