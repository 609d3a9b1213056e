//! Waiting for something new in a directory, by inotify.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::fs::inotify;

use crate::command::readable;
use crate::pace::stretched;

/// Sees what is made in a directory from its own making on.
pub struct Watcher {
    fd: OwnedFd,
}

impl Watcher {
    /// Watches `dir`.
    pub fn new(dir: &Path) -> Result<Self> {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC).context("inotify")?;
        let events = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
        inotify::add_watch(&fd, dir, events).with_context(|| format!("watch {}", dir.display()))?;
        Ok(Self { fd })
    }

    /// Waits until something has been made.
    pub fn wait(&self, timeout: Duration) -> Result<()> {
        let timeout = stretched(timeout);
        if !readable(self.fd.as_fd(), timeout)? {
            bail!("nothing was made within {timeout:?}");
        }
        Ok(())
    }
}
