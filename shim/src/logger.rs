//! A logging program of a `binary://` URI, as containerd's logging protocol wants it (containerd,
//! `docs/logging.md`): stdout on descriptor 3, stderr on 4, and 5 to be closed by the program when it is ready.
//! Knows the program from its start to its end; does not know what is logged.
//!
//! ```text
//! started ──closes 5──▶ ready ──its pipes end──▶ ended by itself
//!    │                                  └─(too late) SIGTERM ─(too late) SIGKILL ─▶ ended
//!    └─(too late) SIGKILL: the container is not made
//! ```
//!
//! It is waited for, since clients reckon with it: a client may lock with it what it wants to read, or ask
//! containerd for the task, which must not be gone before.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    pin::Pin,
    process::Stdio,
    task::{Context, Poll},
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use nix::{
    fcntl::{FcntlArg, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::AsyncWrite,
    net::unix::pipe,
    process::{Child, Command},
    task::JoinHandle,
};
use tracing::warn;

/// How long a program may take to be ready.
const READY: Duration = Duration::from_secs(10);
/// How long one whose pipes have ended may take to end by itself: it should at once.
const BY_ITSELF: Duration = Duration::from_secs(2);
/// How long one may take after SIGTERM. containerd's own shim waits as long.
const AFTER_TERM: Duration = Duration::from_secs(12);

/// Why there is no logging program.
#[derive(Debug, thiserror::Error)]
pub enum LoggerError {
    /// It cannot be started.
    #[error("start logging program {}", program.display())]
    Start {
        /// Which.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was started and nothing was heard of it.
    #[error("logging program {} did not say within {} s that it is ready: it closes descriptor 5", program.display(), READY.as_secs())]
    NotReady {
        /// Which.
        program: PathBuf,
    },
}

/// What a logging program is told of its container.
#[derive(Clone, Debug)]
pub struct LoggerContext {
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub container: String,
}

/// A program that runs.
pub(crate) struct Logger {
    program: PathBuf,
    child: Child,
}

/// The ends of its pipes for stdout and stderr.
pub(crate) type Pipes = [LogPipe; 2];

/// A pipe to the program, shut down when the program has read all of it: nerdctl's drops what it has not read when
/// it hears of the container's end.
///
/// No event tells that a pipe is empty, but that there is room in it. So it has one page, in which there is room
/// only when nothing is.
pub(crate) struct LogPipe {
    sender: pipe::Sender,
    emptied: Option<JoinHandle<io::Result<()>>>,
}

/// One page, the least that a pipe can have (pipe(7)).
const PIPE_SIZE: i32 = 4096;

impl LogPipe {
    fn new(end: io::PipeWriter) -> io::Result<Self> {
        let end = OwnedFd::from(end);
        fcntl(&end, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE))?;
        Ok(Self { sender: pipe::Sender::from_owned_fd(end)?, emptied: None })
    }
}

/// Blocks until the pipe has been read, its last reader has gone, or it is too late.
fn wait_until_empty(end: &OwnedFd) -> io::Result<()> {
    let late = PollTimeout::try_from(AFTER_TERM).unwrap_or(PollTimeout::MAX);
    poll(&mut [PollFd::new(end.as_fd(), PollFlags::POLLOUT)], late)?;
    Ok(())
}

impl AsyncWrite for LogPipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.sender).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.sender).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.emptied.is_none() {
            let end = self.sender.as_fd().try_clone_to_owned()?;
            self.emptied = Some(tokio::task::spawn_blocking(move || wait_until_empty(&end)));
        }
        let emptied = self.emptied.as_mut().expect("set above");
        Pin::new(emptied).poll(cx).map(|done| done.unwrap_or_else(|e| Err(io::Error::other(e))))
    }
}

impl Logger {
    /// Starts the program that `uri` names and waits until it is ready.
    pub(crate) async fn start(uri: &str, context: &LoggerContext) -> Result<(Self, Pipes), LoggerError> {
        let rest = uri.strip_prefix("binary://").unwrap_or(uri);
        let (program, query) = rest.split_once('?').unwrap_or((rest, ""));
        let program = PathBuf::from(program);
        let fault = |source| LoggerError::Start { program: program.clone(), source };
        let (child, pipes, ready) = spawn(&program, query, context).map_err(fault)?;
        let mut logger = Self { program, child };
        // Whatever it is: a byte, the end, or nothing to be read any more.
        if tokio::time::timeout(READY, ready.readable()).await.is_err() {
            let _ = logger.child.kill().await;
            return Err(LoggerError::NotReady { program: logger.program });
        }
        Ok((logger, pipes))
    }

    /// Its pid, until it was seen to have ended.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.child.id().map(|pid| pid as i32)
    }

    /// Waits for its end, after that of its pipes, and sees to it.
    pub(crate) async fn end(mut self) {
        if tokio::time::timeout(BY_ITSELF, self.child.wait()).await.is_ok() {
            return;
        }
        // Its own until it is waited for: nobody else can have its pid.
        if let Some(pid) = self.child.id() {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
        }
        if tokio::time::timeout(AFTER_TERM, self.child.wait()).await.is_err() {
            warn!(program = %self.program.display(), "the logging program does not end and is killed");
            let _ = self.child.kill().await;
        }
    }
}

fn spawn(program: &Path, query: &str, context: &LoggerContext) -> io::Result<(Child, Pipes, pipe::Receiver)> {
    let (out_read, out_write) = io::pipe()?;
    let (err_read, err_write) = io::pipe()?;
    let (ready_read, ready_write) = io::pipe()?;
    let mut command = std::process::Command::new(program);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        command.arg(unquote(key)).arg(unquote(value));
    }
    command
        .env("CONTAINER_ID", &context.container)
        .env("CONTAINER_NAMESPACE", &context.namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let fds: [OwnedFd; 3] = [out_read.into(), err_read.into(), ready_write.into()];
    let mappings = fds.into_iter().zip(3..).map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
    command.fd_mappings(mappings.collect()).map_err(io::Error::other)?;
    let mut command = Command::from(command);
    let child = command.spawn()?;
    // The command still holds the child's ends.
    drop(command);
    let pipes = [LogPipe::new(out_write)?, LogPipe::new(err_write)?];
    Ok((child, pipes, pipe::Receiver::from_owned_fd(ready_read.into())?))
}

/// Undoes the percent encoding of a query.
fn unquote(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let plain = match byte {
            b'+' => b' ',
            b'%' => {
                let digits: Vec<u8> = bytes.by_ref().take(2).collect();
                std::str::from_utf8(&digits).ok().and_then(|d| u8::from_str_radix(d, 16).ok()).unwrap_or(b'%')
            }
            other => other,
        };
        out.push(plain);
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tokio::io::AsyncWriteExt;

    use super::*;

    #[test]
    fn queries_are_unquoted() {
        assert_eq!(unquote("a%20b+c%"), "a b c%");
    }

    /// A program that runs `script`, and its URI with `$1` set to the directory.
    fn uri(dir: &Path, script: &str) -> String {
        let program = dir.join("logger");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        format!("binary://{}?{}", program.display(), dir.display())
    }

    fn context() -> LoggerContext {
        LoggerContext { namespace: "n".into(), container: "c".into() }
    }

    #[tokio::test]
    async fn it_is_ready_before_anything_is_logged() {
        let tmp = tempfile::tempdir().unwrap();
        let uri = uri(
            tmp.path(),
            "echo $CONTAINER_NAMESPACE $CONTAINER_ID >$1/who; exec 5>&-; exec cat <&3 >$1/out",
        );
        let (logger, [mut out, err]) = Logger::start(&uri, &context()).await.unwrap();
        assert_eq!(std::fs::read_to_string(tmp.path().join("who")).unwrap(), "n c\n");
        out.write_all(b"hello").await.unwrap();
        drop((out, err));
        logger.end().await;
        assert_eq!(std::fs::read_to_string(tmp.path().join("out")).unwrap(), "hello");
    }

    #[tokio::test]
    async fn it_has_read_all_before_its_pipe_is_shut_down() {
        let tmp = tempfile::tempdir().unwrap();
        // It begins to read when it is told to.
        nix::unistd::mkfifo(&tmp.path().join("go"), nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        let script = "exec 5>&-; read go <$1/go; exec cat <&3 >$1/out";
        let (logger, [mut out, err]) = Logger::start(&uri(tmp.path(), script), &context()).await.unwrap();
        out.write_all(&[b'x'; 4000]).await.unwrap();
        let early = tokio::time::timeout(Duration::from_millis(50), out.shutdown()).await;
        assert!(early.is_err(), "nobody has read it");
        std::fs::write(tmp.path().join("go"), "\n").unwrap();
        out.shutdown().await.unwrap();
        drop((out, err));
        logger.end().await;
        assert_eq!(std::fs::metadata(tmp.path().join("out")).unwrap().len(), 4000);
    }

    #[tokio::test]
    async fn one_that_waits_for_something_else_is_told_to_end() {
        let tmp = tempfile::tempdir().unwrap();
        let script = "trap 'echo told >$1/told; exit' TERM; exec 5>&-; sleep 1000 & wait; kill $!";
        let (logger, pipes) = Logger::start(&uri(tmp.path(), script), &context()).await.unwrap();
        drop(pipes);
        logger.end().await;
        assert_eq!(std::fs::read_to_string(tmp.path().join("told")).unwrap(), "told\n");
    }

    #[tokio::test]
    async fn one_that_is_not_there_is_named() {
        let why = Logger::start("binary:///no/such/logger", &context()).await.err().unwrap();
        assert!(why.to_string().contains("/no/such/logger"), "{why}");
    }
}
