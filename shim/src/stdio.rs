//! Copies a process's streams between containerd's fifos and the guest.
//! Knows bytes, fifos and tokens; does not know what a process is doing.
//!
//! ```text
//!  fifo ──stdin──▶ unix socket ⇢ vsock ⇢ guest        ends when the fifo has no writer left, or CloseIO
//!  fifo ◀─stdout── unix socket ⇠ vsock ⇠ guest        ends when the guest's total has been read, or EOF
//! ```
//!
//! The guest dials and proves which stream it brings by a token of the [`Hub`]. A process is told closed
//! once all its output streams have been copied to their end.

mod connection;

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bulkhead_proto::stream::{STREAM_PREFACE_LEN, TOKEN_LEN, Token, decode_stream};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixListener, UnixStream, unix::pipe},
    sync::{mpsc, oneshot, watch},
};
use tracing::{debug, warn};

use crate::{
    ids::{ContainerId, ProcessKey},
    logger::{Logger, LoggerContext, LoggerError},
    metrics::counters::Counters,
    sandbox::model::{Input, Io},
    tasks,
};

/// One read or write at most, in bytes: what a pipe holds.
const CHUNK: usize = 64 << 10;
/// How long a connection may take to say which stream it is.
const PREFACE: Duration = Duration::from_secs(10);

/// Why a process's streams could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A fifo or file of the host.
    #[error("open {what} {path}")]
    Open {
        /// Which stream.
        what: &'static str,
        /// As containerd names it.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A URI that nobody can serve.
    #[error("{what} {uri}: the scheme {scheme:?} is not supported; use a path, file:// or binary://")]
    Scheme {
        /// Which stream.
        what: &'static str,
        /// As containerd names it.
        uri: String,
        /// What comes before "://".
        scheme: String,
    },
    /// The logging program of a binary:// URI.
    #[error(transparent)]
    Logger(#[from] LoggerError),
    /// A test wants it so.
    #[cfg(feature = "failpoints")]
    #[error(transparent)]
    Failpoint(#[from] crate::failpoint::Failed),
    /// No random token could be drawn.
    #[error("no random numbers: {0}")]
    Random(String),
}

pub(crate) type Sink = Box<dyn AsyncWrite + Send + Unpin>;
pub(crate) type Source = Box<dyn AsyncRead + Send + Unpin>;

enum End {
    /// To the guest. Of a fifo the writer keeps it open until CloseIO.
    In(Source),
    /// From the guest to the sink.
    Out(Sink, watch::Receiver<Option<u64>>),
    /// Whoever waits for it does with it what is to be done.
    Whole(oneshot::Sender<connection::Brought>),
}

struct Expected {
    /// The process whose stream it is; a connection has none, nor has a program in the guest itself.
    key: Option<ProcessKey>,
    end: End,
    outputs: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Table {
    expected: HashMap<Token, Expected>,
    totals: HashMap<Token, watch::Sender<Option<u64>>>,
    stdins: HashMap<ProcessKey, pipe::Sender>,
    loggers: Vec<(ProcessKey, Logger)>,
}

/// The streams that the guest may bring.
#[derive(Clone)]
pub struct Hub {
    table: Arc<Mutex<Table>>,
    inputs: mpsc::UnboundedSender<Input>,
    counters: Arc<Counters>,
}

/// The tokens of one process's streams; None where there is none.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tokens {
    /// Standard input.
    pub stdin: Option<Token>,
    /// Standard output, or the terminal's.
    pub stdout: Option<Token>,
    /// Standard error.
    pub stderr: Option<Token>,
}

impl Tokens {
    /// Those that there are.
    pub fn all(&self) -> Vec<Token> {
        [self.stdin, self.stdout, self.stderr].into_iter().flatten().collect()
    }
}

impl Hub {
    /// A hub that tells `inputs` when a process's output has ended.
    pub fn new(inputs: mpsc::UnboundedSender<Input>, counters: Arc<Counters>) -> Self {
        Self { table: Arc::default(), inputs, counters }
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Opens the host's ends of a process's streams and expects the guest's; waits for its logging program, if it
    /// has one.
    pub async fn open(
        &self,
        key: &ProcessKey,
        io: &Io,
        logger: &LoggerContext,
    ) -> Result<Tokens, StdioError> {
        let mut tokens = Tokens::default();
        let (stdout, stderr, logger) = open_outputs(io, logger).await?;
        fail_point!(StreamsHalf);
        let stdin = if io.stdin.is_empty() { None } else { Some(open_stdin(&io.stdin)?) };
        let outputs =
            Arc::new(AtomicUsize::new(usize::from(stdout.is_some()) + usize::from(stderr.is_some())));
        let mut table = self.table();
        table.loggers.extend(logger.map(|logger| (key.clone(), logger)));
        if let Some((receiver, keeper)) = stdin {
            let token = draw()?;
            table.stdins.insert(key.clone(), keeper);
            let expected = Expected {
                key: Some(key.clone()),
                end: End::In(Box::new(receiver)),
                outputs: outputs.clone(),
            };
            table.expected.insert(token, expected);
            tokens.stdin = Some(token);
        }
        for (sink, place) in [(stdout, &mut tokens.stdout), (stderr, &mut tokens.stderr)] {
            let Some(sink) = sink else { continue };
            let token = draw()?;
            let (sender, receiver) = watch::channel(None);
            table.totals.insert(token, sender);
            let end = End::Out(sink, receiver);
            let expected = Expected { key: Some(key.clone()), end, outputs: outputs.clone() };
            table.expected.insert(token, expected);
            *place = Some(token);
        }
        Ok(tokens)
    }

    /// The guest says that an output stream has that many bytes in all.
    pub fn ended(&self, token: &Token, total: u64) {
        if let Some(sender) = self.table().totals.get(token) {
            sender.send_replace(Some(total));
        }
    }

    /// No more input will come for this process, once its fifo is empty.
    pub fn close_stdin(&self, key: &ProcessKey) {
        self.table().stdins.remove(key);
    }

    /// Forgets the streams of a process that the guest has not brought: it will not be created.
    pub fn forget(&self, key: &ProcessKey) {
        let mut table = self.table();
        table.stdins.remove(key);
        table.expected.retain(|_, expected| expected.key.as_ref() != Some(key));
    }

    /// The pid of a process's logging program, if it has one.
    pub fn logger_pid(&self, key: &ProcessKey) -> Option<i32> {
        let table = self.table();
        table.loggers.iter().find(|(of, _)| of == key).and_then(|(_, logger)| logger.pid())
    }

    /// Waits for the end of the logging programs of a container whose streams have ended.
    pub async fn end_loggers(&self, container: &ContainerId) {
        let (ours, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.table().loggers)
            .into_iter()
            .partition(|(key, _)| key.container == *container);
        self.table().loggers.extend(others);
        futures::future::join_all(ours.into_iter().map(|(_, logger)| logger.end())).await;
    }

    /// Expects the guest's ends of a connection; answers the tokens of what goes to it and what comes from it.
    pub fn open_connection(&self, peer: TcpStream) -> Result<[Token; 2], StdioError> {
        let tokens = [draw()?, draw()?];
        let (reader, writer) = peer.into_split();
        let (sender, receiver) = watch::channel(None);
        let mut table = self.table();
        table.totals.insert(tokens[1], sender);
        let ends = [End::In(Box::new(reader)), End::Out(Box::new(writer), receiver)];
        for (token, end) in tokens.into_iter().zip(ends) {
            table.expected.insert(token, Expected { key: None, end, outputs: Arc::default() });
        }
        Ok(tokens)
    }

    /// Expects the guest's ends of streams whose ends on the host are open: input, output, errors.
    pub(crate) fn open_streams(
        &self,
        stdin: Option<Source>,
        outputs: [Option<Sink>; 2],
    ) -> Result<Tokens, StdioError> {
        let mut tokens = Tokens::default();
        let mut table = self.table();
        let expected = |end| Expected { key: None, end, outputs: Arc::default() };
        if let Some(source) = stdin {
            let token = draw()?;
            table.expected.insert(token, expected(End::In(source)));
            tokens.stdin = Some(token);
        }
        for (sink, place) in outputs.into_iter().zip([&mut tokens.stdout, &mut tokens.stderr]) {
            let Some(sink) = sink else { continue };
            let token = draw()?;
            let (sender, receiver) = watch::channel(None);
            table.totals.insert(token, sender);
            table.expected.insert(token, expected(End::Out(sink, receiver)));
            *place = Some(token);
        }
        Ok(tokens)
    }

    /// Closes a connection that the guest has not brought.
    pub fn withdraw(&self, tokens: &[Token]) {
        let mut table = self.table();
        for token in tokens {
            table.expected.remove(token);
            table.totals.remove(token);
        }
    }

    /// Accepts streams until the task is dropped.
    pub async fn serve(self, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    tasks::spawn(self.clone().accept(stream));
                }
                Err(error) => {
                    warn!(%error, "stream of the guest cannot be accepted");
                    return;
                }
            }
        }
    }

    async fn accept(self, mut stream: UnixStream) {
        let mut preface = [0; STREAM_PREFACE_LEN];
        let read = tokio::time::timeout(PREFACE, stream.read_exact(&mut preface)).await;
        if !matches!(read, Ok(Ok(_))) {
            debug!("a connection of the guest said nothing");
            return;
        }
        let token = match decode_stream(&preface) {
            Ok(token) => token,
            Err(error) => return warn!(%error, "a connection of the guest is no stream of ours"),
        };
        let Some(expected) = self.table().expected.remove(&token) else {
            return warn!("a connection of the guest brought an unknown token");
        };
        let open = self.counters.stream();
        match expected.end {
            End::Whole(to) => drop(to.send((stream, open))),
            End::In(source) => copy_in(source, stream).await,
            End::Out(sink, total) => {
                copy_out(stream, sink, total).await;
                self.table().totals.remove(&token);
                let last = expected.outputs.fetch_sub(1, Ordering::AcqRel) == 1;
                if let Some(key) = expected.key.filter(|_| last) {
                    let _ = self.inputs.send(Input::StreamsClosed(key));
                }
            }
        }
    }
}

async fn copy_in(mut source: Source, mut stream: UnixStream) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match source.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(n) => {
                if stream.write_all(&buffer[..n]).await.is_err() {
                    break;
                }
            }
        }
    }
    let _ = stream.shutdown().await;
}

/// Copies until `total` bytes have been read, if the guest has told the total, or the stream ends. A sink
/// that takes no more does not stop the reading: the container must not block on a lost reader.
async fn copy_out<R: AsyncRead + Unpin>(
    mut stream: R,
    mut sink: Sink,
    mut total: watch::Receiver<Option<u64>>,
) {
    let mut buffer = vec![0; CHUNK];
    let mut copied = 0u64;
    let mut sink_lives = true;
    let mut may_change = true;
    while total.borrow_and_update().is_none_or(|total| copied < total) {
        tokio::select! {
            read = stream.read(&mut buffer) => match read {
                Ok(0) | Err(_) => break,
                Ok(n) => {
                    copied += n as u64;
                    sink_lives = sink_lives && sink.write_all(&buffer[..n]).await.is_ok();
                }
            },
            changed = total.changed(), if may_change => may_change = changed.is_ok(),
        }
    }
    let _ = sink.shutdown().await;
}

fn draw() -> Result<Token, StdioError> {
    let mut bytes = [0; TOKEN_LEN];
    getrandom::fill(&mut bytes).map_err(|e| StdioError::Random(e.to_string()))?;
    Ok(Token(bytes))
}

/// The reader of a stdin fifo, and a writer that keeps it from ending while containerd is away.
fn open_stdin(path: &str) -> Result<(pipe::Receiver, pipe::Sender), StdioError> {
    let fault = |source| StdioError::Open { what: "stdin", path: path.to_owned(), source };
    let receiver = pipe::OpenOptions::new().open_receiver(path).map_err(fault)?;
    let keeper = pipe::OpenOptions::new().open_sender(path).map_err(fault)?;
    Ok((receiver, keeper))
}

type Outputs = (Option<Sink>, Option<Sink>, Option<Logger>);

async fn open_outputs(io: &Io, context: &LoggerContext) -> Result<Outputs, StdioError> {
    if io.stdout.starts_with("binary://") {
        let (logger, [stdout, stderr]) = Logger::start(&io.stdout, context).await?;
        let stderr = (!io.terminal).then(|| Box::new(stderr) as Sink);
        return Ok((Some(Box::new(stdout)), stderr, Some(logger)));
    }
    let stdout = open_output("stdout", &io.stdout)?;
    let stderr = if io.terminal { None } else { open_output("stderr", &io.stderr)? };
    Ok((stdout, stderr, None))
}

fn open_output(what: &'static str, target: &str) -> Result<Option<Sink>, StdioError> {
    if target.is_empty() {
        return Ok(None);
    }
    let fault = |source| StdioError::Open { what, path: target.to_owned(), source };
    let path = match target.split_once("://") {
        None => {
            // Opened for reading too, so that a reader that goes away for a while (containerd restarts) does
            // not break the pipe.
            let fifo = pipe::OpenOptions::new().read_write(true).open_sender(target).map_err(fault)?;
            return Ok(Some(Box::new(fifo)));
        }
        Some(("file", rest)) => Path::new(rest.split('?').next().unwrap_or_default()),
        Some((scheme, _)) => {
            return Err(StdioError::Scheme { what, uri: target.to_owned(), scheme: scheme.to_owned() });
        }
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(fault)?;
    }
    let file = File::options().append(true).create(true).mode(0o644).open(path).map_err(fault)?;
    Ok(Some(Box::new(tokio::fs::File::from_std(file))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn output_ends_with_the_total_even_if_the_stream_does_not() {
        let (mut guest, host) = tokio::io::duplex(64);
        let (sink, mut seen) = tokio::io::duplex(1024);
        let (total, told) = watch::channel(None);
        let copy = tokio::spawn(copy_out(host, Box::new(sink), told));
        guest.write_all(b"hello").await.unwrap();
        total.send_replace(Some(9));
        guest.write_all(b" you").await.unwrap();
        copy.await.unwrap();
        let mut text = String::new();
        seen.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello you");
        drop(guest);
    }

    #[tokio::test]
    async fn a_lost_reader_does_not_stop_the_copy() {
        let (mut guest, host) = tokio::io::duplex(64);
        let (sink, seen) = tokio::io::duplex(16);
        drop(seen);
        let (_total, told) = watch::channel(None);
        let copy = tokio::spawn(copy_out(host, Box::new(sink), told));
        for _ in 0..100 {
            guest.write_all(&[7; 64]).await.unwrap();
        }
        drop(guest);
        copy.await.unwrap();
    }

    #[test]
    fn a_scheme_that_nobody_serves_is_named() {
        let error = open_output("stdout", "npipe://x").err().unwrap().to_string();
        assert!(error.contains("npipe") && error.contains("binary://"), "{error}");
    }
}
