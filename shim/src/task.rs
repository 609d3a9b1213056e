//! containerd's task service: its messages to requests, replies to its messages, events to its topics.
//! Holds no logic: every call is one question to the sandbox.

use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, Mount,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status as TaskStatus, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    events::task as events,
    protobuf::{
        EnumOrUnknown, Message, MessageDyn, MessageField,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim_async::Task,
    ttrpc::{self, r#async::TtrpcContext},
};

use crate::{
    error::{Fault, Kind},
    events::Publisher,
    ids::{ContainerId, ExecId, ProcessKey},
    sandbox::{driver::Handle, model::*},
    stats,
};

/// Type of the figures that Stats answers with; any other makes containerd fail for the whole node
/// (contract, T11).
pub(crate) const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// The task service of one shim.
pub struct TaskService {
    sandbox: Handle,
}

impl TaskService {
    /// Serves the tasks of `sandbox`.
    pub fn new(sandbox: Handle) -> Self {
        Self { sandbox }
    }

    async fn empty(&self, request: Request) -> ttrpc::Result<Empty> {
        self.sandbox.ask(request).await?;
        Ok(Empty::new())
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, req: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        if !req.checkpoint.is_empty() || !req.parent_checkpoint.is_empty() {
            let text = "restoring a container from a checkpoint is not supported";
            return Err(Fault::new(Kind::Unimplemented, text).into());
        }
        let request = CreateRequest {
            id: ContainerId::parse(&req.id)?,
            bundle: req.bundle.clone().into(),
            rootfs: req.rootfs.iter().map(root_mount).collect(),
            io: io(req.terminal, &req.stdin, &req.stdout, &req.stderr),
            options: req.options.into_option().map(|any| (any.type_url, any.value)),
        };
        let pid = self.pid(Request::Create(Box::new(request))).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        // Left to the generated default, the answer would be NotFound, which containerd reads as "no such task".
        Err(Fault::new(Kind::Unimplemented, "checkpointing a container is not supported").into())
    }

    async fn start(&self, _: &TtrpcContext, req: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = self.pid(Request::Start(ProcessKey::parse(&req.id, &req.exec_id)?)).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, req: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let process = req.spec.into_option().map(|any| any.value).unwrap_or_default();
        if process.is_empty() {
            return Err(Fault::new(Kind::InvalidArgument, "exec has no process specification").into());
        }
        self.empty(Request::Exec {
            container: ContainerId::parse(&req.id)?,
            exec: ExecId::parse(&req.exec_id)?,
            io: io(req.terminal, &req.stdin, &req.stdout, &req.stderr),
            process: process.into(),
        })
        .await
    }

    async fn state(&self, _: &TtrpcContext, req: StateRequest) -> ttrpc::Result<StateResponse> {
        let key = ProcessKey::parse(&req.id, &req.exec_id)?;
        match self.sandbox.ask(Request::State(key)).await? {
            Reply::State { bundle, pid, status, io, exit } => Ok(StateResponse {
                id: req.id,
                exec_id: req.exec_id,
                bundle: bundle.to_string_lossy().into_owned(),
                pid: pid.unsigned_abs(),
                status: EnumOrUnknown::new(task_status(status)),
                stdin: io.stdin,
                stdout: io.stdout,
                stderr: io.stderr,
                terminal: io.terminal,
                exit_status: exit.map_or(0, |e| e.status),
                exited_at: exit.map(|e| timestamp(e.at)).into(),
                ..Default::default()
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn pids(&self, _: &TtrpcContext, req: PidsRequest) -> ttrpc::Result<PidsResponse> {
        match self.sandbox.ask(Request::Pids(ContainerId::parse(&req.id)?)).await? {
            Reply::Pids(processes) => Ok(PidsResponse {
                processes: processes
                    .into_iter()
                    .map(|(pid, exec)| ProcessInfo {
                        pid,
                        info: process_details(&exec),
                        ..Default::default()
                    })
                    .collect(),
                ..Default::default()
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn pause(&self, _: &TtrpcContext, req: PauseRequest) -> ttrpc::Result<Empty> {
        self.empty(Request::Pause(ContainerId::parse(&req.id)?)).await
    }

    async fn resume(&self, _: &TtrpcContext, req: ResumeRequest) -> ttrpc::Result<Empty> {
        self.empty(Request::Resume(ContainerId::parse(&req.id)?)).await
    }

    async fn kill(&self, _: &TtrpcContext, req: KillRequest) -> ttrpc::Result<Empty> {
        let key = ProcessKey::parse(&req.id, &req.exec_id)?;
        self.empty(Request::Kill { key, signal: req.signal, all: req.all }).await
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let key = ProcessKey::parse(&req.id, &req.exec_id)?;
        self.empty(Request::ResizePty { key, width: req.width, height: req.height }).await
    }

    async fn close_io(&self, _: &TtrpcContext, req: CloseIORequest) -> ttrpc::Result<Empty> {
        if !req.stdin {
            return Ok(Empty::new());
        }
        self.empty(Request::CloseIo(ProcessKey::parse(&req.id, &req.exec_id)?)).await
    }

    async fn update(&self, _: &TtrpcContext, req: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = req.resources.into_option().map(|any| any.value).unwrap_or_default();
        self.empty(Request::Update { container: ContainerId::parse(&req.id)?, resources }).await
    }

    async fn wait(&self, _: &TtrpcContext, req: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let key = ProcessKey::parse(&req.id, &req.exec_id)?;
        match self.sandbox.ask(Request::Wait(key)).await? {
            Reply::Exit(exit) => Ok(WaitResponse {
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn stats(&self, _: &TtrpcContext, req: StatsRequest) -> ttrpc::Result<StatsResponse> {
        match self.sandbox.ask(Request::Stats(ContainerId::parse(&req.id)?)).await? {
            Reply::Stats(files) => {
                let value = stats::metrics(&files)
                    .write_to_bytes()
                    .map_err(|e| Fault::internal("encode the figures", &e))?;
                let any = Any { type_url: METRICS_TYPE.into(), value, ..Default::default() };
                Ok(StatsResponse { stats: MessageField::some(any), ..Default::default() })
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn connect(&self, _: &TtrpcContext, req: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        match self.sandbox.ask(Request::Connect(ContainerId::parse(&req.id)?)).await? {
            Reply::Connect(pid) => Ok(ConnectResponse {
                shim_pid: std::process::id(),
                task_pid: pid.unsigned_abs(),
                version: env!("CARGO_PKG_VERSION").into(),
                ..Default::default()
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn delete(&self, _: &TtrpcContext, req: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let key = ProcessKey::parse(&req.id, &req.exec_id)?;
        match self.sandbox.ask(Request::Delete(key)).await? {
            Reply::Deleted { pid, exit } => Ok(DeleteResponse {
                pid: pid.unsigned_abs(),
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            }),
            other => Err(unexpected(&other)),
        }
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.empty(Request::Shutdown).await
    }
}

impl TaskService {
    async fn pid(&self, request: Request) -> ttrpc::Result<u32> {
        match self.sandbox.ask(request).await? {
            Reply::Pid(pid) => Ok(pid.unsigned_abs()),
            other => Err(unexpected(&other)),
        }
    }
}

/// Sends an event of the sandbox under containerd's topic for it.
pub fn announce(publisher: &Publisher, event: &Event) {
    let (topic, message): (&str, Box<dyn MessageDyn>) = match event {
        Event::Create(request, pid) => ("/tasks/create", Box::new(task_create(request, *pid))),
        Event::Start(id, pid) => (
            "/tasks/start",
            Box::new(events::TaskStart {
                container_id: id.to_string(),
                pid: pid.unsigned_abs(),
                ..Default::default()
            }),
        ),
        Event::ExecAdded(key) => (
            "/tasks/exec-added",
            Box::new(events::TaskExecAdded {
                container_id: key.container.to_string(),
                exec_id: key.exec_str().into(),
                ..Default::default()
            }),
        ),
        Event::ExecStarted(key, pid) => (
            "/tasks/exec-started",
            Box::new(events::TaskExecStarted {
                container_id: key.container.to_string(),
                exec_id: key.exec_str().into(),
                pid: pid.unsigned_abs(),
                ..Default::default()
            }),
        ),
        Event::Exit(key, pid, exit) => ("/tasks/exit", Box::new(task_exit(key, *pid, exit))),
        Event::Delete(key, pid, exit) => (
            "/tasks/delete",
            Box::new(events::TaskDelete {
                container_id: key.container.to_string(),
                id: key.exec_str().into(),
                pid: pid.unsigned_abs(),
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            }),
        ),
        Event::Oom(id) => {
            ("/tasks/oom", Box::new(events::TaskOOM { container_id: id.to_string(), ..Default::default() }))
        }
        Event::Paused(id) => (
            "/tasks/paused",
            Box::new(events::TaskPaused { container_id: id.to_string(), ..Default::default() }),
        ),
        Event::Resumed(id) => (
            "/tasks/resumed",
            Box::new(events::TaskResumed { container_id: id.to_string(), ..Default::default() }),
        ),
    };
    publisher.publish(topic, message.as_ref());
}

fn task_create(request: &CreateRequest, pid: i32) -> events::TaskCreate {
    let mounts = request.rootfs.iter().map(|m| Mount {
        type_: m.kind.clone(),
        source: m.source.clone(),
        target: m.target.clone(),
        options: m.options.clone(),
        ..Default::default()
    });
    events::TaskCreate {
        container_id: request.id.to_string(),
        bundle: request.bundle.to_string_lossy().into_owned(),
        rootfs: mounts.collect(),
        io: MessageField::some(events::TaskIO {
            stdin: request.io.stdin.clone(),
            stdout: request.io.stdout.clone(),
            stderr: request.io.stderr.clone(),
            terminal: request.io.terminal,
            ..Default::default()
        }),
        pid: pid.unsigned_abs(),
        ..Default::default()
    }
}

fn task_exit(key: &ProcessKey, pid: i32, exit: &ExitInfo) -> events::TaskExit {
    events::TaskExit {
        container_id: key.container.to_string(),
        // containerd tells an init's exit from an exec's by this id being the container's.
        id: key.exec.as_ref().map_or_else(|| key.container.to_string(), |e| e.to_string()),
        pid: pid.unsigned_abs(),
        exit_status: exit.status,
        exited_at: MessageField::some(timestamp(exit.at)),
        ..Default::default()
    }
}

fn root_mount(mount: &Mount) -> RootMount {
    RootMount {
        kind: mount.type_.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}

fn io(terminal: bool, stdin: &str, stdout: &str, stderr: &str) -> Io {
    Io { terminal, stdin: stdin.to_owned(), stdout: stdout.to_owned(), stderr: stderr.to_owned() }
}

fn task_status(status: Status) -> TaskStatus {
    match status {
        Status::Created => TaskStatus::CREATED,
        Status::Running => TaskStatus::RUNNING,
        Status::Stopped => TaskStatus::STOPPED,
        Status::Paused => TaskStatus::PAUSED,
    }
}

fn timestamp(at: SystemTime) -> Timestamp {
    at.into()
}

/// As runc's shim tells clients which process an exec is.
fn process_details(exec: &str) -> MessageField<Any> {
    if exec.is_empty() {
        return MessageField::none();
    }
    let details =
        containerd_shim_protos::shim::oci::ProcessDetails { exec_id: exec.to_owned(), ..Default::default() };
    let value = details.write_to_bytes().unwrap_or_default();
    MessageField::some(Any {
        type_url: "containerd.runc.v1.ProcessDetails".into(),
        value,
        ..Default::default()
    })
}

pub(crate) fn unexpected(reply: &Reply) -> ttrpc::Error {
    Fault::new(Kind::Internal, format!("the sandbox answered {reply:?}, which is not to the point")).into()
}
