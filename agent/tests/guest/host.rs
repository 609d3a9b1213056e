//! The shim's side of the conversation, as small as a test can have it.
//! Knows requests, streams and events; what is expected of them is the tests' affair.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use bulkhead_proto::{
    SHARE_TAG,
    agent::{
        ConfigureRequest, ConfigureResponse, ContainerRequest, CreateContainerRequest, EventsRequest,
        ExecRequest, SignalRequest, Stdio, UserNamespace, event::Kind,
    },
    stream::{STREAM_PREFACE_LEN, Token, decode_stream},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    process::Child,
    sync::{oneshot, watch},
    task::JoinHandle,
    time::timeout,
};
use ttrpc::context::{self, Context};

use crate::vm::Vm;

/// No single request takes this long.
const DEADLINE: Duration = Duration::from_secs(60);

type Waiting = Arc<Mutex<HashMap<[u8; 16], oneshot::Sender<UnixStream>>>>;

pub(crate) struct Host {
    pub(crate) vm: Vm,
    waiting: Waiting,
    events: watch::Receiver<Vec<Kind>>,
    next_token: u8,
    /// How much had been told when a process was asked for: what is older speaks of another one.
    since: HashMap<(String, String), usize>,
    reader: JoinHandle<()>,
}

/// A machine whose host is gone.
pub(crate) struct HungUp {
    pub(crate) qemu: Child,
    _rest: (TempDir, [Child; 2]),
}

/// The streams of one process, dialled by the agent.
pub(crate) struct Io {
    pub(crate) stdin: Option<oneshot::Receiver<UnixStream>>,
    outputs: [Option<(Token, oneshot::Receiver<UnixStream>)>; 2],
}

pub(crate) fn context() -> Context {
    context::with_duration(DEADLINE)
}

pub(crate) fn request(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.into(), ..Default::default() }
}

/// What a client of containerd sends for a plain container.
pub(crate) fn spec(root: &str, args: &[&str]) -> Value {
    let caps = json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"]);
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0]},
            "args": args,
            "env": ["PATH=/bin:/usr/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": root},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
            "maskedPaths": ["/proc/kcore", "/proc/acpi", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys", "/proc/bus"],
        },
    })
}

impl Host {
    /// A configured sandbox.
    pub(crate) async fn start() -> Self {
        let mut host = Self::unconfigured().await;
        let answer = host.configure().await.unwrap();
        assert_eq!(answer.kernel_release, host.vm.hello.kernel);
        for controller in ["cpu", "memory", "pids"] {
            assert!(
                answer.controllers.iter().any(|c| c == controller),
                "{controller}: {:?}",
                answer.controllers
            );
        }
        host
    }

    pub(crate) async fn unconfigured() -> Self {
        let vm = Vm::start().await;
        let (to, events) = watch::channel(Vec::new());
        let mut stream = vm.client.events(context(), &EventsRequest::new()).await.unwrap();
        let reader = tokio::spawn(async move {
            while let Ok(Some(event)) = stream.recv().await {
                to.send_modify(|all| all.push(event.kind.unwrap()));
            }
        });
        Self { vm, waiting: Waiting::default(), events, next_token: 0, since: HashMap::new(), reader }
    }

    pub(crate) async fn configure(&mut self) -> ttrpc::Result<ConfigureResponse> {
        self.configure_with(None).await
    }

    /// Like [`Host::configure`], with a user namespace for the pod.
    pub(crate) async fn configure_with(
        &mut self,
        users: Option<UserNamespace>,
    ) -> ttrpc::Result<ConfigureResponse> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let request = ConfigureRequest {
            hostname: "pod".into(),
            time_unix_nanos: now.as_nanos() as u64,
            seed: vec![7; 32],
            sysctls: [("net.core.somaxconn".into(), "321".into()), ("kernel.shmmni".into(), "123".into())]
                .into(),
            share_tag: SHARE_TAG.into(),
            users: users.into(),
            ..Default::default()
        };
        self.vm.client.configure(context(), &request).await
    }

    /// Streams for a process, and what the request says of them.
    pub(crate) fn stdio(&mut self, stdin: bool, terminal: bool) -> (Stdio, Io) {
        let mut expect = || {
            self.next_token += 1;
            let (to, from) = oneshot::channel();
            let token = [self.next_token; 16];
            self.waiting.lock().unwrap().insert(token, to);
            (Token(token), from)
        };
        let stdin = stdin.then(&mut expect);
        let outputs = [Some(expect()), (!terminal).then(&mut expect)];
        let bytes = |stream: &Option<(Token, _)>| {
            stream.as_ref().map(|(token, _)| token.0.to_vec()).unwrap_or_default()
        };
        let stdio = Stdio {
            terminal,
            stdin_token: bytes(&stdin),
            stdout_token: bytes(&outputs[0]),
            stderr_token: bytes(&outputs[1]),
            width: if terminal { 91 } else { 0 },
            height: if terminal { 31 } else { 0 },
            ..Default::default()
        };
        (stdio, Io { stdin: stdin.map(|(_, from)| from), outputs })
    }

    pub(crate) async fn create(&mut self, id: &str, spec: &Value, stdio: Stdio) -> ttrpc::Result<u32> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: spec.to_string().into_bytes(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.since.insert((id.into(), String::new()), self.events.borrow().len());
        let client = self.vm.client.clone();
        let answer =
            self.with_streams(async move { client.create_container(context(), &request).await }).await?;
        Ok(answer.pid)
    }

    pub(crate) async fn exec(
        &mut self,
        id: &str,
        exec_id: &str,
        process: &Value,
        stdio: Stdio,
    ) -> ttrpc::Result<u32> {
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: process.to_string().into_bytes(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.since.insert((id.into(), exec_id.into()), self.events.borrow().len());
        let client = self.vm.client.clone();
        let answer = self.with_streams(async move { client.exec(context(), &request).await }).await?;
        Ok(answer.pid)
    }

    /// Accepts streams until the request is answered: the agent dials before it answers.
    async fn with_streams<T>(&mut self, request: impl Future<Output = T>) -> T {
        tokio::pin!(request);
        loop {
            tokio::select! {
                biased;
                accepted = self.vm.streams.accept() => {
                    let (mut stream, _) = accepted.unwrap();
                    let waiting = Arc::clone(&self.waiting);
                    tokio::spawn(async move {
                        let mut preface = [0; STREAM_PREFACE_LEN];
                        stream.read_exact(&mut preface).await.unwrap();
                        let token = decode_stream(&preface).unwrap();
                        let to = waiting.lock().unwrap().remove(&token.0).expect("a token is used once");
                        let _ = to.send(stream);
                    });
                }
                answer = &mut request => return answer,
            }
        }
    }

    pub(crate) async fn start_container(&self, id: &str) -> ttrpc::Result<()> {
        self.vm.client.start_container(context(), &request(id)).await.map(|_| ())
    }

    pub(crate) async fn delete(&self, id: &str) -> ttrpc::Result<()> {
        self.vm.client.delete_container(context(), &request(id)).await.map(|_| ())
    }

    pub(crate) async fn signal(&self, id: &str, exec_id: &str, signal: i32, all: bool) -> ttrpc::Result<()> {
        let request = SignalRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.vm.client.signal(context(), &request).await.map(|_| ())
    }

    /// Runs a container to its end: exit status, stdout, stderr.
    pub(crate) async fn run(&mut self, id: &str, spec: &Value, input: &[u8]) -> (u32, String, String) {
        let (stdio, io) = self.stdio(true, false);
        self.create(id, spec, stdio).await.unwrap();
        self.start_container(id).await.unwrap();
        let (out, err) = self.talk(io, input).await;
        let status = self.exit(id, "").await;
        self.delete(id).await.unwrap();
        (status, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    /// Runs a further process to its end: exit status, stdout, stderr.
    pub(crate) async fn run_exec(
        &mut self,
        id: &str,
        exec_id: &str,
        process: &Value,
    ) -> (u32, String, String) {
        let (stdio, io) = self.stdio(false, false);
        self.exec(id, exec_id, process, stdio).await.unwrap();
        let (out, err) = self.talk(io, b"").await;
        let status = self.exit(id, exec_id).await;
        (status, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    /// Writes all of stdin and reads all of the outputs.
    pub(crate) async fn talk(&self, io: Io, input: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let [out, err] = io.outputs;
        let write = async {
            if let Some(stdin) = io.stdin {
                let mut stdin = stdin.await.unwrap();
                // A process need not read what it gets.
                let _ = stdin.write_all(input).await;
            }
        };
        let (out, err, ()) = tokio::join!(self.read_all(out), self.read_all(err), write);
        (out, err)
    }

    /// Reads stdout up to the first end of a line.
    pub(crate) async fn first_line(&self, io: Io) -> String {
        let [out, _] = io.outputs;
        let mut lines = BufReader::new(out.unwrap().1.await.unwrap()).lines();
        timeout(DEADLINE, lines.next_line()).await.expect("a line").unwrap().unwrap()
    }

    /// Connections of a terminal: one to write to, one to read from.
    pub(crate) async fn terminal(&self, io: Io) -> (UnixStream, UnixStream) {
        let [out, _] = io.outputs;
        (io.stdin.unwrap().await.unwrap(), out.unwrap().1.await.unwrap())
    }

    /// Reads a stream as the shim does: until the agent has told its length, then closes first.
    async fn read_all(&self, stream: Option<(Token, oneshot::Receiver<UnixStream>)>) -> Vec<u8> {
        let Some((token, stream)) = stream else { return Vec::new() };
        let mut stream = stream.await.unwrap();
        let mut bytes = Vec::new();
        let mut events = self.events.clone();
        let mut total = None;
        while total.is_none_or(|total| (bytes.len() as u64) < total) {
            let end = events.wait_for(|all| stream_end(all, &token).is_some());
            tokio::select! {
                read = stream.read_buf(&mut bytes) => assert_ne!(read.unwrap(), 0, "the agent never closes first"),
                all = end, if total.is_none() => total = stream_end(&all.unwrap(), &token),
            }
        }
        assert_eq!(total, Some(bytes.len() as u64));
        bytes
    }

    /// Makes [`Host::exit`] know a process that was started past [`Host::exec`].
    pub(crate) fn expect_from_start(&mut self, id: &str, exec_id: &str) {
        self.since.insert((id.into(), exec_id.into()), 0);
    }

    /// Waits for the end of a process.
    pub(crate) async fn exit(&self, id: &str, exec_id: &str) -> u32 {
        let since = self.since[&(id.to_owned(), exec_id.to_owned())];
        let find = |all: &Vec<Kind>| {
            all[since..].iter().find_map(|kind| match kind {
                Kind::Exit(exit) if exit.container_id == id && exit.exec_id == exec_id => Some(exit.status),
                _ => None,
            })
        };
        let mut events = self.events.clone();
        let all = timeout(DEADLINE, events.wait_for(|all| find(all).is_some())).await;
        find(
            &all.unwrap_or_else(|_| {
                panic!(
                    "{id} {exec_id} has not ended; told {:?}; console:\n{}",
                    self.events(),
                    self.vm.console()
                )
            })
            .unwrap(),
        )
        .unwrap()
    }

    /// Closes the control connection; the machine remains to be waited for.
    pub(crate) fn hang_up(self) -> HungUp {
        let Vm { client, qemu, dir, daemons, .. } = self.vm;
        // The stream of events keeps the connection open, too.
        self.reader.abort();
        drop(client);
        HungUp { qemu, _rest: (dir, daemons) }
    }

    /// Everything that has been told so far.
    pub(crate) fn events(&self) -> Vec<Kind> {
        self.events.borrow().clone()
    }
}

fn stream_end(all: &[Kind], token: &Token) -> Option<u64> {
    all.iter().find_map(|kind| match kind {
        Kind::StreamEnd(end) if end.token == token.0 => Some(end.total_bytes),
        _ => None,
    })
}
