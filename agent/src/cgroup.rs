//! The cgroup v2 hierarchy of the guest: one cgroup for each container, below /bulkhead, and below /debug one for each
//! program that looks at the guest itself.
//! Knows the kernel's files; must not know what a container is.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::{Interest, unix::AsyncFd};

/// Where the hierarchy is mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";

/// Parent of the containers' cgroups.
pub(crate) const PODS: &str = "/sys/fs/cgroup/bulkhead";

/// Parent of the cgroups of programs that look at the guest itself.
const DEBUG: &str = "/sys/fs/cgroup/debug";

/// Directory of the cgroup of such a program.
pub(crate) fn debug_path(exec: &str) -> PathBuf {
    Path::new(DEBUG).join(exec)
}

/// Directory of a container's cgroup.
pub(crate) fn path(id: &str) -> PathBuf {
    Path::new(PODS).join(id)
}

/// `cgroupsPath` of a container.
pub(crate) fn oci_path(id: &str) -> PathBuf {
    Path::new("/bulkhead").join(id)
}

/// Controllers that the kernel offers in `cgroup`.
pub(crate) fn controllers(cgroup: &Path) -> io::Result<Vec<String>> {
    let text = fs::read_to_string(cgroup.join("cgroup.controllers"))?;
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// Hands every controller of `cgroup` on to its children.
pub(crate) fn enable_controllers(cgroup: &Path) -> anyhow::Result<()> {
    let at = || format!("enable the controllers of {}", cgroup.display());
    for controller in controllers(cgroup).with_context(at)? {
        fs::write(cgroup.join("cgroup.subtree_control"), format!("+{controller}"))
            .with_context(|| format!("{}: {controller}", at()))?;
    }
    Ok(())
}

/// Sends SIGKILL to all in `cgroup` and below; those that are frozen too.
pub(crate) fn kill(cgroup: &Path) -> io::Result<()> {
    match fs::write(cgroup.join("cgroup.kill"), "1") {
        // Nothing is left to kill.
        Err(e) if gone(&e) => Ok(()),
        result => result,
    }
}

/// Removes an empty cgroup with those below it.
pub(crate) fn remove(cgroup: &Path) -> io::Result<()> {
    for child in children(cgroup)? {
        remove(&child)?;
    }
    match fs::remove_dir(cgroup) {
        Err(e) if gone(&e) => Ok(()),
        result => result,
    }
}

/// Every process in `cgroup` and below.
pub(crate) fn processes(cgroup: &Path) -> io::Result<Vec<i32>> {
    let mut pids: Vec<i32> = match fs::read_to_string(cgroup.join("cgroup.procs")) {
        Ok(text) => text.lines().filter_map(|line| line.parse().ok()).collect(),
        // A cgroup of threads lists its processes at its parent.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Vec::new(),
        Err(e) => return Err(e),
    };
    for child in children(cgroup)? {
        pids.extend(processes(&child)?);
    }
    Ok(pids)
}

fn children(cgroup: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(cgroup) {
        Err(e) if gone(&e) => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut dirs = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            dirs.push(entry.path());
        }
    }
    Ok(dirs)
}

fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// The number after `key` in a file of lines `key number`.
pub(crate) fn flat_key(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Freezes or thaws `cgroup` and waits until the kernel says that it is done.
pub(crate) async fn freeze(cgroup: &Path, frozen: bool, deadline: Duration) -> io::Result<()> {
    // Watch first: the change must not slip between the look and the wait.
    let events = Watch::new(&cgroup.join("cgroup.events"))?;
    fs::write(cgroup.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
    events.wait_for("frozen", frozen.into(), deadline).await
}

/// Waits until no process is left in `cgroup`; zombies do not count.
pub(crate) async fn emptied(cgroup: &Path, deadline: Duration) -> io::Result<()> {
    match Watch::new(&cgroup.join("cgroup.events")) {
        Ok(events) => events.wait_for("populated", 0, deadline).await,
        Err(e) if gone(&e) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Tells when a file of the kernel has changed.
pub(crate) struct Watch {
    path: PathBuf,
    inotify: AsyncFd<OwnedFd>,
}

impl Watch {
    pub(crate) fn new(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(path, AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_DELETE_SELF)?;
        let inotify = crate::sys::register(OwnedFd::from(inotify), Interest::READABLE)?;
        Ok(Self { path: path.to_owned(), inotify })
    }

    /// Returns after a change, and at once if one came since the last call. Fails when the file is gone.
    pub(crate) async fn changed(&self) -> io::Result<()> {
        // The events say no more than that there was a change.
        let mut buffer = [0; 4096];
        self.inotify
            .async_io(Interest::READABLE, |fd| Ok(nix::unistd::read(fd.as_fd(), &mut buffer)?))
            .await?;
        fs::metadata(&self.path).map(|_| ())
    }

    async fn wait_for(&self, key: &str, value: u64, deadline: Duration) -> io::Result<()> {
        let wait = async {
            while flat_key(&fs::read_to_string(&self.path)?, key) != Some(value) {
                self.changed().await?;
            }
            Ok(())
        };
        match tokio::time::timeout(deadline, wait).await {
            Ok(result) => result,
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{} did not reach `{key} {value}` within {deadline:?}", self.path.display()),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_by_its_whole_name() {
        let text = "low 0\nhigh 2\noom 3\noom_kill 4\noom_group_kill 5\n";
        assert_eq!(flat_key(text, "oom_kill"), Some(4));
        assert_eq!(flat_key(text, "oom"), Some(3));
        assert_eq!(flat_key(text, "max"), None);
    }

    #[test]
    fn processes_are_found_in_nested_cgroups() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("inner")).unwrap();
        fs::write(dir.path().join("cgroup.procs"), "1\n2\n").unwrap();
        fs::write(dir.path().join("inner/cgroup.procs"), "3\n").unwrap();
        assert_eq!(processes(dir.path()).unwrap(), [1, 2, 3]);
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_change_or_with_its_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cgroup.events");
        fs::write(&file, "populated 1\nfrozen 0\n").unwrap();
        let e = emptied(dir.path(), Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::TimedOut);
        let (waited, ()) = tokio::join!(emptied(dir.path(), Duration::from_secs(10)), async {
            fs::write(&file, "populated 0\nfrozen 0\n").unwrap();
        });
        waited.unwrap();
    }
}
