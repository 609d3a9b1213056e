//! containerd's sandbox service: its messages to requests, replies to its messages.
//! Holds no logic: every call is one question to the sandbox.
//!
//! A shim serves one sandbox, so the id in a request says nothing new.

use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::{
    protobuf::{Message, MessageField, well_known_types::any::Any},
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
        StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
        WaitSandboxResponse,
    },
    sandbox_async::Sandbox,
    ttrpc::{self, r#async::TtrpcContext},
    types::platform::Platform,
};

use crate::{
    sandbox::{driver::Handle, model::*},
    stats,
    task::{METRICS_TYPE, unexpected},
};

/// The only words that containerd's CRI knows (contract, C5).
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The sandbox service of one shim.
pub struct SandboxService {
    sandbox: Handle,
    created: SystemTime,
}

impl SandboxService {
    /// Serves `sandbox`, which was created now.
    pub fn new(sandbox: Handle) -> Self {
        Self { sandbox, created: SystemTime::now() }
    }

    async fn ask(&self, request: PodRequest) -> ttrpc::Result<Reply> {
        Ok(self.sandbox.ask(Request::Pod(request)).await?)
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        req: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        // Other clients than CRI send other options, or none; they make a pod without wishes.
        let is_pod = |any: &Any| any.type_url.ends_with("PodSandboxConfig");
        let config = req.options.into_option().filter(is_pod).map(|any| any.value);
        let create = CreatePod { config: config.unwrap_or_default().into(), netns: req.netns_path.into() };
        self.ask(PodRequest::Create(Box::new(create))).await?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        _: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        match self.ask(PodRequest::Start).await? {
            Reply::Pid(pid) => Ok(StartSandboxResponse {
                pid: pid.unsigned_abs(),
                created_at: MessageField::some(self.created.into()),
                spec: MessageField::some(no_container()),
                ..Default::default()
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        let platform =
            Platform { os: "linux".into(), architecture: architecture().into(), ..Default::default() };
        Ok(PlatformResponse { platform: MessageField::some(platform), ..Default::default() })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        _: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        self.ask(PodRequest::Stop { at: SystemTime::now() }).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        _: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        match self.ask(PodRequest::Wait).await? {
            Reply::Exit(exit) => Ok(WaitSandboxResponse {
                exit_status: exit.status,
                exited_at: MessageField::some(exit.at.into()),
                ..Default::default()
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        req: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        match self.ask(PodRequest::Status).await? {
            Reply::PodStatus { ready, pid, exit } => Ok(SandboxStatusResponse {
                sandbox_id: req.sandbox_id,
                pid: pid.unsigned_abs(),
                state: if ready { READY } else { NOT_READY }.into(),
                created_at: MessageField::some(self.created.into()),
                exited_at: exit.map(|e| e.at.into()).into(),
                ..Default::default()
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, _: PingRequest) -> ttrpc::Result<PingResponse> {
        self.ask(PodRequest::Status).await?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        self.ask(PodRequest::Shutdown).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        req: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        match self.ask(PodRequest::Stats).await? {
            Reply::Stats(files) => {
                let value = stats::metrics(&files).write_to_bytes().unwrap_or_default();
                let data = Any { type_url: METRICS_TYPE.into(), value, ..Default::default() };
                let mut response = SandboxMetricsResponse::new();
                // The crate keeps the type of this message to itself.
                let metrics = response.metrics.mut_or_insert_default();
                metrics.timestamp = MessageField::some(SystemTime::now().into());
                metrics.id = req.sandbox_id;
                metrics.data = MessageField::some(data);
                Ok(response)
            }
            other => Err(unexpected(&other)),
        }
    }
}

/// The OCI spec of the sandbox, which is no container. containerd's NRI wants one all the same, and complains in
/// the log of one that is missing.
fn no_container() -> Any {
    Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(),
        value: br#"{"ociVersion":"1.2.0"}"#.to_vec(),
        ..Default::default()
    }
}

/// As Go names it, which is what containerd compares with.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
