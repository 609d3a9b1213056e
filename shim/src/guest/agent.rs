//! The connection to the agent of one guest.
//! Knows the agent's protocol; what a container is for is the callers' business.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use bulkhead_proto::{
    PROTOCOL_VERSION, SHARE_TAG,
    agent::{self, AgentClient},
    stream::{HELLO_HEADER_LEN, Hello, PrefaceError, Token, decode_hello, decode_hello_header},
};
use containerd_shim_protos::ttrpc::{self, asynchronous::transport::Socket, context::Context};
use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, UnixStream},
};

use crate::{
    error::{Fault, from_guest},
    guest_exec::{Program, Size},
    ids::{ContainerId, ProcessKey},
    sandbox::model::Io,
    stdio::Tokens,
};

/// Why a guest could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// A socket of the machine could not be made.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest did not dial, or hung up.
    #[error("the guest's agent did not report")]
    Dial(#[source] io::Error),
    /// What it said is no hello.
    #[error("the guest's agent said something else than hello")]
    Hello(#[from] PrefaceError),
    /// Agent and shim are of different builds.
    #[error(
        "the guest image carries agent {agent} with protocol {found}, this shim speaks {PROTOCOL_VERSION}: rebuild the image named by hypervisor.image"
    )]
    Protocol {
        /// Its version.
        agent: String,
        /// The protocol it speaks.
        found: u32,
    },
}

/// Waits for the guest at port `port` of the vsock device at `vsock`.
pub fn listen(vsock: &Path, port: u32) -> Result<UnixListener, GuestError> {
    let path = PathBuf::from(format!("{}_{port}", vsock.display()));
    UnixListener::bind(&path).map_err(|source| GuestError::Listen { path, source })
}

/// What of the host a container has beside its specification, which names it.
#[derive(Debug, Default)]
pub struct Files {
    /// Block devices.
    pub disks: Vec<agent::Disk>,
    /// Volumes of which it gets copies that follow them.
    pub followed: Vec<agent::FollowedVolume>,
    /// Sockets of the host, which the guest names by their places in this list.
    pub sockets: Vec<agent::HostSocket>,
    /// Volumes that the guest has in its own memory.
    pub memory: Vec<agent::MemoryVolume>,
}

/// The agent of one guest.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    timeout: Duration,
}

/// What happens in the guest.
pub struct GuestEvents(ttrpc::asynchronous::ClientStreamReceiver<agent::Event>);

impl GuestEvents {
    /// The next event; None when the guest is gone.
    pub async fn next(&mut self) -> Option<agent::Event> {
        self.0.recv().await.ok().flatten()
    }
}

impl Agent {
    /// Takes the first connection and its hello.
    pub async fn accept(listener: &UnixListener, timeout: Duration) -> Result<(Self, Hello), GuestError> {
        let (mut stream, _) = listener.accept().await.map_err(GuestError::Dial)?;
        let hello = read_hello(&mut stream).await?;
        if hello.protocol != PROTOCOL_VERSION {
            return Err(GuestError::Protocol { agent: hello.agent, found: hello.protocol });
        }
        let client = AgentClient::new(ttrpc::asynchronous::Client::new(Socket::new(stream)));
        Ok((Self { client, timeout }, hello))
    }

    fn context(&self) -> Context {
        ttrpc::context::with_duration(self.timeout)
    }

    /// Bounds a call by our own clock too: the guest's side of a deadline is the guest's.
    async fn call<T>(&self, call: impl Future<Output = ttrpc::Result<T>>) -> Result<T, Fault> {
        match tokio::time::timeout(self.timeout, call).await {
            Ok(result) => result.map_err(from_guest),
            Err(_) => Err(Fault::new(
                crate::error::Kind::DeadlineExceeded,
                format!("the guest did not answer within {} s", self.timeout.as_secs()),
            )),
        }
    }

    /// Subscribes to the guest's events.
    pub async fn events(&self) -> Result<GuestEvents, Fault> {
        // Without a deadline: the stream lives as long as the guest.
        let stream = self.client.events(Context::default(), &agent::EventsRequest::new()).await;
        stream.map(GuestEvents).map_err(from_guest)
    }

    /// Makes the guest a sandbox with this name, these sysctls, this network and, if it is to have one, this user
    /// namespace; and says whether [`Agent::debug_exec`] is allowed.
    pub async fn configure(
        &self,
        hostname: &str,
        sysctls: HashMap<String, String>,
        network: agent::Network,
        users: Option<agent::UserNamespace>,
        debug_exec: bool,
    ) -> Result<agent::ConfigureResponse, Fault> {
        let mut seed = vec![0; 64];
        getrandom::fill(&mut seed)
            .map_err(|e| Fault::internal("draw a seed for the guest", &io::Error::other(e)))?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let request = agent::ConfigureRequest {
            hostname: hostname.to_owned(),
            time_unix_nanos: now.as_nanos() as u64,
            seed,
            share_tag: SHARE_TAG.to_owned(),
            sysctls,
            network: Some(network).into(),
            users: users.into(),
            debug_exec,
            ..Default::default()
        };
        self.call(self.client.configure(self.context(), &request)).await
    }

    /// Makes the pod's network what it is to be.
    pub async fn set_network(&self, network: &agent::Network) -> Result<(), Fault> {
        self.call(self.client.set_network(self.context(), network)).await.map(drop)
    }

    /// Creates a container up to its command.
    pub async fn create(
        &self,
        id: &ContainerId,
        spec: Vec<u8>,
        io: &Io,
        tokens: Tokens,
        size: Option<(u32, u32)>,
        files: Files,
    ) -> Result<(), Fault> {
        let request = agent::CreateContainerRequest {
            container_id: id.to_string(),
            spec,
            disks: files.disks,
            followed: files.followed,
            sockets: files.sockets,
            memory: files.memory,
            stdio: Some(stdio(io, tokens, size)).into(),
            ..Default::default()
        };
        self.call(self.client.create_container(self.context(), &request)).await.map(drop)
    }

    /// Has a container's copy of a volume become the version named so.
    pub async fn follow_volume(&self, id: &ContainerId, volume: agent::FollowedVolume) -> Result<(), Fault> {
        let (container_id, volume) = (id.to_string(), Some(volume).into());
        let request = agent::FollowVolumeRequest { container_id, volume, ..Default::default() };
        self.call(self.client.follow_volume(self.context(), &request)).await.map(drop)
    }

    /// Lets a container's command run.
    pub async fn start(&self, id: &ContainerId) -> Result<(), Fault> {
        self.call(self.client.start_container(self.context(), &container(id))).await.map(drop)
    }

    /// Starts a further process.
    pub async fn exec(
        &self,
        key: &ProcessKey,
        process: Vec<u8>,
        io: &Io,
        tokens: Tokens,
        size: Option<(u32, u32)>,
    ) -> Result<(), Fault> {
        let request = agent::ExecRequest {
            container_id: key.container.to_string(),
            exec_id: key.exec_str().to_owned(),
            process,
            stdio: Some(stdio(io, tokens, size)).into(),
            ..Default::default()
        };
        self.call(self.client.exec(self.context(), &request)).await.map(drop)
    }

    /// Starts a program in the guest itself, with the files of the container named `root`.
    pub async fn debug_exec(&self, exec: &str, program: &Program, tokens: Tokens) -> Result<(), Fault> {
        let io = Io { terminal: program.terminal.is_some(), ..Io::default() };
        let size = program.terminal.map(|size| (size.width.into(), size.height.into()));
        let request = agent::DebugExecRequest {
            exec_id: exec.to_owned(),
            root: program.root.clone(),
            args: program.args.clone(),
            env: program.env.clone(),
            stdio: Some(stdio(&io, tokens, size)).into(),
            ..Default::default()
        };
        self.call(self.client.debug_exec(self.context(), &request)).await.map(drop)
    }

    /// Kills a program in the guest itself, with all that it has started.
    pub async fn kill_debug_exec(&self, exec: &str) -> Result<(), Fault> {
        let (exec_id, signal) = (exec.to_owned(), libc::SIGKILL as u32);
        let request = agent::SignalRequest { exec_id, signal, all: true, ..Default::default() };
        self.call(self.client.signal(self.context(), &request)).await.map(drop)
    }

    /// Sets the size of the terminal of a program in the guest itself.
    pub async fn resize_debug_exec(&self, exec: &str, size: Size) -> Result<(), Fault> {
        let (width, height) = (size.width.into(), size.height.into());
        let request =
            agent::ResizePtyRequest { exec_id: exec.to_owned(), width, height, ..Default::default() };
        self.call(self.client.resize_pty(self.context(), &request)).await.map(drop)
    }

    /// Signals a process, or all of its container.
    pub async fn signal(&self, key: &ProcessKey, signal: u32, all: bool) -> Result<(), Fault> {
        let request = agent::SignalRequest {
            container_id: key.container.to_string(),
            exec_id: key.exec_str().to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.call(self.client.signal(self.context(), &request)).await.map(drop)
    }

    /// Sets the size of a terminal, in characters.
    pub async fn resize(&self, key: &ProcessKey, width: u32, height: u32) -> Result<(), Fault> {
        let request = agent::ResizePtyRequest {
            container_id: key.container.to_string(),
            exec_id: key.exec_str().to_owned(),
            width,
            height,
            ..Default::default()
        };
        self.call(self.client.resize_pty(self.context(), &request)).await.map(drop)
    }

    /// Freezes a container.
    pub async fn pause(&self, id: &ContainerId) -> Result<(), Fault> {
        self.call(self.client.pause(self.context(), &container(id))).await.map(drop)
    }

    /// Thaws a container.
    pub async fn resume(&self, id: &ContainerId) -> Result<(), Fault> {
        self.call(self.client.resume(self.context(), &container(id))).await.map(drop)
    }

    /// Sets limits: OCI `LinuxResources`, JSON. Answers what [`Agent::restore`] takes.
    pub async fn update(
        &self,
        id: &ContainerId,
        resources: Vec<u8>,
    ) -> Result<HashMap<String, Vec<u8>>, Fault> {
        let request = agent::UpdateRequest { container_id: id.to_string(), resources, ..Default::default() };
        Ok(self.call(self.client.update(self.context(), &request)).await?.before)
    }

    /// Takes an update back.
    pub async fn restore(&self, id: &ContainerId, before: HashMap<String, Vec<u8>>) -> Result<(), Fault> {
        let request = agent::UpdateRequest { container_id: id.to_string(), before, ..Default::default() };
        self.call(self.client.update(self.context(), &request)).await.map(drop)
    }

    /// Changes what the guest uses of its machine.
    pub async fn use_machine(&self, request: agent::ResizeRequest) -> Result<agent::ResizeResponse, Fault> {
        self.call(self.client.resize(self.context(), &request)).await
    }

    /// The container's cgroup files.
    pub async fn stats(&self, id: &ContainerId) -> Result<agent::StatsResponse, Fault> {
        self.call(self.client.stats(self.context(), &container(id))).await
    }

    /// The same of all containers together.
    pub async fn pod_stats(&self) -> Result<agent::StatsResponse, Fault> {
        self.call(self.client.stats(self.context(), &agent::ContainerRequest::new())).await
    }

    /// The container's processes.
    pub async fn pids(&self, id: &ContainerId) -> Result<agent::PidsResponse, Fault> {
        self.call(self.client.pids(self.context(), &container(id))).await
    }

    /// Connects two streams, to the guest and from it, to a port of the pod's `localhost`.
    pub async fn forward(&self, port: u16, ipv6_first: bool, tokens: [Token; 2]) -> Result<(), Fault> {
        let request = agent::ForwardRequest {
            port: port.into(),
            ipv6_first,
            in_token: tokens[0].0.to_vec(),
            out_token: tokens[1].0.to_vec(),
            ..Default::default()
        };
        self.call(self.client.forward(self.context(), &request)).await.map(drop)
    }

    /// Answers a container that has connected to a socket of the host: with the streams of the connection, to the guest
    /// and from it; without, it is closed.
    pub async fn connected(
        &self,
        id: &ContainerId,
        connection: u64,
        tokens: Option<[Token; 2]>,
    ) -> Result<(), Fault> {
        let [in_token, out_token] = tokens.map(|both| both.map(|token| token.0.to_vec())).unwrap_or_default();
        let container_id = id.to_string();
        let request =
            agent::ConnectedRequest { container_id, connection, in_token, out_token, ..Default::default() };
        self.call(self.client.connected(self.context(), &request)).await.map(drop)
    }

    /// Removes a stopped container.
    pub async fn delete(&self, id: &ContainerId) -> Result<(), Fault> {
        self.call(self.client.delete_container(self.context(), &container(id))).await.map(drop)
    }

    /// Has the guest let go of disks, by their serial numbers.
    pub async fn leave_disks(&self, serials: Vec<String>) -> Result<(), Fault> {
        let request = agent::LeaveDisksRequest { serials, ..Default::default() };
        self.call(self.client.leave_disks(self.context(), &request)).await.map(drop)
    }

    /// Writes everything out before the machine ends.
    pub async fn shutdown(&self) -> Result<(), Fault> {
        self.call(self.client.shutdown(self.context(), &agent::ShutdownRequest::new())).await.map(drop)
    }
}

async fn read_hello(stream: &mut UnixStream) -> Result<Hello, GuestError> {
    let mut header = [0; HELLO_HEADER_LEN];
    stream.read_exact(&mut header).await.map_err(GuestError::Dial)?;
    let mut body = vec![0; decode_hello_header(&header)?];
    stream.read_exact(&mut body).await.map_err(GuestError::Dial)?;
    Ok(decode_hello(&body)?)
}

fn container(id: &ContainerId) -> agent::ContainerRequest {
    agent::ContainerRequest { container_id: id.to_string(), ..Default::default() }
}

fn stdio(io: &Io, tokens: Tokens, size: Option<(u32, u32)>) -> agent::Stdio {
    let bytes = |token: Option<Token>| token.map(|t| t.0.to_vec()).unwrap_or_default();
    let (width, height) = size.unwrap_or((0, 0));
    agent::Stdio {
        terminal: io.terminal,
        stdin_token: bytes(tokens.stdin),
        stdout_token: bytes(tokens.stdout),
        stderr_token: bytes(tokens.stderr),
        width,
        height,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// What the shim says to a guest whose agent speaks `protocol`.
    async fn greeted(protocol: u32) -> Result<Hello, GuestError> {
        let folder = tempfile::tempdir().unwrap();
        let vsock = folder.path().join("vsock");
        let listener = listen(&vsock, 1).unwrap();
        let hello = Hello { protocol, agent: "9.8.7".into(), kernel: "6.12".into(), uptime_nanos: 1 };
        let mut guest = UnixStream::connect(folder.path().join("vsock_1")).await.unwrap();
        guest.write_all(&bulkhead_proto::stream::encode_hello(&hello)).await.unwrap();
        Agent::accept(&listener, Duration::from_secs(10)).await.map(|(_, hello)| hello)
    }

    #[tokio::test]
    async fn an_agent_of_another_protocol_is_refused() {
        assert_eq!(greeted(PROTOCOL_VERSION).await.unwrap().agent, "9.8.7");
        for other in [PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1] {
            let error = greeted(other).await.unwrap_err().to_string();
            for words in
                ["agent 9.8.7", &format!("protocol {other}"), "rebuild the image", "hypervisor.image"]
            {
                assert!(error.contains(words), "{error}");
            }
        }
    }
}
