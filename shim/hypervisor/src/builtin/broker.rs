//! The talk with a running VMM: commands and their replies, and its events, which are served.
//! The VMM is jailed and opens nothing: where its guest dials, we connect in its place.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bulkhead_vmm_spec::{
    BlockBinding, BlockShape,
    wire::{Answer, Command, Ended, Event, Message, Request, Slot},
};
use tokio::{
    net::UnixStream,
    sync::{oneshot, watch},
};

use super::{channel::Channel, files};
use crate::{Ask, Counts, Drive, Drives, Meter, Processors};

/// How long a command may take; it is microseconds, but for what waits for a disk.
const COMMAND_DEADLINE: Duration = Duration::from_secs(20);

type Replies = HashMap<u64, oneshot::Sender<Result<Answer, String>>>;

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The VMM says why.
    #[error("the machine refuses: {0}")]
    Refused(String),
    /// It did not answer.
    #[error("the machine does not answer within {COMMAND_DEADLINE:?}")]
    Late,
    /// It is gone, or the socket to it fails.
    #[error("the machine cannot be told: {0}")]
    Gone(#[from] io::Error),
}

/// Speaks with one VMM.
pub(super) struct Broker {
    channel: Channel,
    vsock: PathBuf,
    next: AtomicU64,
    /// Who waits for which reply; `None` when nothing more will come.
    replies: Mutex<Option<Replies>>,
    /// Bytes that the guest has beyond the memory of its boot.
    grown: watch::Sender<u64>,
}

impl Broker {
    /// A broker for the VMM at the other end of `channel`, whose vsock device has its socket at `vsock`.
    pub(super) fn new(channel: Channel, vsock: PathBuf) -> Self {
        let replies = Mutex::new(Some(Replies::new()));
        Self { channel, vsock, next: AtomicU64::new(1), replies, grown: watch::Sender::new(0) }
    }

    /// Has a command carried out; `fds` are attached to it.
    pub(super) async fn command(
        &self,
        command: Command,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, CommandError> {
        let (reply, replied) = oneshot::channel();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        match &mut *self.replies() {
            Some(replies) => drop(replies.insert(id, reply)),
            None => return Err(gone()),
        }
        let sent = self.channel.send(&Request { id, command }, fds).await;
        let answer = match sent {
            Ok(()) => tokio::time::timeout(COMMAND_DEADLINE, replied).await,
            Err(error) => {
                self.forget(id);
                return Err(error.into());
            }
        };
        match answer {
            Ok(Ok(result)) => result.map_err(CommandError::Refused),
            Ok(Err(_)) => Err(gone()),
            Err(_) => {
                self.forget(id);
                Err(CommandError::Late)
            }
        }
    }

    fn replies(&self) -> MutexGuard<'_, Option<Replies>> {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, id: u64) {
        if let Some(replies) = &mut *self.replies() {
            replies.remove(&id);
        }
    }

    /// Hands replies on and serves events, until the VMM is gone.
    pub(super) async fn attend(&self) {
        if let Err(error) = self.serve().await {
            tracing::warn!(%error, "the control socket of a machine");
        }
        // Whoever still waits is told that nothing will come.
        *self.replies() = None;
    }

    async fn serve(&self) -> io::Result<()> {
        while let Some(message) = self.channel.receive().await? {
            match message {
                Message::Reply { id, result } => {
                    let waiting = self.replies().as_mut().and_then(|replies| replies.remove(&id));
                    match (waiting, result) {
                        (Some(waiting), result) => drop(waiting.send(result)),
                        (None, Err(error)) => tracing::warn!("the machine refused: {error}"),
                        (None, Ok(_)) => {}
                    }
                }
                Message::Event(Event::Dial { dial, port }) => self.connect(dial, port).await?,
                Message::Event(Event::Grown { growth_bytes }) => drop(self.grown.send_replace(growth_bytes)),
                // What they say arrives by the console and by the VMM's last words too, which are kept.
                Message::Event(Event::Panic { message, console }) => {
                    tracing::debug!("guest kernel: {message}; end of its console: {}", console.join(" | "));
                }
                Message::Event(Event::Ended(Ended::Guest)) => {
                    tracing::debug!("the guest has ended its machine")
                }
                Message::Event(Event::Ended(Ended::Failure(text))) => {
                    tracing::debug!("the machine failed: {text}");
                }
            }
        }
        Ok(())
    }

    /// Connects to a port of the host. Where nobody listens, the answer has no stream: the guest is refused.
    async fn connect(&self, dial: u64, port: u32) -> io::Result<()> {
        let stream = dial_port(&self.vsock, port).await.and_then(UnixStream::into_std).ok();
        let slot = stream.as_ref().map(|_| Slot(0));
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let request = Request { id, command: Command::Dialed { dial, stream: slot } };
        let fds: Vec<_> = stream.iter().map(AsFd::as_fd).collect();
        self.channel.send(&request, &fds).await
    }
}

#[async_trait]
impl Meter for Broker {
    async fn read(&self) -> Result<Counts, Box<dyn std::error::Error + Send + Sync>> {
        match self.command(Command::Metrics, &[]).await? {
            Answer::Metrics(counts) => Ok(counts),
            other => Err(format!("the machine answers {other:?} when asked for its counters").into()),
        }
    }
}

#[async_trait]
impl Processors for Broker {
    async fn allow(&self, count: u32) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.command(Command::Processors { count }, &[]).await.map(drop)?)
    }
}

#[async_trait]
impl Ask for Broker {
    async fn ask(
        &self,
        bytes: u64,
        patience: Duration,
    ) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
        let mut grown = self.grown.subscribe();
        self.command(Command::Resize { growth_bytes: Some(bytes), balloon_bytes: None }, &[]).await?;
        // Its end is noticed elsewhere; that the guest takes its time is not.
        let _ = tokio::time::timeout(patience, grown.wait_for(|&has| has == bytes)).await;
        Ok(*self.grown.borrow())
    }
}

#[async_trait]
impl Drives for Broker {
    async fn attach(
        &self,
        binding: &BlockBinding,
        shape: &BlockShape,
    ) -> Result<Drive, Box<dyn std::error::Error + Send + Sync>> {
        let file = files::disk(&binding.path, shape.read_only)?;
        let attach = Command::Attach { file: Slot(0), block: shape.clone() };
        match self.command(attach, &[file.as_fd()]).await? {
            Answer::Attached { slot, .. } => Ok(Drive { slot, serial: shape.serial.clone() }),
            other => Err(format!("the machine answers {other:?} when given a disk").into()),
        }
    }

    async fn detach(&self, slot: u32) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.command(Command::Detach { slot }, &[]).await.map(drop)?)
    }
}

/// The host's side of a port is the socket `<path>_<port>`.
async fn dial_port(vsock: &Path, port: u32) -> io::Result<UnixStream> {
    let mut path = vsock.as_os_str().to_owned();
    path.push(format!("_{port}"));
    UnixStream::connect(path).await
}

fn gone() -> CommandError {
    CommandError::Gone(io::ErrorKind::BrokenPipe.into())
}
