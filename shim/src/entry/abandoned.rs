//! Notices that containerd has given the sandbox up without ending it.
//! Knows the bundle and the command line of `delete`; asks nothing of the sandbox.
//!
//! containerd removes a bundle when it is done with it. When it comes back from a crash and finds a sandbox
//! whose first container is not yet made, it removes the bundle before it runs `delete` in it, which then
//! cannot be run at all: nobody would ever end this process.

use std::{
    ffi::OsString,
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use containerd_shim::Flags;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::net::unix::pipe;
use tracing::{error, warn};

/// How long a sandbox whose bundle is gone may take to end by itself: it does after an ordinary Shutdown.
const GRACE: Duration = Duration::from_secs(5);

/// Runs `delete` for this very process when its bundle has gone and it has not ended soon after. What happens to
/// the bundle from the call on is noticed, whenever the answer is awaited.
pub(super) fn take_back_when_abandoned(flags: &Flags, bundle: &Path) -> impl Future<Output = ()> + use<> {
    let (watch, arguments) = (watch(bundle), arguments(flags, bundle));
    async move {
        let gone = async { gone(watch?).await };
        if let Err(error) = gone.await {
            warn!(%error, "cannot watch the bundle");
            return;
        }
        tokio::time::sleep(GRACE).await;
        error!("containerd has removed the bundle without ending the sandbox: taking it back");
        take_back(&arguments);
    }
}

/// Runs `delete` for this very process: containerd was never told that it is there.
pub(super) fn take_back_untold(flags: &Flags, bundle: &Path) {
    error!("start was killed before it could tell containerd of this process: taking the sandbox back");
    take_back(&arguments(flags, bundle));
}

fn take_back(arguments: &[OsString]) {
    if let Err(error) = run_delete(arguments) {
        error!(%error, "run delete");
    }
}

fn watch(bundle: &Path) -> io::Result<Inotify> {
    let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    watch.add_watch(bundle, AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF)?;
    Ok(watch)
}

/// Resolves when the watched directory has been removed, or moved away to be removed. A process that works in it
/// learns of the latter alone: to the kernel it is there as long as somebody does.
async fn gone(watch: Inotify) -> io::Result<()> {
    // Readable as a pipe is, which is all that is needed.
    let watch = pipe::Receiver::from_owned_fd_unchecked(OwnedFd::from(watch))?;
    watch.readable().await.map(drop)
}

/// What `delete` is told of this sandbox.
fn arguments(flags: &Flags, bundle: &Path) -> Vec<OsString> {
    let (id, namespace, address) = (flags.id.as_str(), flags.namespace.as_str(), flags.address.as_str());
    let words = ["-namespace", namespace, "-id", id, "-address", address, "-bundle"];
    words.map(OsString::from).into_iter().chain([bundle.into(), "delete".into()]).collect()
}

/// Another process, for it ends this one.
fn run_delete(arguments: &[OsString]) -> io::Result<()> {
    Command::new(std::env::current_exe()?)
        .args(arguments)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_bundle_that_is_moved_away_or_removed_is_gone() {
        let tmp = tempfile::tempdir().unwrap();
        for moved in [true, false] {
            let bundle = tmp.path().join("b");
            std::fs::create_dir(&bundle).unwrap();
            let mut watching = std::pin::pin!(gone(watch(&bundle).unwrap()));
            let early = tokio::time::timeout(Duration::from_millis(50), &mut watching).await;
            assert!(early.is_err(), "it is still there");
            if moved {
                std::fs::rename(&bundle, tmp.path().join(".b")).unwrap();
            } else {
                std::fs::remove_dir(&bundle).unwrap();
            }
            tokio::time::timeout(Duration::from_secs(5), watching).await.expect("it is gone").unwrap();
        }
    }
}
