//! A child process with a deadline: started, fed, read and, when it is late, killed by the pid we hold.
//! Knows nothing of containerd.

use std::ffi::OsStr;
use std::fmt;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::pace::stretched;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It called exit.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        use std::os::unix::process::ExitStatusExt;
        match status.code() {
            Some(code) => Self::Code(code),
            None => Self::Signal(status.signal().unwrap_or(0)),
        }
    }
}

/// What a finished process said.
#[derive(Clone)]
pub struct Output {
    /// The command line, for messages.
    pub what: String,
    /// How it ended.
    pub exit: Exit,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
    /// From start to end.
    pub took: Duration,
    /// Somebody else still holds its standard output or error open: a daemon that inherited them.
    pub pipes_held: bool,
}

impl Output {
    /// Standard output as text, without the last line's end.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_string()
    }

    /// Standard error as text, without the last line's end.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim_end().to_string()
    }

    /// Fails unless the process ended with `code`.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        if self.exit != Exit::Code(code) {
            bail!("expected exit status {code}\n{self}");
        }
        Ok(self)
    }

    /// Fails unless the process ended with 0.
    pub fn ok(self) -> Result<Self> {
        self.expect_code(0)
    }

    /// Fails if the process ended with 0; for the cases where the user must see an error.
    pub fn expect_failure(self) -> Result<Self> {
        if self.exit == Exit::Code(0) {
            bail!("expected a failure\n{self}");
        }
        Ok(self)
    }

    /// Fails unless standard error holds every one of `needles`.
    pub fn expect_stderr(self, needles: &[&str]) -> Result<Self> {
        let err = self.err();
        for needle in needles {
            if !err.contains(needle) {
                bail!("the error message lacks {needle:?}\n{self}");
            }
        }
        Ok(self)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  command: {}", self.what)?;
        writeln!(f, "  ended:   {:?} after {:.2} s", self.exit, self.took.as_secs_f64())?;
        // The error first: whoever shows only the beginning of a report shows that.
        writeln!(f, "  stderr:  {}", shorten(&self.err(), 3000))?;
        write!(f, "  stdout:  {}", shorten(&self.out(), 600))
    }
}

/// The beginning and the end of a text, `most` characters of it in all.
fn shorten(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_string();
    }
    let head: String = text.chars().take(most / 3).collect();
    let mut tail: Vec<char> = text.chars().rev().take(most - most / 3).collect();
    tail.reverse();
    format!("{head}… ({} bytes in all) …{}", text.len(), tail.into_iter().collect::<String>())
}

/// What a process reads.
enum Input {
    Null,
    Bytes(Vec<u8>),
    /// Held open until [`Proc::close_stdin`] or the end.
    Open,
    Fd(OwnedFd),
}

/// A process to start.
pub struct Run {
    command: Command,
    what: String,
    input: Input,
    terminal: Option<(OwnedFd, OwnedFd)>,
    deadline: Duration,
}

impl Run {
    /// The longest a command may take where a test says nothing else.
    pub const DEADLINE: Duration = Duration::from_secs(180);

    /// Prepares `program`.
    pub fn new(program: impl AsRef<Path>) -> Self {
        let program = program.as_ref();
        Self {
            command: Command::new(program),
            what: program.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
            input: Input::Null,
            terminal: None,
            deadline: Self::DEADLINE,
        }
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.what.push(' ');
        self.what.push_str(&arg.as_ref().to_string_lossy());
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Self {
        args.into_iter().fold(self, |run, arg| run.arg(arg))
    }

    /// Sets a variable of the environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Empties the environment.
    pub fn env_clear(mut self) -> Self {
        self.command.env_clear();
        self
    }

    /// Sets the working directory.
    pub fn cwd(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Gives these bytes as standard input, then end of file.
    pub fn stdin_bytes(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Input::Bytes(bytes.into());
        self
    }

    /// Holds standard input open.
    pub fn stdin_open(mut self) -> Self {
        self.input = Input::Open;
        self
    }

    /// Gives this descriptor as standard input.
    pub fn stdin_fd(mut self, fd: OwnedFd) -> Self {
        self.input = Input::Fd(fd);
        self
    }

    /// Runs the process on a terminal (its standard input and output).
    pub(crate) fn on_terminal(mut self, stdin: OwnedFd, stdout: OwnedFd) -> Self {
        self.terminal = Some((stdin, stdout));
        self
    }

    /// Sets the deadline of [`Proc::wait`].
    pub fn deadline(mut self, seconds: u64) -> Self {
        self.deadline = Duration::from_secs(seconds);
        self
    }

    /// Starts it.
    pub fn spawn(mut self) -> Result<Proc> {
        let mut bytes = None;
        let mut hold = false;
        self.command.stdin(match self.input {
            Input::Null => Stdio::null(),
            Input::Fd(fd) => Stdio::from(fd),
            Input::Open => {
                hold = true;
                Stdio::piped()
            }
            Input::Bytes(given) => {
                bytes = Some(given);
                Stdio::piped()
            }
        });
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some((stdin, stdout)) = self.terminal {
            self.command.stdin(Stdio::from(stdin)).stdout(Stdio::from(stdout));
        }
        let started = Instant::now();
        let mut child = self.command.spawn().with_context(|| format!("start {}", self.what))?;
        let pidfd = open_pidfd(child.id()).with_context(|| format!("hold {}", self.what))?;
        let mut stdin = child.stdin.take();
        let mut feeder = None;
        if let (Some(bytes), Some(mut pipe)) = (bytes, stdin.take_if(|_| !hold)) {
            // A process that ends without reading makes this fail, which is its good right.
            feeder = Some(std::thread::spawn(move || drop(pipe.write_all(&bytes))));
        }
        let stdout = Collector::start(child.stdout.take());
        let stderr = Collector::start(child.stderr.take());
        drop(self.command);
        Ok(Proc {
            child,
            pidfd,
            what: self.what,
            stdin,
            feeder,
            stdout,
            stderr,
            started,
            deadline: stretched(self.deadline),
        })
    }

    /// Starts it and waits for its end.
    pub fn output(self) -> Result<Output> {
        self.spawn()?.wait()
    }
}

/// What a pipe has brought so far.
#[derive(Default)]
struct Seen {
    bytes: Vec<u8>,
    ended: bool,
}

/// Reads a pipe to its end in a thread.
struct Collector {
    seen: Arc<(Mutex<Seen>, Condvar)>,
    ended: Option<Receiver<()>>,
}

/// How long after a process's end its pipes may stay open before they count as held by somebody else.
const PIPE_GRACE: Duration = Duration::from_secs(5);

impl Collector {
    fn start(pipe: Option<impl Read + Send + 'static>) -> Self {
        let seen = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
        let sink = Arc::clone(&seen);
        let ended = pipe.map(|mut pipe| {
            let (end, ended) = channel();
            std::thread::spawn(move || {
                let _end: Sender<()> = end;
                let mut buffer = [0; 65536];
                while let Ok(n) = pipe.read(&mut buffer) {
                    if n == 0 {
                        break;
                    }
                    sink.0.lock().unwrap_or_else(|e| e.into_inner()).bytes.extend_from_slice(&buffer[..n]);
                    sink.1.notify_all();
                }
                sink.0.lock().unwrap_or_else(|e| e.into_inner()).ended = true;
                sink.1.notify_all();
            });
            ended
        });
        Self { seen, ended }
    }

    /// All bytes, and whether the pipe's end never came.
    fn finish(&mut self) -> (Vec<u8>, bool) {
        // The reading thread sends nothing: it hangs up.
        let held = self
            .ended
            .take()
            .is_some_and(|e| e.recv_timeout(stretched(PIPE_GRACE)) == Err(RecvTimeoutError::Timeout));
        (self.seen.0.lock().unwrap_or_else(|e| e.into_inner()).bytes.clone(), held)
    }
}

/// A running process. Dropped before its end, it is killed.
pub struct Proc {
    child: Child,
    pidfd: OwnedFd,
    what: String,
    stdin: Option<ChildStdin>,
    feeder: Option<JoinHandle<()>>,
    stdout: Collector,
    stderr: Collector,
    started: Instant,
    deadline: Duration,
}

impl Proc {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Becomes readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Writes to the standard input that [`Run::stdin_open`] holds.
    pub fn write_stdin(&mut self, bytes: &[u8]) -> Result<()> {
        let pipe = self.stdin.as_mut().context("standard input is not held open")?;
        pipe.write_all(bytes).with_context(|| format!("write to {}", self.what))
    }

    /// Ends the standard input that [`Run::stdin_open`] holds.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// What it has written to standard output so far.
    pub fn stdout_so_far(&self) -> Vec<u8> {
        self.stdout.seen.0.lock().unwrap_or_else(|e| e.into_inner()).bytes.clone()
    }

    /// Waits until `text` is in its standard output; `false` when it ends or `timeout` passes before.
    pub fn saw(&self, text: &str, timeout: Duration) -> bool {
        self.saw_until(Instant::now() + stretched(timeout), |said| said.contains(text))
    }

    fn saw_until(&self, until: Instant, enough: impl Fn(&str) -> bool) -> bool {
        let mut seen = self.stdout.seen.0.lock().unwrap_or_else(|e| e.into_inner());
        while !enough(&String::from_utf8_lossy(&seen.bytes)) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || seen.ended {
                return false;
            }
            seen = self.stdout.seen.1.wait_timeout(seen, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        true
    }

    /// As [`Proc::saw`] with the command's own deadline; not seeing it is an error that shows what was said.
    pub fn wait_for_text(&self, text: &str) -> Result<()> {
        self.wait_until(&format!("{text:?}"), |said| said.contains(text))
    }

    /// Waits until its standard output is `enough`, which is called `what` in the error.
    pub fn wait_until(&self, what: &str, enough: impl Fn(&str) -> bool) -> Result<()> {
        if !self.saw_until(self.started + self.deadline, enough) {
            let out = String::from_utf8_lossy(&self.stdout_so_far()).into_owned();
            let err = self.stderr.seen.0.lock().unwrap_or_else(|e| e.into_inner());
            let err = String::from_utf8_lossy(&err.bytes).into_owned();
            bail!("{}: {what} was not said; stdout: {out:?}, stderr: {err:?}", self.what);
        }
        Ok(())
    }

    /// Waits until `fd` is readable; the end of the process before that, or its deadline, is an error.
    pub fn wait_for_readable(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let left = (self.started + self.deadline).saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(&fd, PollFlags::IN), PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut fds, Some(&timespec(left))).context("poll")?;
        if fds[0].revents().is_empty() {
            let out = String::from_utf8_lossy(&self.stdout_so_far()).into_owned();
            let err = self.stderr.seen.0.lock().unwrap_or_else(|e| e.into_inner());
            let err = String::from_utf8_lossy(&err.bytes).into_owned();
            bail!("{}: nothing came; stdout: {out:?}, stderr: {err:?}", self.what);
        }
        Ok(())
    }

    /// Sends `signal` to the process.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        pidfd_send_signal(&self.pidfd, signal).with_context(|| format!("signal {}", self.what))
    }

    /// Waits for the end, at most until the deadline that was given with the command; then kills it and fails.
    pub fn wait(mut self) -> Result<Output> {
        let left = (self.started + self.deadline).saturating_duration_since(Instant::now());
        if !readable(self.pidfd.as_fd(), left)? {
            pidfd_send_signal(&self.pidfd, Signal::KILL).ok();
            let output = self.reap()?;
            bail!("no end within {} s\n{output}", self.deadline.as_secs());
        }
        self.reap()
    }

    fn reap(&mut self) -> Result<Output> {
        self.stdin = None;
        let exit = self.child.wait().with_context(|| format!("wait for {}", self.what))?.into();
        let took = self.started.elapsed();
        let ((stdout, out_held), (stderr, err_held)) = (self.stdout.finish(), self.stderr.finish());
        if let Some(feeder) = self.feeder.take() {
            drop(feeder.join());
        }
        Ok(Output { what: self.what.clone(), exit, stdout, stderr, took, pipes_held: out_held || err_held })
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            pidfd_send_signal(&self.pidfd, Signal::KILL).ok();
            drop(self.child.wait());
        }
    }
}

/// Opens a descriptor of the process `pid`.
pub(crate) fn open_pidfd(pid: u32) -> Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("not a process id")?;
    pidfd_open(pid, PidfdFlags::empty()).with_context(|| format!("open pid {}", pid.as_raw_nonzero()))
}

/// Whether `fd` becomes readable within `timeout`.
pub(crate) fn readable(fd: BorrowedFd<'_>, timeout: Duration) -> Result<bool> {
    let until = Instant::now() + timeout;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        match poll(&mut fds, Some(&timespec(left))) {
            Ok(n) => return Ok(n > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).context("poll"),
        }
    }
}

pub(crate) fn timespec(d: Duration) -> Timespec {
    Timespec { tv_sec: d.as_secs() as i64, tv_nsec: i64::from(d.subsec_nanos()) }
}

/// Sends `signal` to a process that is not our child; a descriptor is taken first, and `still` is asked
/// whether it is yet the process that was meant, so that a reused pid is never hit.
pub fn signal_process(pid: u32, signal: Signal, still: impl Fn(u32) -> bool) -> Result<OwnedFd> {
    let fd = open_pidfd(pid)?;
    if !still(pid) {
        bail!("process {pid} is no longer the one that was meant");
    }
    pidfd_send_signal(&fd, signal).with_context(|| format!("signal {pid}"))?;
    Ok(fd)
}

/// Waits until the process behind `pidfd` has ended.
pub fn wait_for_exit(pidfd: &OwnedFd, timeout: Duration) -> Result<()> {
    let timeout = stretched(timeout);
    if !readable(pidfd.as_fd(), timeout)? {
        bail!("the process has not ended within {timeout:?}");
    }
    Ok(())
}
