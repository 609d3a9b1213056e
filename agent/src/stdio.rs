//! The streams of a process: one vsock connection each, pumped between the host and a pipe or a terminal.
//! Knows bytes and descriptors; must not know whose they are.
//!
//! ```text
//! stdin            host ──▶ pipe or terminal      the host's end closes the pipe; a terminal stays open
//! stdout, stderr   pipe or terminal ──▶ host      its end is told by StreamEnd; the host closes first
//! ```

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bulkhead_proto::{
    STREAM_PORT,
    agent::Stdio,
    stream::{Token, encode_stream},
};
use futures::future::try_join3;
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::pipe2,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, Interest, ReadBuf, unix::AsyncFd},
    net::unix::pipe,
    task::AbortHandle,
};

use crate::{
    error::{Doing, Error, Result},
    events::Events,
    host::HostStream,
};

/// Bytes that are moved at once; a pipe holds as many.
pub(crate) const BUFFER: usize = 64 << 10;

/// Connections to the host for the streams of one process.
pub(crate) struct Streams {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
}

/// One connection, and the token that has opened it.
pub(crate) struct Stream {
    pub(crate) token: Token,
    pub(crate) socket: HostStream,
}

/// The pumps of a process that is being launched; they begin when it has been.
pub(crate) struct Pumps {
    streams: Streams,
    stdin: Option<pipe::Sender>,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
}

/// A terminal's controlling end, shared by its pumps and by those that change its size.
pub(crate) type Terminal = Arc<AsyncFd<OwnedFd>>;

/// Connects every stream that `stdio` names.
pub(crate) async fn dial(stdio: &Stdio) -> Result<Streams> {
    let stderr = if stdio.terminal { &[] } else { stdio.stderr_token.as_slice() };
    let (stdin, stdout, stderr) =
        try_join3(connect(&stdio.stdin_token), connect(&stdio.stdout_token), connect(stderr)).await?;
    Ok(Streams { stdin, stdout, stderr })
}

async fn connect(token: &[u8]) -> Result<Option<Stream>> {
    if token.is_empty() {
        return Ok(None);
    }
    let token = Token::try_from(token).map_err(|e| Error::Invalid(e.to_string()))?;
    let dialled = async {
        let mut socket = HostStream::dial(STREAM_PORT).await?;
        socket.write_all(&encode_stream(&token)).await?;
        io::Result::Ok(socket)
    };
    let socket = dialled.await.doing(|| "dial the host for a stream".into())?;
    Ok(Some(Stream { token, socket }))
}

impl Streams {
    /// The three descriptors of the process, /dev/null where there is no stream, and the pumps behind them.
    pub(crate) fn pipes(self) -> Result<([OwnedFd; 3], Pumps)> {
        let make = || -> io::Result<([OwnedFd; 3], Pumps)> {
            let (stdin_fd, stdin) = match &self.stdin {
                Some(_) => {
                    let (from, to) = pipe2(OFlag::O_CLOEXEC)?;
                    (from, Some(pipe::Sender::from_owned_fd(to)?))
                }
                None => (null(false)?, None),
            };
            let (stdout_fd, stdout) = output(self.stdout.is_some())?;
            let (stderr_fd, stderr) = output(self.stderr.is_some())?;
            let pumps =
                Pumps { streams: Streams { stdin: None, stdout: None, stderr: None }, stdin, stdout, stderr };
            Ok(([stdin_fd, stdout_fd, stderr_fd], pumps))
        };
        let (fds, mut pumps) = make().doing(|| "make the pipes of the process".into())?;
        pumps.streams = self;
        Ok((fds, pumps))
    }

    /// Starts pumping between the host and a terminal. The answer ends the pump of stdin, which would else
    /// wait for the host even when nobody is left to type to.
    pub(crate) fn pump_terminal(
        self,
        master: OwnedFd,
        events: &Events,
    ) -> io::Result<(Terminal, AbortHandle)> {
        let flags = OFlag::from_bits_retain(fcntl(&master, FcntlArg::F_GETFL)?);
        fcntl(&master, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let terminal = Arc::new(crate::sys::register(master, Interest::READABLE | Interest::WRITABLE)?);
        let reader = TerminalReader(Arc::clone(&terminal));
        tokio::spawn(pump_out(reader, self.stdout, events.clone()));
        let stdin = tokio::spawn(pump_into_terminal(self.stdin, Arc::clone(&terminal)));
        Ok((terminal, stdin.abort_handle()))
    }
}

impl Streams {
    /// That from the host and that to it, if there are both.
    pub(crate) fn both(self) -> Option<(Stream, Stream)> {
        self.stdin.zip(self.stdout)
    }

    /// Starts pumping between the host and a connection: stdin goes to it, and what it says is stdout.
    pub(crate) fn pump_connection(self, peer: std::net::TcpStream, events: &Events) -> io::Result<()> {
        peer.set_nonblocking(true)?;
        let (reader, writer) = tokio::net::TcpStream::from_std(peer)?.into_split();
        tokio::spawn(pump_out(reader, self.stdout, events.clone()));
        tokio::spawn(pump_into_connection(self.stdin, writer));
        Ok(())
    }
}

impl Pumps {
    /// Starts pumping. Each pump ends by itself, when the last user of its pipe is gone.
    pub(crate) fn start(self, events: &Events) {
        for (reader, stream) in [(self.stdout, self.streams.stdout), (self.stderr, self.streams.stderr)] {
            if let Some(reader) = reader {
                tokio::spawn(pump_out(reader, stream, events.clone()));
            }
        }
        tokio::spawn(pump_into_pipe(self.streams.stdin, self.stdin));
    }
}

fn output(wanted: bool) -> io::Result<(OwnedFd, Option<pipe::Receiver>)> {
    if !wanted {
        return Ok((null(true)?, None));
    }
    let (from, to) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((to, Some(pipe::Receiver::from_owned_fd(from)?)))
}

fn null(write: bool) -> io::Result<OwnedFd> {
    Ok(File::options().read(!write).write(write).open("/dev/null")?.into())
}

/// Moves all that `from` gives to the host, tells the host how much that was, and leaves the closing to it.
///
/// Where nobody listens (any more) the bytes are dropped: a process must not block for want of a reader.
async fn pump_out(mut from: impl AsyncRead + Unpin, stream: Option<Stream>, events: Events) {
    let (token, mut socket) = match stream {
        Some(Stream { token, socket }) => (Some(token), Some(socket)),
        None => (None, None),
    };
    let mut total = 0;
    let mut buffer = Vec::with_capacity(BUFFER);
    loop {
        buffer.clear();
        match from.read_buf(&mut buffer).await {
            Ok(0) => break,
            Ok(_) => {}
            Err(e) => {
                tracing::warn!("read the output of a process: {e}");
                break;
            }
        }
        if let Some(open) = &mut socket {
            match open.write_all(&buffer).await {
                Ok(()) => total += buffer.len() as u64,
                Err(e) => {
                    tracing::debug!("the host has closed an output stream: {e}");
                    socket = None;
                }
            }
        }
    }
    drop(buffer);
    if let Some(token) = token {
        events.stream_end(&token, total);
    }
    if let Some(mut socket) = socket {
        // Nothing comes on this stream but its end.
        let _ = socket.read(&mut [0]).await;
    }
}

async fn pump_into_pipe(stream: Option<Stream>, to: Option<pipe::Sender>) {
    let (Some(Stream { mut socket, .. }), Some(mut to)) = (stream, to) else { return };
    let mut buffer = Vec::with_capacity(BUFFER);
    loop {
        buffer.clear();
        let read = tokio::select! {
            read = socket.read_buf(&mut buffer) => read,
            // The last reader has closed its end: whatever the host sends has nowhere to go.
            _ = to.ready(Interest::ERROR) => break,
        };
        if !matches!(read, Ok(n) if n > 0) || to.write_all(&buffer).await.is_err() {
            break;
        }
    }
}

async fn pump_into_connection(stream: Option<Stream>, mut to: tokio::net::tcp::OwnedWriteHalf) {
    let Some(Stream { mut socket, .. }) = stream else { return };
    let mut buffer = Vec::with_capacity(BUFFER);
    while matches!(socket.read_buf(&mut buffer).await, Ok(n) if n > 0) && to.write_all(&buffer).await.is_ok()
    {
        buffer.clear();
    }
    // The writing half is shut down when it is dropped: the peer sees the end, and may go on speaking.
}

async fn pump_into_terminal(stream: Option<Stream>, to: Terminal) {
    let Some(Stream { mut socket, .. }) = stream else { return };
    let mut buffer = Vec::with_capacity(BUFFER);
    loop {
        buffer.clear();
        if !matches!(socket.read_buf(&mut buffer).await, Ok(n) if n > 0) {
            break;
        }
        let mut rest = buffer.as_slice();
        while !rest.is_empty() {
            let written =
                to.async_io(Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd.as_fd(), rest)?)).await;
            match written {
                Ok(n) => rest = &rest[n..],
                Err(_) => return,
            }
        }
    }
}

/// Reads a terminal's controlling end. The kernel says EIO when nobody has the other end open.
struct TerminalReader(Terminal);

impl AsyncRead for TerminalReader {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let unfilled = buffer.initialize_unfilled();
            match guard.try_io(|fd| Ok(nix::unistd::read(fd.as_fd(), unfilled)?)) {
                Ok(Ok(n)) => {
                    buffer.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(e)) if e.raw_os_error() == Some(libc::EIO) => return Poll::Ready(Ok(())),
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(e)) => return Poll::Ready(Err(e)),
                Err(_would_block) => {}
            }
        }
    }
}
