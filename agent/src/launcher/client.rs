//! The agent's end of the launcher.
//! Knows how to ask; must not know how it is done.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
};

use async_trait::async_trait;
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{AddressFamily, SockFlag, SockType, socketpair},
    unistd::ForkResult,
};
use oci_spec::runtime::LinuxResources;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest, unix::AsyncFd},
    net::UnixStream,
    sync::OnceCell,
};

use super::{Create, Debug, Exec, LaunchError, Launched, Launcher, Reply, Request, wire, zygote};
use crate::users::Users;

/// The launcher process, seen from the agent.
pub(crate) struct Zygote {
    pid: i32,
    socket: OwnedFd,
    /// The same socket with the runtime, which starts after the fork.
    registered: OnceCell<AsyncFd<OwnedFd>>,
}

impl Zygote {
    /// Forks the launcher. Must come before any thread and any runtime.
    pub(crate) fn fork() -> io::Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        match crate::sys::fork_single_threaded()? {
            ForkResult::Child => {
                drop(ours);
                zygote::serve(theirs)
            }
            ForkResult::Parent { child } => {
                drop(theirs);
                fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
                Ok(Self { pid: child.as_raw(), socket: ours, registered: OnceCell::new() })
            }
        }
    }

    /// Pid of the launcher: its end is the end of the machine.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    async fn ask(
        &self,
        request: &Request,
        stdio: Option<[OwnedFd; 3]>,
    ) -> Result<(Reply, Option<OwnedFd>), LaunchError> {
        let frame = wire::encode(request)?;
        let (ours, theirs) = StdStream::pair()?;
        let socket = self.registered().await?;
        {
            let stdio = stdio.iter().flatten().map(AsRawFd::as_raw_fd);
            let fds: Vec<_> = [theirs.as_raw_fd()].into_iter().chain(stdio).collect();
            socket.async_io(Interest::WRITABLE, |s| wire::send_fds(s.as_fd(), &fds)).await?;
        }
        // The worker's copies must be the only ones, else a stream would never end.
        drop((theirs, stdio));
        ours.set_nonblocking(true)?;
        let mut worker = UnixStream::from_std(ours)?;
        worker.write_all(&frame).await?;
        let fds = loop {
            worker.readable().await?;
            match worker.try_io(Interest::READABLE, || wire::recv_fds(worker.as_fd())) {
                Ok(Some(fds)) => break fds,
                Ok(None) => {
                    return Err(io::Error::other("the worker ended without an answer").into());
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        };
        let mut header = [0; 4];
        worker.read_exact(&mut header).await?;
        let mut body = vec![0; wire::body_len(header)?];
        worker.read_exact(&mut body).await?;
        let reply = serde_json::from_slice(&body).map_err(io::Error::from)?;
        Ok((reply, fds.into_iter().next()))
    }

    async fn registered(&self) -> io::Result<&AsyncFd<OwnedFd>> {
        self.registered
            .get_or_try_init(|| async { crate::sys::register(self.socket.try_clone()?, Interest::WRITABLE) })
            .await
    }

    async fn launch(&self, request: Request, stdio: Option<[OwnedFd; 3]>) -> Result<Launched, LaunchError> {
        match self.ask(&request, stdio).await? {
            (Reply::Launched { pid }, terminal) => Ok(Launched { pid, terminal }),
            (reply, _) => Err(unexpected(reply)),
        }
    }

    async fn tell(&self, request: Request) -> Result<(), LaunchError> {
        match self.ask(&request, None).await? {
            (Reply::Done, _) => Ok(()),
            (reply, _) => Err(unexpected(reply)),
        }
    }
}

fn unexpected(reply: Reply) -> LaunchError {
    match reply {
        Reply::Refused { text } => LaunchError::Refused(text),
        reply => io::Error::other(format!("unexpected answer {reply:?}")).into(),
    }
}

#[async_trait]
impl Launcher for Zygote {
    async fn create(&self, create: Create, stdio: Option<[OwnedFd; 3]>) -> Result<Launched, LaunchError> {
        self.launch(Request::Create(Box::new(create)), stdio).await
    }

    async fn start(&self, id: &str) -> Result<(), LaunchError> {
        self.tell(Request::Start { id: id.to_owned() }).await
    }

    async fn exec(&self, exec: Exec, stdio: Option<[OwnedFd; 3]>) -> Result<Launched, LaunchError> {
        self.launch(Request::Exec(Box::new(exec)), stdio).await
    }

    async fn debug(&self, debug: Debug, stdio: Option<[OwnedFd; 3]>) -> Result<Launched, LaunchError> {
        self.launch(Request::Debug(Box::new(debug)), stdio).await
    }

    async fn make_pod(&self, users: Users, sysctls: Vec<(String, String)>) -> Result<(), LaunchError> {
        self.tell(Request::MakePod { users, sysctls }).await
    }

    async fn share_pids(&self) -> Result<(), LaunchError> {
        self.tell(Request::SharePids).await
    }

    async fn update(&self, id: &str, resources: LinuxResources) -> Result<(), LaunchError> {
        self.tell(Request::Update { id: id.to_owned(), resources: Box::new(resources) }).await
    }

    async fn delete(&self, id: &str) -> Result<(), LaunchError> {
        self.tell(Request::Delete { id: id.to_owned() }).await
    }
}
