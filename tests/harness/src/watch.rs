//! Waiting for something new: a file in a directory, words in a log.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::fs::inotify;

use crate::command::{Run, readable};
use crate::pace::stretched;

/// Waits until a log has lines from a byte on, one for each of these lists of words, in this order; at most so many
/// seconds.
pub(crate) fn log_says(log: &Path, from: u64, lines: &[&[&str]], seconds: u64) -> Result<()> {
    let start = format!("+{}", from + 1);
    let follow = Run::new("tail").args(["-c", &start, "-f"]).arg(log).deadline(seconds).spawn()?;
    let enough = |said: &str| {
        let mut wanted = lines.iter().peekable();
        for line in said.lines() {
            wanted.next_if(|words| words.iter().all(|word| line.contains(word)));
        }
        wanted.peek().is_none()
    };
    follow.wait_until(&format!("{lines:?} in {}", log.display()), enough)
}

/// Sees what is made in a directory, or written to a file, from its own making on.
pub struct Watcher {
    fd: OwnedFd,
}

impl Watcher {
    /// Watches `dir` for what is made there.
    pub fn new(dir: &Path) -> Result<Self> {
        Self::of(dir, inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO)
    }

    /// Watches `file` for what is written to it.
    pub fn of_file(file: &Path) -> Result<Self> {
        Self::of(file, inotify::WatchFlags::MODIFY)
    }

    fn of(path: &Path, events: inotify::WatchFlags) -> Result<Self> {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC).context("inotify")?;
        inotify::add_watch(&fd, path, events).with_context(|| format!("watch {}", path.display()))?;
        Ok(Self { fd })
    }

    /// Waits until something of it has happened since the last time.
    pub fn wait(&self, timeout: Duration) -> Result<()> {
        let timeout = stretched(timeout);
        if !readable(self.fd.as_fd(), timeout)? {
            bail!("nothing happened within {timeout:?}");
        }
        // Several events at once are one.
        rustix::io::read(&self.fd, &mut [0; 4096]).context("read of inotify")?;
        Ok(())
    }
}
