//! Runs a further process in a container: into its cgroup and its namespaces, and on to the last mile.
//! Knows processes and namespaces; how a container begins is libcontainer's.
//!
//! libcontainer can do this too. It reads the container's specification and state again, forks twice, and makes
//! sockets in a directory on the way, which is most of the time that an exec takes; a probe each second pays it.
//! ```text
//! worker ── pid namespace ── fork ──▶ process ── cgroup, other namespaces, session, streams, limits, user ── exec
//!    ▲                                   │
//!    └─ terminal, then end of the report ┘ or the reason of a failure
//! ```

use std::{
    convert::Infallible,
    fs,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
};

use libcontainer::{capabilities, syscall::syscall::SyscallType};
use nix::{
    fcntl::OFlag,
    pty::{grantpt, posix_openpt, unlockpt},
    sched::{CloneFlags, setns},
    sys::{
        prctl,
        stat::{Mode, umask},
        wait::waitpid,
    },
    unistd::{
        ForkResult, Gid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, setgroups, setresgid, setresuid, setsid,
    },
};
use oci_spec::runtime::User;

use super::{
    Exec, LastMile,
    last_mile::{LastMileExecutor, why},
    mapped, schedule, wire,
};
use crate::{cgroup, podns};

/// The namespaces that a process can have of its own, by their names below /proc/<pid>/ns (namespaces(7)).
const NAMESPACES: [(&str, CloneFlags); 7] = [
    ("user", CloneFlags::CLONE_NEWUSER),
    ("mnt", CloneFlags::CLONE_NEWNS),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("net", CloneFlags::CLONE_NEWNET),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
];

/// Runs the process. Answers its pid and the controlling end of its terminal.
pub(super) fn run(exec: Exec, stdio: Vec<OwnedFd>) -> Result<(i32, Option<OwnedFd>), String> {
    let io = |e: io::Error| format!("launcher: {}", why(&e));
    let ended = |e: io::Error| format!("enter the container by its process {}: {}", exec.init, why(&e));
    let init = crate::sys::pidfd(exec.init).map_err(ended)?;
    let foreign = foreign_namespaces(exec.init).map_err(ended)?;
    if let Some(users) = &exec.users {
        mapped::give_streams(&stdio, users)?;
    }
    // Nobody in the container may look into what is about to join it, before it is its program.
    prctl::set_dumpable(false).map_err(|e| io(e.into()))?;
    schedule::initial_affinity(&exec.process)?;
    if foreign.contains(CloneFlags::CLONE_NEWPID) {
        setns(&init, CloneFlags::CLONE_NEWPID).map_err(|e| ended(e.into()))?;
    }
    let rest = foreign - CloneFlags::CLONE_NEWPID;
    spawn(&exec.last_mile, stdio, |last_mile, stdio, console| {
        become_process(&exec, last_mile, &init, rest, stdio, console)
    })
}

/// Forks a process that does `become_it` and reports what went wrong until it is its program. Answers its pid and the
/// controlling end of its terminal, which it sends by the socket.
pub(super) fn spawn(
    last_mile: &LastMile,
    stdio: Vec<OwnedFd>,
    become_it: impl FnOnce(&LastMileExecutor, Vec<OwnedFd>, UnixStream) -> Result<Infallible, String>,
) -> Result<(i32, Option<OwnedFd>), String> {
    let io = |e: io::Error| format!("launcher: {}", why(&e));
    let (mut report, report_to) = io::pipe().map_err(io)?;
    let (console, console_to) = UnixStream::pair().map_err(io)?;
    match crate::sys::fork_single_threaded().map_err(io)? {
        ForkResult::Child => {
            drop((report, console));
            let last_mile = LastMileExecutor::new(last_mile.clone(), report_to.as_raw_fd());
            let Err(reason) = become_it(&last_mile, stdio, console_to);
            crate::sys::write_raw(report_to.as_raw_fd(), reason.as_bytes());
            std::process::exit(1)
        }
        ForkResult::Parent { child } => {
            drop((report_to, console_to, stdio));
            let terminal = match last_mile.terminal {
                // None where the process failed before it had one; its report says why.
                Some(_) => {
                    wire::recv_fds(console.as_fd()).map_err(io)?.and_then(|fds| fds.into_iter().next())
                }
                None => None,
            };
            let mut reason = String::new();
            // Ends when the program is executed, or the process has.
            report.read_to_string(&mut reason).map_err(io)?;
            if reason.is_empty() {
                return Ok((child.as_raw(), terminal));
            }
            let _ = waitpid(child, None);
            Err(reason)
        }
    }
}

/// The namespaces of `init` that are not those of this process.
fn foreign_namespaces(init: i32) -> io::Result<CloneFlags> {
    let mut foreign = CloneFlags::empty();
    for (name, flag) in NAMESPACES {
        let own = fs::read_link(format!("/proc/self/ns/{name}"))?;
        if own != fs::read_link(format!("/proc/{init}/ns/{name}"))? {
            foreign |= flag;
        }
    }
    Ok(foreign)
}

/// Moves this process to where init is, below the container's cgroup: one that has moved itself and shares out its
/// controllers (as systemd does) leaves a cgroup that takes no process any more.
fn enter_cgroup(init: i32) -> Result<(), String> {
    let list = PathBuf::from(format!("/proc/{init}/cgroup"));
    let text = fs::read_to_string(&list).map_err(|e| format!("read {}: {}", list.display(), why(&e)))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let path = path.ok_or_else(|| format!("{} names no cgroup: {text:?}", list.display()))?;
    let procs = Path::new(cgroup::ROOT).join(path).join("cgroup.procs");
    fs::write(&procs, "0").map_err(|e| format!("join the cgroup, {}: {}", procs.display(), why(&e)))
}

/// What the process asks for, else as init has it.
fn adjust_oom_score(exec: &Exec) -> Result<(), String> {
    let path = format!("/proc/{}/oom_score_adj", exec.init);
    let score = match exec.process.oom_score_adj() {
        Some(score) => score.to_string(),
        None => fs::read_to_string(&path).map_err(|e| format!("read {path}: {}", why(&e)))?,
    };
    fs::write("/proc/self/oom_score_adj", score.trim())
        .map_err(|e| format!("set the OOM score adjustment to {}: {}", score.trim(), why(&e)))
}

/// In the new process. In this order: what needs the guest's view, the container's namespaces, streams, limits, and
/// last the user, who may do none of this.
fn become_process(
    exec: &Exec,
    last_mile: &LastMileExecutor,
    init: &OwnedFd,
    namespaces: CloneFlags,
    stdio: Vec<OwnedFd>,
    console: UnixStream,
) -> Result<Infallible, String> {
    let doing = |what: &'static str| move |e: nix::Error| format!("{what}: {}", why(&e.into()));
    let by_library = |what: &'static str| {
        move |e: libcontainer::syscall::SyscallError| format!("{what}: {}", super::worker::chain(&e))
    };
    let syscall = SyscallType::default().create_syscall();
    let process = &exec.process;
    adjust_oom_score(exec)?;
    // Not the worker, which would be seen, stopped and killed with the container.
    enter_cgroup(exec.init)?;
    schedule::final_affinity(process)?;
    schedule::policy(process, syscall.as_ref())?;
    if exec.users.is_some() {
        mapped::raise_limits(process)?;
    }
    if !namespaces.is_empty() {
        setns(init, namespaces).map_err(doing("enter the container's namespaces"))?;
    }
    if exec.users.is_some() {
        prctl::set_keepcaps(true).map_err(doing("keep capabilities"))?;
        podns::become_root().map_err(doing("become the container's root"))?;
    }
    setsid().map_err(doing("begin a session"))?;
    take_stdio(last_mile, stdio, &console)?;
    for rlimit in process.rlimits().iter().flatten() {
        syscall.set_rlimit(rlimit).map_err(by_library("set a resource limit"))?;
    }
    if let Some(bits) = process.user().umask() {
        let mode =
            Mode::from_bits(bits).ok_or_else(|| format!("process.user.umask: {bits:#o} is no umask"))?;
        umask(mode);
    }
    become_user(process.user()).map_err(doing("become the user"))?;
    syscall.close_range(0).map_err(by_library("close what is not the process's"))?;
    if process.no_new_privileges() == Some(true) {
        prctl::set_no_new_privs().map_err(doing("give up new privileges"))?;
    }
    capabilities::reset_effective(syscall.as_ref()).map_err(by_library("raise all capabilities"))?;
    last_mile.prepare()?;
    last_mile.execute()
}

/// The permitted capabilities stay: the last mile needs some, and decides which of them the program has.
fn become_user(user: &User) -> nix::Result<()> {
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|&gid| Gid::from_raw(gid)).collect();
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setgroups(&groups)?;
    prctl::set_keepcaps(true)?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    prctl::set_keepcaps(false)
}

/// Gives this process, which leads a session, its streams or a terminal.
pub(super) fn take_stdio(
    last_mile: &LastMileExecutor,
    stdio: Vec<OwnedFd>,
    console: &UnixStream,
) -> Result<(), String> {
    match last_mile.todo.terminal {
        Some(_) => open_terminal(console),
        None => take_streams(stdio).map_err(|e| format!("take the streams: {}", why(&e.into()))),
    }
}

fn take_streams(stdio: Vec<OwnedFd>) -> nix::Result<()> {
    let mut streams = stdio.into_iter();
    let mut take = |dup: fn(OwnedFd) -> nix::Result<()>| streams.next().map_or(Ok(()), dup);
    take(dup2_stdin)?;
    take(dup2_stdout)?;
    take(dup2_stderr)
}

/// Opens a terminal of the container, makes it the session's and the streams', and hands its controlling end over.
fn open_terminal(console: &UnixStream) -> Result<(), String> {
    let doing = |what: &'static str| move |e: nix::Error| format!("{what}: {}", why(&e.into()));
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
        .map_err(doing("open /dev/ptmx of the container"))?;
    grantpt(&master).and_then(|()| unlockpt(&master)).map_err(doing("unlock the terminal"))?;
    let terminal = crate::sys::peer_of(master.as_fd())
        .map_err(|e| format!("open the other end of the terminal: {}", why(&e)))?;
    crate::sys::make_controlling(terminal.as_fd())
        .map_err(|e| format!("make the terminal that of the session: {}", why(&e)))?;
    dup2_stdin(&terminal)
        .and_then(|()| dup2_stdout(&terminal))
        .and_then(|()| dup2_stderr(&terminal))
        .map_err(doing("take the terminal"))?;
    wire::send_fds(console.as_fd(), &[master.as_raw_fd()])
        .map_err(|e| format!("hand the terminal over: {}", why(&e)))
}
