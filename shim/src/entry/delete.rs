//! `delete`: takes back what a shim left that is not there any more. May be run twice, and in a bundle
//! where `start` never ran.
//! Knows the ledger and the bundle; asks no running shim for anything.
//!
//! A shim that still runs is ended first: containerd has given it up. It also gives up single containers of
//! a pod whose shim is alive (contract, D4); such a bundle has no sandbox of its own, so nothing of the pod
//! is touched.

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use containerd_shim::Flags;
use containerd_shim_protos::{
    api::DeleteResponse,
    protobuf::{Message, MessageField, well_known_types::timestamp::Timestamp},
};

use super::check_flags;
use crate::{
    config::Config,
    error::chain,
    ledger,
    sandbox::host::{POD_DELETED, sandbox_dir},
};

/// How long a connection that nobody accepts may take to be cut. A served one is silent for as long.
const CUT: Duration = Duration::from_millis(500);

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
    if !ends_by_itself(&dir, &bundle, flags) {
        left.extend(take_back(&dir));
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

/// What a sandbox holds whose directory is `dir`; answers what is left.
fn take_back(dir: &Path) -> Vec<String> {
    let mut left = Vec::new();
    if let Err(error) = ledger::release_left_behind(dir) {
        left.push(chain(&error));
    }
    // Made before its ledger, so it may be there without one.
    if let Err(error) = std::fs::remove_dir(dir)
        && error.kind() != ErrorKind::NotFound
    {
        left.push(format!("{}: {error}", dir.display()));
    }
    left
}

/// The same for a `start` whose serving process of the sandbox `group` has ended before it served `socket`.
/// What cannot be taken back is not told: containerd shows why the start failed.
pub(super) fn after_start(flags: &Flags, group: &str, socket: &Path) {
    let config = Config::load(None).unwrap_or_default();
    take_back(&sandbox_dir(&config.state_dir, &flags.namespace, group));
    let _ = std::fs::remove_file(socket);
}

/// Whether the sandbox is a pod that was deleted in order while containers of it remained: its shim, which is
/// still there, ends with the last of them.
fn ends_by_itself(dir: &Path, bundle: &Path, flags: &Flags) -> bool {
    dir.join(POD_DELETED).exists() && sockets(bundle, flags).any(|path| is_served(&path))
}

/// Removes the socket unless somebody serves it, as a pod's shim does for a container of the pod.
fn remove_stale_sockets(bundle: &Path, flags: &Flags) {
    for path in sockets(bundle, flags) {
        if !is_served(&path) {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Where the sandbox's socket can be.
///
/// The bundle says where it is, but containerd may have removed the bundle already: when it comes back
/// from a crash it does so while this runs. Then it is where `start` puts it without being told otherwise.
fn sockets(bundle: &Path, flags: &Flags) -> impl Iterator<Item = PathBuf> {
    let told = std::fs::read_to_string(bundle.join("address")).ok();
    let usual = containerd_shim::socket_address(&flags.address, &flags.namespace, &flags.id);
    told.into_iter().chain([usual]).map(|address| PathBuf::from(address.trim().trim_start_matches("unix://")))
}

/// Whether somebody serves the socket. A child that a killed shim was about to start holds a copy of the
/// listener for a moment and accepts nothing: a connection to it is cut when it goes.
fn is_served(path: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(path) else { return false };
    if stream.set_read_timeout(Some(CUT)).is_err() {
        return true;
    }
    match stream.read(&mut [0]) {
        Ok(read) => read > 0,
        Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
    }
}
