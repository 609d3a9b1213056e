//! Every resource of the host that a sandbox holds, written down before it is made.
//! Knows how to take each back; does not know why it was made.
//!
//! The ledger is a file of JSON lines. The shim appends an entry, then makes the thing. Whoever unwinds
//! (the shim itself, or `delete` after the shim was killed) takes the entries back in reverse order, each
//! of them whether the thing was made or not: taking back what is not there is no error.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::Mode,
};
use oci_spec::runtime::Hook;
use serde::{Deserialize, Serialize};

use crate::{hooks, process};

/// Name of the ledger in a sandbox's directory.
pub const FILE_NAME: &str = "ledger";

/// One thing on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Entry {
    /// A process of ours. The start time tells it from a later one that got the same pid.
    Process {
        /// What it is, for the log.
        name: String,
        /// Its pid on the host.
        pid: i32,
        /// Field 22 of /proc/<pid>/stat, in clock ticks since boot.
        start_time: u64,
        /// The container it was made for; None for the sandbox itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        container: Option<String>,
    },
    /// What hooks of the host have made for a container: its `poststop` hooks take that back.
    Hooks {
        /// The hooks.
        poststop: Vec<Hook>,
        /// The container's state at that time, as they are told it.
        state: String,
        /// The container.
        container: Option<String>,
    },
    /// A mount point. What is mounted over it later is taken away with it.
    Mount {
        /// Where.
        target: PathBuf,
        /// The container it was made for; None for the sandbox itself.
        container: Option<String>,
    },
    /// A directory with all that we put into it.
    Directory {
        /// Which.
        path: PathBuf,
        /// The container it was made for; None for the sandbox itself.
        container: Option<String>,
    },
    /// A file or socket.
    File {
        /// Which.
        path: PathBuf,
    },
    /// What makes a link of a network namespace give its frames to a tap. The tap goes with its machine.
    Redirection {
        /// The namespace.
        netns: PathBuf,
        /// Device of the namespace; another one may have its path later.
        device: u64,
        /// Inode of the namespace.
        inode: u64,
        /// Number of the link in it.
        link: u32,
        /// The link's queueing discipline is not ours.
        keep_ingress: bool,
    },
    /// A control group of the host, in every hierarchy that has it.
    Cgroup {
        /// Relative to the root of the hierarchy.
        path: String,
    },
}

impl Entry {
    fn container(&self) -> Option<&str> {
        match self {
            Entry::Process { container, .. }
            | Entry::Hooks { container, .. }
            | Entry::Mount { container, .. }
            | Entry::Directory { container, .. } => container.as_deref(),
            _ => None,
        }
    }

    fn is_process(&self) -> bool {
        matches!(self, Entry::Process { .. })
    }
}

/// Why the ledger could not be kept or unwound.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The file cannot be written: nothing may be made then.
    #[error("ledger {path} cannot be written")]
    Record {
        /// The ledger.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("ledger {path} cannot be read")]
    Read {
        /// The ledger.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Some things could not be taken back; all others were.
    #[error("left on the host: {}", .0.join("; "))]
    Left(Vec<String>),
    /// A test wants it so.
    #[cfg(feature = "failpoints")]
    #[error(transparent)]
    Failpoint(#[from] crate::failpoint::Failed),
}

/// The ledger of one sandbox.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    file: File,
    entries: Vec<Entry>,
}

impl Ledger {
    /// Opens the ledger in `dir`, which exists; a new one is empty.
    pub fn open(dir: &Path) -> Result<Self, LedgerError> {
        let path = dir.join(FILE_NAME);
        let record = |source| LedgerError::Record { path: path.clone(), source };
        let file = OpenOptions::new().append(true).create(true).open(&path).map_err(record)?;
        let entries = read(&path)?;
        Ok(Self { path, file, entries })
    }

    /// Writes `entry` down. Only when this has succeeded may the thing be made.
    pub fn record(&mut self, entry: Entry) -> Result<(), LedgerError> {
        let mut line = serde_json::to_vec(&entry).expect("an entry is plain data");
        line.push(b'\n');
        self.file
            .write_all(&line)
            .map_err(|source| LedgerError::Record { path: self.path.clone(), source })?;
        self.entries.push(entry);
        Ok(())
    }

    /// What was made for `container`. It is taken back by [`release`], which may take its time, in which others must
    /// be able to write here; and only then forgotten, for whoever unwinds after a kill in between must find it.
    pub fn of_container(&self, container: &str) -> Result<Vec<Entry>, LedgerError> {
        fail_point!(ReleaseHost);
        let ours = self.entries.iter().filter(|entry| entry.container() == Some(container));
        Ok(ours.cloned().collect())
    }

    /// Forgets `released`, but for what is left of it: that is tried again at the end of the sandbox.
    pub fn forget(&mut self, released: &[Entry], left: Left) -> Result<(), LedgerError> {
        fail_point!(ReleaseForget);
        let is_left = |entry: &Entry| left.iter().any(|(left, _)| left == entry);
        self.entries.retain(|entry| !released.contains(entry) || is_left(entry));
        self.rewrite()?;
        all_or(left)
    }

    /// Takes everything back, newest first.
    pub fn release_all(mut self) -> Result<(), LedgerError> {
        let entries = std::mem::take(&mut self.entries);
        let mut left = end_processes(&entries);
        fail_point!(TeardownHalf);
        left.extend(remove_things(&entries));
        all_or(left)
    }

    fn rewrite(&mut self) -> Result<(), LedgerError> {
        let record = |source| LedgerError::Record { path: self.path.clone(), source };
        let next = self.path.with_extension("next");
        let mut text = Vec::new();
        for entry in &self.entries {
            serde_json::to_writer(&mut text, entry).expect("an entry is plain data");
            text.push(b'\n');
        }
        std::fs::write(&next, text).map_err(record)?;
        std::fs::rename(&next, &self.path).map_err(record)?;
        self.file = OpenOptions::new().append(true).open(&self.path).map_err(record)?;
        Ok(())
    }
}

/// Takes back everything that the ledger in `dir` names. A missing ledger is an empty one.
pub fn release_left_behind(dir: &Path) -> Result<(), LedgerError> {
    all_or(release(&read(&dir.join(FILE_NAME))?))
}

fn read(path: &Path) -> Result<Vec<Entry>, LedgerError> {
    let fault = |source| LedgerError::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(fault(e)),
    };
    let mut entries = Vec::new();
    for line in BufReader::new(file).lines() {
        // A line that a killed shim did not finish stands for a thing that was not made yet.
        if let Ok(entry) = serde_json::from_str(&line.map_err(fault)?) {
            entries.push(entry);
        }
    }
    Ok(entries)
}

/// What could not be taken back, and why.
pub type Left = Vec<(Entry, String)>;

/// Takes back what `entries` name; answers what is left.
pub fn release(entries: &[Entry]) -> Left {
    let mut left = end_processes(entries);
    left.extend(remove_things(entries));
    left
}

/// Processes come first, whatever the order: nothing can be unmounted or removed under one that uses it. In the
/// order of their making: the first is the shim, which would react to the deaths of the others.
fn end_processes(entries: &[Entry]) -> Left {
    take_back_each(entries.iter().filter(|entry| entry.is_process()))
}

/// Everything that is no process, newest first.
fn remove_things(entries: &[Entry]) -> Left {
    take_back_each(entries.iter().rev().filter(|entry| !entry.is_process()))
}

fn take_back_each<'a>(entries: impl Iterator<Item = &'a Entry>) -> Left {
    entries.filter_map(|entry| take_back(entry).err().map(|why| (entry.clone(), why))).collect()
}

fn all_or(left: Left) -> Result<(), LedgerError> {
    if left.is_empty() {
        return Ok(());
    }
    Err(LedgerError::Left(left.into_iter().map(|(_, why)| why).collect()))
}

fn take_back(entry: &Entry) -> Result<(), String> {
    match entry {
        // A shim that unwinds its own ledger ends by itself.
        Entry::Process { pid, .. } if *pid == std::process::id() as i32 => Ok(()),
        Entry::Process { name, pid, start_time, .. } => {
            process::end(*pid, *start_time).map_err(|e| format!("process {name} ({pid}): {e}"))
        }
        Entry::Hooks { poststop, state, .. } => {
            hooks::run_all(poststop, state).map_err(|e| format!("poststop {e}"))
        }
        Entry::Mount { target, .. } => {
            unmount(target).map_err(|e| format!("mount {}: {e}", target.display()))
        }
        Entry::Directory { path, .. } => {
            remove_tree(path).map_err(|e| format!("directory {}: {e}", path.display()))
        }
        Entry::File { path } => match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(format!("file {}: {e}", path.display())),
            _ => Ok(()),
        },
        Entry::Redirection { netns, device, inode, link, keep_ingress } => {
            let undo = bulkhead_hostnet::Undo {
                netns: netns.clone(),
                identity: (*device, *inode),
                link: *link,
                keep_ingress: *keep_ingress,
            };
            bulkhead_hostnet::undo(&undo)
                .map_err(|e| format!("link {link} in {}: {}", netns.display(), crate::error::chain(&e)))
        }
        Entry::Cgroup { path } => crate::cgroup::remove(path).map_err(|e| format!("cgroup {path}: {e}")),
    }
}

/// Unmounts all that lies on `target`. Not there, or not a mount point: nothing to do.
pub fn unmount(target: &Path) -> io::Result<()> {
    // A maker that was killed may have left a copy that still shares what is mounted below it with the original,
    // which would lose it as well. By a descriptor, since mount(2) follows a symbolic link.
    match open(target, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(there) => {
            let alone = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
            let path = format!("/proc/self/fd/{}", there.as_raw_fd());
            match mount(None::<&str>, path.as_str(), None::<&str>, alone, None::<&str>) {
                Ok(()) | Err(Errno::EINVAL) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Err(Errno::ENOENT) => return Ok(()),
        Err(e) => return Err(e.into()),
    }
    loop {
        match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => continue,
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Removes a directory of ours, but never reaches through a mount that is still there: what lies behind
/// one belongs to somebody else.
fn remove_tree(path: &Path) -> io::Result<()> {
    let real = match path.canonicalize() {
        Ok(real) => real,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let prefix = format!("{}/", real.display());
    for point in process::mount_points()? {
        if point.to_string_lossy().starts_with(&prefix) {
            unmount(&point)?;
        }
    }
    if let Some(left) =
        process::mount_points()?.into_iter().find(|p| p.to_string_lossy().starts_with(&prefix))
    {
        return Err(io::Error::other(format!("{} is still mounted", left.display())));
    }
    match std::fs::remove_dir_all(&real) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release_of(ledger: &mut Ledger, container: &str) -> Result<(), LedgerError> {
        let entries = ledger.of_container(container).unwrap();
        let left = release(&entries);
        ledger.forget(&entries, left)
    }

    fn dir_entry(path: &Path, container: Option<&str>) -> Entry {
        Entry::Directory { path: path.to_owned(), container: container.map(str::to_owned) }
    }

    #[test]
    fn what_is_recorded_is_taken_back_by_another_process() {
        let tmp = tempfile::tempdir().unwrap();
        let made = tmp.path().join("made");
        let never = tmp.path().join("never");
        let mut ledger = Ledger::open(tmp.path()).unwrap();
        ledger.record(dir_entry(&made, None)).unwrap();
        std::fs::create_dir_all(made.join("inner")).unwrap();
        ledger.record(Entry::File { path: never }).unwrap();
        drop(ledger);
        release_left_behind(tmp.path()).unwrap();
        assert!(!made.exists());
        release_left_behind(tmp.path()).unwrap();
    }

    #[test]
    fn a_container_takes_only_its_own_with_it() {
        let tmp = tempfile::tempdir().unwrap();
        let (a, b) = (tmp.path().join("a"), tmp.path().join("b"));
        let mut ledger = Ledger::open(tmp.path()).unwrap();
        for (path, id) in [(&a, "a"), (&b, "b")] {
            ledger.record(dir_entry(path, Some(id))).unwrap();
            std::fs::create_dir(path).unwrap();
        }
        release_of(&mut ledger, "a").unwrap();
        assert!(!a.exists() && b.exists());
        drop(ledger);
        assert_eq!(read(&tmp.path().join(FILE_NAME)).unwrap(), vec![dir_entry(&b, Some("b"))]);
    }

    #[test]
    fn what_a_container_leaves_is_tried_again_at_the_end() {
        let tmp = tempfile::tempdir().unwrap();
        let busy = tmp.path().join("busy");
        std::fs::write(&busy, "no directory").unwrap();
        let mut ledger = Ledger::open(tmp.path()).unwrap();
        ledger.record(dir_entry(&busy, Some("a"))).unwrap();
        assert!(release_of(&mut ledger, "a").unwrap_err().to_string().contains("busy"));
        std::fs::remove_file(&busy).unwrap();
        std::fs::create_dir(&busy).unwrap();
        ledger.release_all().unwrap();
        assert!(!busy.exists());
    }

    #[test]
    fn what_hooks_have_made_is_taken_back_by_hooks() {
        let tmp = tempfile::tempdir().unwrap();
        let note = tmp.path().join("note");
        let mut hook = Hook::default();
        hook.set_path("/bin/sh".into());
        let script = format!("cat > {}", note.display());
        hook.set_args(Some(["sh", "-c", &script].map(str::to_owned).to_vec()));
        let mut ledger = Ledger::open(tmp.path()).unwrap();
        let (state, container) = ("{\"id\":\"c\"}".to_owned(), Some("c".to_owned()));
        ledger.record(Entry::Hooks { poststop: vec![hook], state, container }).unwrap();
        drop(ledger);
        release_left_behind(tmp.path()).unwrap();
        assert_eq!(std::fs::read_to_string(note).unwrap(), "{\"id\":\"c\"}");
    }

    #[test]
    fn a_half_written_line_is_passed_over() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(
            tmp.path().join(FILE_NAME),
            "{\"kind\":\"file\",\"path\":\"/nope/x\"}\n{\"kind\":\"pro",
        )
        .unwrap();
        assert_eq!(read(&tmp.path().join(FILE_NAME)).unwrap().len(), 1);
        release_left_behind(tmp.path()).unwrap();
    }

    #[test]
    fn a_process_is_ended_only_if_it_is_the_one_recorded() {
        let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let pid = child.id() as i32;
        let start_time = process::start_time(pid).unwrap().unwrap();
        let other = Entry::Process { name: "other".into(), pid, start_time: start_time + 1, container: None };
        assert!(release(&[other]).is_empty());
        assert!(child.try_wait().unwrap().is_none(), "a process with another start time is not ours");
        // A child of ours stays a zombie until it is waited for; ending it must not wait for that.
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        let ours = Entry::Process { name: "ours".into(), pid, start_time, container: None };
        assert!(release(&[ours]).is_empty());
        assert!(!reaper.join().unwrap().success());
    }

    #[test]
    fn what_cannot_be_taken_back_is_named_and_the_rest_goes() {
        let tmp = tempfile::tempdir().unwrap();
        let gone = tmp.path().join("gone");
        std::fs::create_dir(&gone).unwrap();
        let stuck = tmp.path().join("dir-not-file");
        std::fs::create_dir(&stuck).unwrap();
        let left = release(&[dir_entry(&gone, None), Entry::File { path: stuck.clone() }]);
        let error = all_or(left).unwrap_err();
        assert!(error.to_string().contains("dir-not-file"), "{error}");
        assert!(!gone.exists());
    }
}
