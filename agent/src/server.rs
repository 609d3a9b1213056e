//! The conversation with the host: one connection, on which the agent serves.
//! Knows ttrpc and the messages; what they do is the sandbox's affair.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::{Context as _, bail};
use async_trait::async_trait;
use bulkhead_proto::{
    CONTROL_PORT, PROTOCOL_VERSION,
    agent::{
        Agent, ConfigureRequest, ConfigureResponse, ConnectedRequest, ContainerRequest,
        CreateContainerRequest, CreateContainerResponse, DebugExecRequest, Empty, Event, EventsRequest,
        ExecRequest, ExecResponse, FollowVolumeRequest, ForwardRequest, LeaveDisksRequest, Network,
        PidsResponse, ResizePtyRequest, ResizeRequest, ResizeResponse, ShutdownRequest, SignalRequest,
        StatsResponse, UpdateRequest, UpdateResponse, create_agent,
    },
    stream::{Hello, encode_hello},
};
use nix::time::{ClockId, clock_gettime};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    signal::unix::{SignalKind, signal},
    sync::Notify,
};
use ttrpc::{
    Result,
    asynchronous::{Server, ServerStreamSender, TtrpcContext, transport::Listener},
};

use crate::{
    configure, disks,
    error::{Doing, Error},
    events::{self, Queue},
    host::HostStream,
    launcher::Zygote,
    sandbox::Sandbox,
};

/// Dials the host and serves until the connection breaks, or the launcher does.
pub(crate) async fn run(zygote: Zygote) -> anyhow::Result<()> {
    let launcher = zygote.pid();
    let (events, queue) = events::queue();
    let sandbox = Sandbox::new(Box::new(zygote), events);
    // Before the first container, so that no end is missed.
    let mut children = signal(SignalKind::child()).context("watch for ended children")?;

    let mut host = HostStream::dial(CONTROL_PORT)
        .await
        .with_context(|| format!("dial the host at vsock port {CONTROL_PORT}"))?;
    host.write_all(&encode_hello(&hello())).await.context("say hello to the host")?;
    // While the host does what it has to do after the hello.
    crate::devices::find_the_rest();

    let hung_up = Arc::new(Notify::new());
    let connection = Connection { stream: host, hung_up: Arc::clone(&hung_up) };
    let one = futures::stream::once(async { io::Result::Ok(connection) });
    let service = Service { sandbox: Arc::clone(&sandbox), queue };
    let mut server =
        Server::new().add_listener(Listener::new(one)).register_service(create_agent(Arc::new(service)));
    server.start().await.context("serve the host")?;
    loop {
        tokio::select! {
            _ = children.recv() => {
                if sandbox.reap(launcher) {
                    bail!("the launcher has ended: no container can be managed any more");
                }
            }
            () = hung_up.notified() => {
                tracing::warn!("the host has hung up");
                return Ok(());
            }
        }
    }
}

fn hello() -> Hello {
    let uptime = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    Hello {
        protocol: PROTOCOL_VERSION,
        agent: env!("CARGO_PKG_VERSION").into(),
        kernel: configure::kernel_release(),
        uptime_nanos: uptime.as_nanos() as u64,
    }
}

/// The connection to the host, which tells when the host has hung up: ttrpc does not.
struct Connection {
    stream: HostStream,
    hung_up: Arc<Notify>,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buffer);
        match &result {
            Poll::Ready(Ok(())) if buffer.filled().len() == before => self.hung_up.notify_one(),
            Poll::Ready(Err(_)) => self.hung_up.notify_one(),
            _ => {}
        }
        result
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.hung_up.notify_one();
    }
}

struct Service {
    sandbox: Arc<Sandbox>,
    queue: Queue,
}

#[async_trait]
impl Agent for Service {
    async fn configure(&self, _: &TtrpcContext, request: ConfigureRequest) -> Result<ConfigureResponse> {
        Ok(self.sandbox.configure(&request).await?)
    }

    async fn set_network(&self, _: &TtrpcContext, request: Network) -> Result<Empty> {
        self.sandbox.set_network(&request)?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Result<CreateContainerResponse> {
        let pid = self.sandbox.create(&request).await?;
        Ok(CreateContainerResponse { pid, ..Default::default() })
    }

    async fn follow_volume(&self, _: &TtrpcContext, request: FollowVolumeRequest) -> Result<Empty> {
        self.sandbox.follow_volume(&request).await?;
        Ok(Empty::new())
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.sandbox.start(&request.container_id).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> Result<ExecResponse> {
        let pid = self.sandbox.exec(&request).await?;
        Ok(ExecResponse { pid, ..Default::default() })
    }

    async fn debug_exec(&self, _: &TtrpcContext, request: DebugExecRequest) -> Result<ExecResponse> {
        let pid = self.sandbox.debug_exec(&request).await?;
        Ok(ExecResponse { pid, ..Default::default() })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> Result<Empty> {
        self.sandbox.signal(&request)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        self.sandbox.resize(&request)?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.sandbox.pause(&request.container_id).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.sandbox.resume(&request.container_id).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> Result<UpdateResponse> {
        let before = self.sandbox.update(&request).await?;
        Ok(UpdateResponse { before, ..Default::default() })
    }

    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> Result<ResizeResponse> {
        Ok(self.sandbox.use_machine(&request).await?)
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<StatsResponse> {
        let files = self.sandbox.stats(&request.container_id)?;
        Ok(StatsResponse { files, ..Default::default() })
    }

    async fn pids(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<PidsResponse> {
        let processes = self.sandbox.processes(&request.container_id)?;
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> Result<Empty> {
        self.sandbox.forward(&request).await?;
        Ok(Empty::new())
    }

    async fn connected(&self, _: &TtrpcContext, request: ConnectedRequest) -> Result<Empty> {
        self.sandbox.connected(&request).await?;
        Ok(Empty::new())
    }

    async fn delete_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.sandbox.delete(&request.container_id).await?;
        Ok(Empty::new())
    }

    async fn leave_disks(&self, _: &TtrpcContext, request: LeaveDisksRequest) -> Result<Empty> {
        let left = tokio::task::spawn_blocking(move || disks::leave(&request.serials)).await;
        left.unwrap_or_else(|e| Err(std::io::Error::other(e))).doing(|| "let go of disks".into())?;
        Ok(Empty::new())
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: EventsRequest,
        host: ServerStreamSender<Event>,
    ) -> Result<()> {
        let Some(mut queue) = self.queue.take() else {
            return Err(Error::State("the events are being read already".into()).into());
        };
        while let Some(event) = queue.recv().await {
            host.send(&event).await?;
        }
        Ok(())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
        self.sandbox.shutdown().await?;
        Ok(Empty::new())
    }
}
