//! What a test left behind: processes, mounts, links, cgroups, files, loop devices.
//! Knows where such things show; the verdict is the runner's.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;

use crate::command::{open_pidfd, signal_process, timespec, wait_for_exit};
use crate::nerdctl::is_nerdctls_own;
use crate::node::Node;

/// A process of the node: a shim, a program it started, or something in a container of runc's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessInfo {
    /// Its process id.
    pub pid: u32,
    /// The process that started it, or that adopted it.
    pub parent: u32,
    /// Name of the program it runs: file name of argv[0].
    pub name: String,
    /// Its arguments.
    pub args: Vec<String>,
}

impl ProcessInfo {
    /// A descriptor of the process, to wait for its end with [`crate::wait_for_exit`]. It may be gone already.
    pub fn pidfd(&self) -> Result<OwnedFd> {
        open_pidfd(self.pid)
    }
}

impl fmt::Display for ProcessInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}: {}", self.pid, self.args.join(" "))
    }
}

/// The state of the host as far as a test of this node can change it.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    processes: BTreeSet<ProcessInfo>,
    rest: BTreeSet<String>,
}

impl Snapshot {
    /// Looks at the host. Must be called in the node's own thread.
    pub fn take(node: &Node) -> Result<Self> {
        let mut rest = BTreeSet::new();
        let mountinfo = fs::read_to_string("/proc/thread-self/mountinfo").context("read mountinfo")?;
        rest.extend(mountinfo.lines().filter_map(mount_line).map(|m| format!("mount {m}")));
        let links = fs::read_to_string("/proc/thread-self/net/dev").context("read net/dev")?;
        rest.extend(
            links
                .lines()
                .skip(2)
                .filter_map(|l| l.split_once(':'))
                .map(|(n, _)| format!("link {}", n.trim())),
        );
        rest.extend(disciplines()?.into_iter().map(|line| format!("queueing discipline {line}")));
        walk(Path::new("/run"), 6, &mut |path| {
            // runc's shim, killed, leaves its two sockets behind; that is not for this suite to judge.
            let runcs = !node.settings().is_bulkhead() && path.starts_with("/run/containerd/s");
            if !runcs && !is_containerds_own(path, node.namespace()) && !is_nerdctls_own(path) {
                rest.insert(format!("file {}", path.display()));
            }
        });
        for entry in fs::read_dir(node.bundles()).into_iter().flatten().flatten() {
            rest.insert(format!("bundle {}", entry.path().display()));
        }
        for dir in cgroups_of(node.mark()) {
            rest.insert(format!("cgroup {}", dir.display()));
        }
        for (name, file) in loop_devices() {
            if file.contains(&node.dir().display().to_string()) {
                rest.insert(format!("loop device {name} of {file}"));
            }
        }
        rest.extend(node.in_cluster()?);
        Ok(Self { processes: processes(node), rest })
    }

    /// What is there now and was not there before, in words.
    pub fn left_since(&self, before: &Self) -> Vec<String> {
        let new = self.processes.difference(&before.processes).map(ToString::to_string);
        new.chain(self.rest.difference(&before.rest).cloned()).collect()
    }

    /// What was there before and is gone now: a test must not tear down what is not its own.
    pub fn lost_since(&self, before: &Self) -> Vec<String> {
        before.rest.difference(&self.rest).cloned().collect()
    }
}

/// Queueing disciplines for incoming frames on the links of this thread's network namespace: what redirects a
/// link's frames hangs on one. Its taps are links, and namespaces with a name are files.
fn disciplines() -> Result<Vec<String>> {
    let output = Command::new("tc").args(["qdisc", "show"]).output().context("run tc (package iproute2)")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let incoming = |line: &&str| line.contains("ingress") || line.contains("clsact");
    Ok(text.lines().filter(incoming).map(str::to_owned).collect())
}

/// Waits until nothing new is left compared with `before`; after `patience` returns what there still is.
///
/// The end of a shim comes after ctr's own: each look is followed by a wait for the next change of a
/// process, a mount or a directory that is in question.
pub(crate) fn settle(node: &Node, before: &Snapshot, patience: Duration) -> Result<Vec<String>> {
    let until = Instant::now() + patience;
    loop {
        let now = Snapshot::take(node)?;
        if now.left_since(before).is_empty() {
            return Ok(now.lost_since(before).into_iter().map(|l| format!("lost: {l}")).collect());
        }
        let watch = Watch::arm(node, &now, before)?;
        // Once more, for what changed before the watch was armed.
        let now = Snapshot::take(node)?;
        let left = now.left_since(before);
        if left.is_empty() {
            continue;
        }
        let time = until.saturating_duration_since(Instant::now());
        if time.is_zero() {
            return Ok(left);
        }
        watch.wait(time)?;
    }
}

/// Everything whose change can make a leftover disappear.
struct Watch {
    mounts: Vec<File>,
    directories: OwnedFd,
    processes: Vec<OwnedFd>,
}

impl Watch {
    fn arm(node: &Node, now: &Snapshot, before: &Snapshot) -> Result<Self> {
        let mut mounts = node.cluster_mounts();
        mounts.push(File::open("/proc/thread-self/mountinfo")?);
        let directories = inotify::init(inotify::CreateFlags::CLOEXEC)?;
        let events =
            inotify::WatchFlags::DELETE | inotify::WatchFlags::MOVED_FROM | inotify::WatchFlags::DELETE_SELF;
        for item in now.rest.difference(&before.rest) {
            let path = item.split_once(' ').map_or("", |(_, p)| p);
            if let Some(parent) = Path::new(path).parent().filter(|p| p.is_dir()) {
                inotify::add_watch(&directories, parent, events).ok();
            }
        }
        let processes =
            now.processes.difference(&before.processes).filter_map(|p| open_pidfd(p.pid).ok()).collect();
        Ok(Self { mounts, directories, processes })
    }

    fn wait(&self, time: Duration) -> Result<()> {
        let mut fds = vec![PollFd::new(&self.directories, PollFlags::IN)];
        fds.extend(self.mounts.iter().map(|table| PollFd::new(table, PollFlags::PRI | PollFlags::ERR)));
        fds.extend(self.processes.iter().map(|p| PollFd::new(p, PollFlags::IN)));
        poll(&mut fds, Some(&timespec(time))).context("wait for leftovers to go")?;
        Ok(())
    }
}

/// "<mount point> <type> <source>" of a line of mountinfo.
pub(crate) fn mount_line(line: &str) -> Option<String> {
    let (left, right) = line.split_once(" - ")?;
    let point = left.split(' ').nth(4)?;
    let mut right = right.split(' ');
    Some(format!("{point} {} {}", right.next()?, right.next()?))
}

fn walk(dir: &Path, depth: u32, found: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        found(&path);
        if depth > 0 && entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&path, depth - 1, found);
        }
    }
}

/// Directories that containerd, ctr and runc make once and keep, and the fifos of ctr, which its `-d` forgets.
/// Also bulkhead's own state directory itself (what must go is what it holds), and the file beside it that remembers
/// until the next boot that the processor virtualises.
fn is_containerds_own(path: &Path, namespace: &str) -> bool {
    let Ok(path) = path.strip_prefix("/run") else { return false };
    let Some(path) = path.to_str() else { return false };
    path.starts_with("containerd/fifo/")
        || [
            "containerd",
            "containerd/s",
            "containerd/fifo",
            "containerd/runc",
            "bulkhead",
            "bulkhead.acceleration",
        ]
        .contains(&path)
        || path.strip_prefix("containerd/runc/").is_some_and(|p| p == namespace)
}

/// Control groups below that of the containerd namespace, in every hierarchy. The namespace's own is
/// left by runc, and removed with the node.
pub(crate) fn cgroups_of(namespace: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), 6, &mut |path| {
        let inside = path.components().any(|c| c.as_os_str() == namespace) && !path.ends_with(namespace);
        if inside && path.is_dir() {
            found.push(path.to_path_buf());
        }
    });
    found
}

fn loop_devices() -> Vec<(String, String)> {
    fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| {
            let file = fs::read_to_string(e.path().join("loop/backing_file")).ok()?;
            Some((e.file_name().to_string_lossy().into_owned(), file.trim().to_string()))
        })
        .collect()
}

/// Processes of this node, without containerd itself and without the test program's own children (its ctr).
pub(crate) fn processes(node: &Node) -> BTreeSet<ProcessInfo> {
    let own = fs::metadata("/proc/thread-self/ns/mnt").map(|m| m.ino()).unwrap_or(0);
    let dir = node.dir().display().to_string();
    // Of a cluster's nodes, which have namespaces of their own.
    let (namespaces, cgroups) = node.cluster_marks();
    let mut found = BTreeSet::new();
    let mut members: BTreeSet<u32> = BTreeSet::new();
    let mut strangers = Vec::new();
    for pid in fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
    {
        let Some((name, parent, state)) = stat(pid) else { continue };
        if Some(pid) == node.pid() || parent == std::process::id() || pid == std::process::id() {
            continue;
        }
        // The machine's init reaps orphans at its leisure; they hold nothing any more.
        if state == 'Z' && parent == 1 {
            continue;
        }
        let args: Vec<String> = fs::read(format!("/proc/{pid}/cmdline"))
            .unwrap_or_default()
            .split(|b| *b == 0)
            .filter(|a| !a.is_empty())
            .map(|a| String::from_utf8_lossy(a).into_owned())
            .collect();
        if args.first().is_some_and(|program| node.is_cluster_daemon(program)) {
            continue;
        }
        let name = args.first().map_or(name, |a| a.rsplit('/').next().unwrap_or(a).to_string());
        let args = if args.is_empty() { vec![format!("[{name}]")] } else { args };
        let info = ProcessInfo { pid, parent, name, args };
        let in_namespace = fs::metadata(format!("/proc/{pid}/ns/mnt"))
            .is_ok_and(|m| m.ino() == own || namespaces.contains(&format!("mnt:[{}]", m.ino())));
        let in_cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| {
            let inside = |name: &str| text.contains(&format!("/{name}/"));
            inside(node.mark()) || cgroups.iter().any(|name| inside(name))
        });
        if in_namespace || in_cgroup || info.args.iter().any(|a| a.contains(&dir)) {
            members.insert(pid);
            found.insert(info);
        } else {
            strangers.push((info, parent));
        }
    }
    // Descendants of members that went into namespaces of their own.
    loop {
        let before = members.len();
        strangers.retain(|(info, parent)| {
            let joins = members.contains(parent);
            if joins {
                members.insert(info.pid);
                found.insert(info.clone());
            }
            !joins
        });
        if members.len() == before {
            return found;
        }
    }
}

/// Name, parent and state from /proc/<pid>/stat.
fn stat(pid: u32) -> Option<(String, u32, char)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (left, right) = text.rsplit_once(')')?;
    let name = left.split_once('(')?.1.to_string();
    let mut fields = right.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((name, fields.next()?.parse().ok()?, state))
}

/// Kills every process of the node; for a test that failed.
pub(crate) fn kill_all(node: &Node) {
    for _ in 0..10 {
        let left = processes(node);
        if left.is_empty() {
            return;
        }
        for info in left {
            let same = |pid| processes(node).iter().any(|p| p.pid == pid);
            if let Ok(fd) = signal_process(info.pid, Signal::KILL, same) {
                wait_for_exit(&fd, Duration::from_secs(5)).ok();
            }
        }
    }
}

/// Unmounts what is mounted below `dir`, the deepest first.
pub(crate) fn unmount_below(dir: &Path) {
    let text = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let points =
        text.lines().filter_map(|l| l.split(' ').nth(4)).map(Path::new).filter(|p| p.starts_with(dir));
    let mut points: Vec<&Path> = points.collect();
    points.sort_by_key(|p| std::cmp::Reverse(p.components().count()));
    for point in points {
        unmount(point, UnmountFlags::DETACH).ok();
    }
}

/// Removes the control groups of a containerd namespace.
pub(crate) fn remove_cgroups(namespace: &str) {
    let mut dirs = cgroups_of(namespace);
    for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        dirs.push(hierarchy.path().join(namespace));
    }
    dirs.push(Path::new("/sys/fs/cgroup").join(namespace));
    dirs.sort_by_key(|d| std::cmp::Reverse(d.components().count()));
    for dir in dirs {
        fs::remove_dir(dir).ok();
    }
}
