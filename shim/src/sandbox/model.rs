//! What goes into and comes out of the state machine: requests, results, effects.
//! Plain data; knows neither ttrpc nor how an effect is carried out.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use crate::{
    error::Fault,
    ids::{ContainerId, ExecId, ProcessKey},
    plan::Role,
};

/// Answers one request, exactly once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Where a process's streams go on the host: paths of fifos or URIs, empty = none.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Io {
    /// Has a terminal; then there is no stderr of its own.
    pub terminal: bool,
    /// Fifo to read from.
    pub stdin: String,
    /// Fifo or URI to write to.
    pub stdout: String,
    /// Fifo or URI to write to.
    pub stderr: String,
}

/// Without the arguments of logging programs: they may be secret, and this is for logs.
impl fmt::Debug for Io {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = |uri: &str| uri.split_once('?').map_or(uri.to_owned(), |(place, _)| format!("{place}?…"));
        f.debug_struct("Io")
            .field("terminal", &self.terminal)
            .field("stdin", &place(&self.stdin))
            .field("stdout", &place(&self.stdout))
            .field("stderr", &place(&self.stderr))
            .finish()
    }
}

/// A mount of the container's root as containerd describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootMount {
    /// File system type.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// Below the root; usually empty.
    pub target: String,
    /// As in fstab.
    pub options: Vec<String>,
}

/// What Create asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct CreateRequest {
    /// The new container.
    pub id: ContainerId,
    /// Its bundle: config.json and the mount point of the root.
    pub bundle: std::path::PathBuf,
    /// Mounted in order at the bundle's root.
    pub rootfs: Vec<RootMount>,
    /// Streams of the init.
    pub io: Io,
    /// Runtime options: type name and protobuf value.
    pub options: Option<(String, Vec<u8>)>,
}

/// Bytes that are handed on as they are. What they say is not for a log: the environment of a process may be
/// among them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Opaque(pub Vec<u8>);

impl fmt::Debug for Opaque {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes>", self.0.len())
    }
}

impl From<Vec<u8>> for Opaque {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

/// What CreateSandbox asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct CreatePod {
    /// CRI's `PodSandboxConfig`, as protobuf; empty if there is none.
    pub config: Opaque,
    /// The pod's network namespace on the host; empty if it has none.
    pub netns: std::path::PathBuf,
}

/// What containerd asks of a pod by the sandbox API.
#[derive(Clone, Debug, PartialEq)]
pub enum PodRequest {
    /// A new pod, up to but not including its machine.
    Create(Box<CreatePod>),
    /// Boots the machine.
    Start,
    /// Ends the machine.
    Stop {
        /// When it was asked.
        at: SystemTime,
    },
    /// Answers when the machine has ended.
    Wait,
    /// Whether it runs.
    Status,
    /// Figures of all its containers together.
    Stats,
    /// Ends everything, and this process.
    Shutdown,
}

/// What containerd asks.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// By the sandbox API.
    Pod(PodRequest),
    /// A new container, up to but not including its command.
    Create(Box<CreateRequest>),
    /// Runs the command of a created container or exec.
    Start(ProcessKey),
    /// Adds a process that Start will run.
    Exec {
        /// Whose.
        container: ContainerId,
        /// The new process.
        exec: ExecId,
        /// Streams.
        io: Io,
        /// OCI `Process`, JSON.
        process: Opaque,
    },
    /// Phase and figures of a process.
    State(ProcessKey),
    /// Processes of a container.
    Pids(ContainerId),
    /// Freezes.
    Pause(ContainerId),
    /// Thaws.
    Resume(ContainerId),
    /// Signals.
    Kill {
        /// The process.
        key: ProcessKey,
        /// Number as on Linux.
        signal: u32,
        /// Every process of the container.
        all: bool,
    },
    /// New size of a terminal, in characters.
    ResizePty {
        /// Whose.
        key: ProcessKey,
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// No more input will come.
    CloseIo(ProcessKey),
    /// New limits: OCI `LinuxResources`, JSON.
    Update {
        /// Whose.
        container: ContainerId,
        /// The limits.
        resources: Vec<u8>,
    },
    /// Answers when the process has ended.
    Wait(ProcessKey),
    /// Figures of a container.
    Stats(ContainerId),
    /// Who serves this container.
    Connect(ContainerId),
    /// Forgets an ended process.
    Delete(ProcessKey),
    /// Ends the sandbox if no container is left.
    Shutdown,
}

impl Request {
    /// What containerd calls it.
    pub fn name(&self) -> &'static str {
        match self {
            Request::Pod(request) => match request {
                PodRequest::Create(_) => "CreateSandbox",
                PodRequest::Start => "StartSandbox",
                PodRequest::Stop { .. } => "StopSandbox",
                PodRequest::Wait => "WaitSandbox",
                PodRequest::Status => "SandboxStatus",
                PodRequest::Stats => "SandboxMetrics",
                PodRequest::Shutdown => "ShutdownSandbox",
            },
            Request::Create(_) => "Create",
            Request::Start(_) => "Start",
            Request::Exec { .. } => "Exec",
            Request::State(_) => "State",
            Request::Pids(_) => "Pids",
            Request::Pause(_) => "Pause",
            Request::Resume(_) => "Resume",
            Request::Kill { .. } => "Kill",
            Request::ResizePty { .. } => "ResizePty",
            Request::CloseIo(_) => "CloseIO",
            Request::Update { .. } => "Update",
            Request::Wait(_) => "Wait",
            Request::Stats(_) => "Stats",
            Request::Connect(_) => "Connect",
            Request::Delete(_) => "Delete",
            Request::Shutdown => "Shutdown",
        }
    }

    /// Is answered when something ends, however long that takes.
    pub fn waits(&self) -> bool {
        matches!(self, Request::Wait(_) | Request::Pod(PodRequest::Wait))
    }
}

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitInfo {
    /// 0-255; 128+n for signal n.
    pub status: u32,
    /// On the host's clock.
    pub at: SystemTime,
}

/// A process as `State` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Waits for Start.
    Created,
    /// Runs.
    Running,
    /// Ended.
    Stopped,
    /// Frozen.
    Paused,
}

/// The answer to a request that succeeded.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Nothing to tell.
    Empty,
    /// Pid of the process on the host.
    Pid(i32),
    /// To State.
    State {
        /// Where its bundle is.
        bundle: std::path::PathBuf,
        /// Pid on the host, 0 before there is one.
        pid: i32,
        /// Phase.
        status: Status,
        /// Streams.
        io: Io,
        /// Set once it has ended.
        exit: Option<ExitInfo>,
    },
    /// To Wait.
    Exit(ExitInfo),
    /// To Delete.
    Deleted {
        /// Pid on the host.
        pid: i32,
        /// How it ended.
        exit: ExitInfo,
    },
    /// To Pids: pids, of the stand-in for the first process and beyond those of the host for the others, with the
    /// exec id where there is one.
    Pids(Vec<(u32, String)>),
    /// To Stats: the container's cgroup files by name.
    Stats(std::collections::HashMap<String, Vec<u8>>),
    /// To Connect: pid of the container's process, 0 if it is not known here.
    Connect(i32),
    /// To a pod's Status.
    PodStatus {
        /// Its machine runs.
        ready: bool,
        /// Pid of the machine, 0 without.
        pid: i32,
        /// Set once it has ended.
        exit: Option<ExitInfo>,
    },
}

/// Work outside the state machine. Each ends in exactly one [`Done`] with the same name.
#[derive(Clone, Debug, PartialEq)]
pub enum Job {
    /// Launches the machine for its first container and waits for its agent.
    Boot(Box<CreateRequest>),
    /// Reads what a pod wants and refuses what it cannot have.
    PlanPod(Box<CreatePod>),
    /// Launches the machine of the pod that was planned.
    BootPod,
    /// Ends the machine in order.
    Halt,
    /// The host's part of a container: root, shares.
    Prepare(Box<CreateRequest>),
    /// The guest's part.
    GuestCreate(ContainerId),
    /// Runs the command of an init.
    GuestStart(ContainerId),
    /// Starts a further process.
    GuestExec {
        /// Which.
        key: ProcessKey,
        /// Streams.
        io: Io,
        /// OCI `Process`, JSON.
        process: Opaque,
        /// Size of the terminal, if one was asked for already.
        size: Option<(u32, u32)>,
    },
    /// Takes back all that belongs to a container: in the guest if it lives, and on the host.
    Release {
        /// Whose.
        container: ContainerId,
        /// The guest can be asked.
        guest: bool,
    },
    /// Takes from the machine what containers had that have gone.
    Fit,
    /// A question to the guest on behalf of one request.
    Ask(Ticket, Ask),
    /// Ends the machine and takes everything back.
    Teardown,
}

/// A question to the guest.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    /// See [`Request::Kill`].
    Signal {
        /// The process.
        key: ProcessKey,
        /// Number.
        signal: u32,
        /// Every process of the container.
        all: bool,
    },
    /// See [`Request::Pause`].
    Pause(ContainerId),
    /// See [`Request::Resume`].
    Resume(ContainerId),
    /// See [`Request::Update`].
    Update(ContainerId, Vec<u8>),
    /// See [`Request::Stats`].
    Stats(ContainerId),
    /// See [`PodRequest::Stats`].
    PodStats,
    /// See [`Request::Pids`].
    Pids(ContainerId),
    /// See [`Request::ResizePty`].
    ResizePty(ProcessKey, u32, u32),
}

impl Ask {
    /// Whom it is about; nobody if it is about the pod.
    pub fn container(&self) -> Option<&ContainerId> {
        match self {
            Ask::PodStats => None,
            Ask::Signal { key, .. } | Ask::ResizePty(key, ..) => Some(&key.container),
            Ask::Pause(id) | Ask::Resume(id) | Ask::Update(id, _) | Ask::Stats(id) | Ask::Pids(id) => {
                Some(id)
            }
        }
    }
}

/// The end of a [`Job`].
#[derive(Clone, Debug, PartialEq)]
pub enum Done {
    /// The machine is up, of the first container or of the pod; its pid on the host.
    Boot(Result<i32, Fault>),
    /// Of a pod.
    PlanPod(Result<(), Fault>),
    /// Of the machine; its end is told as an input.
    Halt,
    /// Of a container; what it is to its pod.
    Prepare(ContainerId, Result<Role, Fault>),
    /// Of a container; its pid on the host.
    GuestCreate(ContainerId, Result<i32, Fault>),
    /// Of a container.
    GuestStart(ContainerId, Result<(), Fault>),
    /// Of an exec.
    GuestExec(ProcessKey, Result<(), Fault>),
    /// Of a container.
    Release(ContainerId),
    /// Of the machine; it is as large as it can be made.
    Fit,
    /// For a request.
    Ask(Ticket, Ask, Result<Reply, Fault>),
    /// Of the sandbox.
    Teardown(Result<(), Fault>),
}

/// Something that must happen within a time, or else.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Deadline {
    /// The output of an ended process.
    Streams(ProcessKey),
    /// The exits of a container's execs after that of its init.
    Execs(ContainerId),
    /// The end of an init that got SIGKILL.
    Killed(ContainerId),
}

impl Deadline {
    /// How long.
    pub fn after(&self) -> Duration {
        match self {
            // Readers may be slow; the data stays readable after the exit was told.
            Deadline::Streams(_) => Duration::from_secs(2),
            Deadline::Execs(_) => Duration::from_secs(2),
            // Longer than a loaded host under emulation ever needed, shorter than containerd's patience
            // with a stop (CRI asks again after 30 s by default).
            Deadline::Killed(_) => Duration::from_secs(10),
        }
    }
}

/// What is told to containerd's event stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// `/tasks/create`.
    Create(Box<CreateRequest>, i32),
    /// `/tasks/start`.
    Start(ContainerId, i32),
    /// `/tasks/exec-added`.
    ExecAdded(ProcessKey),
    /// `/tasks/exec-started`.
    ExecStarted(ProcessKey, i32),
    /// `/tasks/exit`.
    Exit(ProcessKey, i32, ExitInfo),
    /// `/tasks/delete`.
    Delete(ProcessKey, i32, ExitInfo),
    /// `/tasks/oom`.
    Oom(ContainerId),
    /// `/tasks/paused`.
    Paused(ContainerId),
    /// `/tasks/resumed`.
    Resumed(ContainerId),
}

/// How the machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineEnd {
    /// For the log and for errors.
    pub reason: String,
    /// What running processes are said to have exited with: 137 or 255, never 0.
    pub status: u32,
    /// The host killed it for want of memory.
    pub oom: bool,
    /// When.
    pub at: SystemTime,
}

/// Everything that can happen to a sandbox.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Somebody asks.
    Request(Ticket, Request),
    /// A job ended.
    Done(Done),
    /// A process of the guest ended.
    GuestExit(ProcessKey, ExitInfo),
    /// The guest's kernel killed for want of memory.
    GuestOom(ContainerId),
    /// Every output stream of the process has been copied to its end.
    StreamsClosed(ProcessKey),
    /// The machine is gone.
    MachineEnded(MachineEnd),
    /// Somebody has signalled the process of the host that stands for the container.
    Signalled(ContainerId, u32),
    /// The agent hung up while its machine runs on.
    AgentLost,
    /// A deadline has passed.
    Expired(Deadline),
}

/// Everything that a sandbox can want done.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Answer a request.
    Reply(Ticket, Result<Reply, Fault>),
    /// Begin a job.
    Start(Job),
    /// Tell containerd, after all that was told before.
    Publish(Event),
    /// Wake me unless what I wait for comes first.
    Arm(Deadline),
    /// Stop feeding a process's stdin.
    CloseStdin(ProcessKey),
    /// End the machine at once; `MachineEnded` will follow.
    KillMachine(String),
    /// The process may end.
    Quit,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_for_a_log_is_told_by_its_size_or_place() {
        let process = Opaque(b"TOKEN=hush".to_vec());
        let io = Io { stdout: "binary:///bin/logger?--token=hush".into(), ..Io::default() };
        let text = format!("{process:?} {io:?} {process:#?} {io:#?}");
        assert!(text.starts_with("<10 bytes> Io { terminal: false"), "{text}");
        assert!(text.contains("binary:///bin/logger?…"), "{text}");
        assert!(!text.contains("hush") && !text.contains("104"), "{text}");
    }
}
