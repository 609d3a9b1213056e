//! A helper program under supervision: it dies with us, its end is an event, its last words are kept.
//! Knows nothing of virtual machines.
//!
//! `PR_SET_PDEATHSIG` is bound to the thread that makes the child, not to the process: spawn from a
//! thread that lives as long as the process does (see the crate's documentation).

mod lines;

use std::{
    ffi::OsString,
    fmt, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::wait::{Id, WaitPidFlag, WaitStatus, waitid},
};
use tokio::{io::unix::AsyncFd, net::unix::pipe};

pub use self::lines::LineSink;
use self::lines::Lines;
use crate::sys;

/// How long a killed process may take to end. One that is stuck in the kernel longer than this is
/// left to its parent's parent and named in the log.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// It is gone, but its status was taken by somebody else.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Code(code) => write!(f, "exited with status {code}"),
            Self::Signal(number) => match nix::sys::signal::Signal::try_from(number) {
                Ok(signal) => write!(f, "was ended by {}", signal.as_str()),
                Err(_) => write!(f, "was ended by signal {number}"),
            },
            Self::Unknown => f.write_str("ended in an unknown way"),
        }
    }
}

/// The network namespace of a program.
#[derive(Debug, Default)]
pub enum Network {
    /// That of the thread which starts it.
    #[default]
    Inherited,
    /// One of its own, where there is nothing.
    Own,
    /// This one.
    Of(OwnedFd),
}

/// What to run and how.
pub struct ChildSpec {
    /// What the program is for us; names it in logs and errors.
    pub name: String,
    /// The program: an absolute path, or a name to look up in `PATH`.
    pub program: PathBuf,
    /// What it is told to be called (`argv[0]`), if that is not its path.
    pub argv0: Option<OsString>,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Variables of its environment besides `PATH`; nothing is inherited.
    pub env: Vec<(OsString, OsString)>,
    /// Descriptors that it inherits under the numbers they have here.
    pub fds: Vec<OwnedFd>,
    /// Takes each line of standard output, besides the log.
    pub stdout: LineSink,
    /// Where it runs.
    pub network: Network,
    /// Is the first process of a pid namespace of its own.
    pub own_pids: bool,
}

impl ChildSpec {
    /// A program with nothing but its arguments.
    pub fn new(name: &str, program: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            argv0: None,
            args: Vec::new(),
            env: Vec::new(),
            fds: Vec::new(),
            stdout: Box::new(|_| ()),
            network: Network::Inherited,
            own_pids: false,
        }
    }
}

/// A running program, or one that ended. Dropping it kills and reaps it.
#[derive(Debug)]
pub struct Child {
    name: String,
    program: PathBuf,
    pid: i32,
    start_time_ticks: u64,
    pidfd: AsyncFd<OwnedFd>,
    exit: Option<Exit>,
    stdout: Lines,
    stderr: Lines,
}

impl Child {
    /// Starts a program: session of its own, standard input empty, output kept as lines.
    /// Must be called in a tokio runtime. An error means that the program was not executed.
    pub fn spawn(spec: ChildSpec) -> io::Result<Self> {
        let ChildSpec { name, program, argv0, args, env, fds, stdout, network, own_pids } = spec;
        let (out, out_writer) = pipe()?;
        let (err, err_writer) = pipe()?;
        let mut command = Command::new(&program);
        if let Some(argv0) = argv0 {
            command.arg0(argv0);
        }
        // At the root: a daemon must not hold the directory (a bundle, on its own mount) it began in.
        command.args(args).current_dir("/").env_clear().envs(env);
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        command.stdin(Stdio::null()).stdout(out_writer).stderr(err_writer);
        sys::prepare(&mut command, fds.iter().map(AsRawFd::as_raw_fd).collect(), &network, own_pids);
        let mut process = if own_pids { sys::in_new_pids(|| command.spawn())? } else { command.spawn()? };
        drop((command, fds, network));
        let pid = process.id() as i32;
        let (pidfd, start_time_ticks) = match watch(pid) {
            // std's handle is dropped without a wait: what reaps is the pidfd.
            Ok(watched) => watched,
            Err(error) => {
                let _ = process.kill().and_then(|()| process.wait());
                return Err(error);
            }
        };
        tracing::debug!(program = %program.display(), pid, "{name} started");
        Ok(Self {
            stdout: Lines::read(out, log_lines(&name, "stdout", stdout)),
            stderr: Lines::read(err, log_lines(&name, "stderr", Box::new(|_| ()))),
            name,
            program,
            pid,
            start_time_ticks,
            pidfd,
            exit: None,
        })
    }

    /// What the program is for us.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The program.
    pub fn program(&self) -> &std::path::Path {
        &self.program
    }

    /// Its pid; still its own until it is reaped.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// When it was made, in clock ticks since boot: with the pid it names the process for good.
    pub fn start_time_ticks(&self) -> u64 {
        self.start_time_ticks
    }

    /// How it ended, if it did and was reaped.
    pub fn exit(&self) -> Option<Exit> {
        self.exit
    }

    /// Waits for its end and reaps it; answers at once from then on. May be cancelled.
    pub async fn exited(&mut self) -> Exit {
        loop {
            if let Some(exit) = self.try_reap() {
                return exit;
            }
            match self.pidfd.readable().await {
                // A pidfd stays readable; clearing it only matters if it was woken too early.
                Ok(mut guard) => guard.clear_ready(),
                // Only at the end of the runtime, with which this future ends too.
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// Ends it with SIGKILL and reaps it. Answers how it ended, and `None` if it did not end in time.
    pub async fn kill(&mut self) -> Option<Exit> {
        self.signal(libc::SIGKILL);
        let exit = tokio::time::timeout(KILL_DEADLINE, self.exited()).await.ok();
        if exit.is_none() {
            tracing::error!(pid = self.pid, "{} does not end after SIGKILL", self.name);
        }
        exit
    }

    /// Sends a signal, if it is not reaped yet.
    pub fn signal(&self, signal: i32) {
        if self.exit.is_none()
            && let Err(error) = sys::pidfd_send_signal(self.pidfd.get_ref().as_fd(), signal)
            && error.raw_os_error() != Some(libc::ESRCH)
        {
            tracing::warn!(pid = self.pid, signal, %error, "cannot signal {}", self.name);
        }
    }

    /// Its last lines on standard error so far.
    pub fn last_errors(&self) -> Vec<String> {
        self.stderr.last()
    }

    /// Its last lines on standard output so far.
    pub fn last_output(&self) -> Vec<String> {
        self.stdout.last()
    }

    /// Waits (not for long) until all that a dead program wrote has been read. May be cancelled.
    pub async fn read_rest(&mut self) {
        self.stdout.finish().await;
        self.stderr.finish().await;
    }

    fn try_reap(&mut self) -> Option<Exit> {
        if self.exit.is_none() {
            self.exit = match waitid(
                Id::PIDFd(self.pidfd.get_ref().as_fd()),
                WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
            ) {
                Ok(WaitStatus::Exited(_, code)) => Some(Exit::Code(code)),
                Ok(WaitStatus::Signaled(_, signal, _)) => Some(Exit::Signal(signal as i32)),
                Ok(_) | Err(nix::errno::Errno::EINTR) => None,
                Err(_) => Some(Exit::Unknown),
            };
            if let Some(exit) = self.exit {
                tracing::debug!(pid = self.pid, "{} {exit}", self.name);
            }
        }
        self.exit
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.try_reap().is_some() {
            return;
        }
        self.signal(libc::SIGKILL);
        // A killed process ends within microseconds unless it is stuck in the kernel.
        let timeout = PollTimeout::try_from(KILL_DEADLINE).unwrap_or(PollTimeout::MAX);
        let _ = poll(&mut [PollFd::new(self.pidfd.get_ref().as_fd(), PollFlags::POLLIN)], timeout);
        if self.try_reap().is_none() {
            tracing::error!(pid = self.pid, "{} does not end after SIGKILL", self.name);
        }
    }
}

/// What names and watches a child that is not reaped yet: its pid cannot be another's.
fn watch(pid: i32) -> io::Result<(AsyncFd<OwnedFd>, u64)> {
    let pidfd = sys::readable(sys::pidfd_open(pid)?)?;
    Ok((pidfd, start_time_ticks(pid)?))
}

/// A pipe to read from here and to write to from a child.
fn pipe() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // Sets O_NONBLOCK on the reading end only: the two ends of a pipe are two open files.
    Ok((pipe::Receiver::from_owned_fd(reader)?, writer))
}

fn log_lines(name: &str, stream: &'static str, mut then: LineSink) -> LineSink {
    let name = name.to_owned();
    Box::new(move |line| {
        tracing::debug!(target: "bulkhead::child", program = name, stream, "{line}");
        then(line);
    })
}

/// When a process was made, in clock ticks since boot (proc(5), field 22 of stat).
pub fn start_time_ticks(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat: {stat:?}")))
}

fn parse_start_time(stat: &str) -> Option<u64> {
    // The second field is the command in parentheses, which may hold spaces and parentheses itself.
    stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests;
