//! A containerd in a few hundred lines: it makes bundles, runs the shim's binary as the daemon does, takes
//! its events, and calls its task service.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::events::task as events;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, Events, create_events};
use containerd_shim_protos::ttrpc::r#async::{Server, TtrpcContext};
use containerd_shim_protos::ttrpc::{self, Code};
use harness::{Context, Output, Run};
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::sync::Notify;

/// The longest a call may take: a guest boots within it under emulation on a busy machine.
const CALL: Duration = Duration::from_secs(180);

/// What the event service does with the next event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Answers with an error.
    Refuse,
    /// Takes it, and never answers.
    Silence,
}

#[derive(Default)]
struct Inbox {
    envelopes: Mutex<Vec<Envelope>>,
    trouble: Mutex<VecDeque<Trouble>>,
    refused: Mutex<Vec<String>>,
    arrived: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

struct EventService(Arc<Inbox>);

#[async_trait]
impl Events for EventService {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<api::Empty> {
        let envelope = request.envelope.into_option().unwrap_or_default();
        let trouble = lock(&self.0.trouble).pop_front();
        match trouble {
            Some(trouble) => {
                lock(&self.0.refused).push(envelope.topic.clone());
                self.0.arrived.notify_waiters();
                if trouble == Trouble::Silence {
                    std::future::pending::<()>().await;
                }
                Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::UNAVAILABLE, "not now")))
            }
            None => {
                lock(&self.0.envelopes).push(envelope);
                self.0.arrived.notify_waiters();
                Ok(api::Empty::new())
            }
        }
    }
}

/// What containerd writes to the shim's standard input.
pub(crate) enum Input {
    /// containerd 2.3 and later.
    Bootstrap {
        /// Where the socket is to be.
        socket_dir: Option<String>,
    },
    /// Before 2.3: the runtime's options.
    Options(Any),
    /// Before 2.3, without options.
    Nothing,
}

/// The daemon's side.
pub(crate) struct Fake {
    runtime: Runtime,
    inbox: Arc<Inbox>,
    server: Option<Server>,
    dir: PathBuf,
    namespace: String,
    shim: PathBuf,
    path: String,
    config: PathBuf,
}

impl Fake {
    pub(crate) fn start(t: &mut Context<'_>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let settings = t.settings();
        let (shim, path) = (settings.program("containerd-shim-bulkhead-v2")?, settings.path.clone());
        let dir = t.dir().to_path_buf();
        let mut fake = Self {
            runtime,
            inbox: Arc::default(),
            server: None,
            dir,
            namespace: t.node().namespace().to_string(),
            shim,
            path,
            config: t.node().bulkhead_config(),
        };
        fake.listen()?;
        Ok(fake)
    }

    /// Address of the daemon's main socket, which nobody serves: the shim only needs its name.
    pub(crate) fn address(&self) -> String {
        self.dir.join("c.sock").display().to_string()
    }

    fn ttrpc_address(&self) -> String {
        format!("{}.ttrpc", self.address())
    }

    pub(crate) fn shim_program(&self) -> &Path {
        &self.shim
    }

    /// Begins to serve events.
    pub(crate) fn listen(&mut self) -> Result<()> {
        let path = self.ttrpc_address();
        fs::remove_file(&path).ok();
        let service = create_events(Arc::new(EventService(Arc::clone(&self.inbox))));
        let _inside = self.runtime.enter();
        let mut server = Server::new().bind(&format!("unix://{path}"))?.register_service(service);
        self.runtime.block_on(server.start())?;
        self.server = Some(server);
        Ok(())
    }

    /// Goes away: every connection is cut, and the socket with it.
    pub(crate) fn hang_up(&mut self) {
        if let Some(mut server) = self.server.take() {
            self.runtime.block_on(async {
                server.disconnect().await;
            });
            fs::remove_file(self.ttrpc_address()).ok();
        }
    }

    /// What happens to the next events that come.
    pub(crate) fn make_trouble(&self, trouble: &[Trouble]) {
        lock(&self.inbox.trouble).extend(trouble);
    }

    /// Topics of the events that met with trouble.
    pub(crate) fn troubled(&self) -> Vec<String> {
        lock(&self.inbox.refused).clone()
    }

    /// Makes a bundle with a config.json.
    pub(crate) fn bundle(&self, id: &str, spec: &Value) -> Result<PathBuf> {
        let bundle = self.dir.join("b").join(id);
        fs::create_dir_all(bundle.join("rootfs"))?;
        fs::write(bundle.join("config.json"), serde_json::to_vec(spec)?)?;
        Ok(bundle)
    }

    /// The shim's binary with the flags and the environment that containerd gives it.
    pub(crate) fn binary(&self, id: &str, bundle: &Path, more: &[&str], action: &str) -> Run {
        Run::new(&self.shim)
            .args([
                "-namespace",
                &self.namespace,
                "-address",
                &self.address(),
                "-publish-binary",
                "/bin/false",
            ])
            .args(["-id", id])
            .args(more)
            .arg(action)
            .cwd(bundle)
            .env_clear()
            .env("PATH", &self.path)
            .env("TTRPC_ADDRESS", self.ttrpc_address())
            .env("GRPC_ADDRESS", self.address())
            .env("NAMESPACE", &self.namespace)
            .env("MAX_SHIM_VERSION", "2")
            .env("GOMAXPROCS", "2")
            .env("BULKHEAD_CONFIG", &self.config)
            .deadline(30)
    }

    /// Runs `start` and gives back what it said.
    pub(crate) fn run_start(&self, id: &str, bundle: &Path, input: &Input) -> Result<Output> {
        self.start_command(id, bundle, input)?.output()
    }

    /// `start`, not yet run.
    pub(crate) fn start_command(&self, id: &str, bundle: &Path, input: &Input) -> Result<Run> {
        let bytes = match input {
            Input::Nothing => Vec::new(),
            Input::Options(any) => any.write_to_bytes()?,
            Input::Bootstrap { socket_dir } => BootstrapParams {
                instance_id: id.into(),
                namespace: self.namespace.clone(),
                containerd_version: "2.4.2".into(),
                containerd_ttrpc_address: self.ttrpc_address(),
                containerd_grpc_address: self.address(),
                containerd_binary: "/bin/false".into(),
                socket_dir: socket_dir.clone(),
                ..Default::default()
            }
            .write_to_bytes()?,
        };
        Ok(self.binary(id, bundle, &[], "start").stdin_bytes(bytes))
    }

    /// Starts a shim as containerd 2.4 does and connects to it.
    pub(crate) fn shim(&self, id: &str, bundle: &Path) -> Result<Shim<'_>> {
        let output = self.run_start(id, bundle, &Input::Bootstrap { socket_dir: None })?.ok()?;
        let answer = Answer::parse(&output)?;
        self.connect(&answer.address)
    }

    /// Connects to a shim.
    pub(crate) fn connect(&self, address: &str) -> Result<Shim<'_>> {
        let client = self
            .runtime
            .block_on(Client::connect(address))
            .with_context(|| format!("connect to {address}"))?;
        Ok(Shim { fake: self, client, address: address.to_string() })
    }

    /// What the events so far say, one word each: `create c`, `exit c/e 0` …
    pub(crate) fn story(&self) -> Vec<String> {
        lock(&self.inbox.envelopes).iter().map(tell).collect()
    }

    /// Waits for an event that reads `word` (see [`Fake::story`]), or begins with it.
    pub(crate) fn wait_event(&self, word: &str, seconds: u64) -> Result<()> {
        let hit = |story: Vec<String>| story.iter().any(|w| w == word || w.starts_with(&format!("{word} ")));
        self.wait(seconds, || hit(self.story()))
            .map_err(|e| e.context(format!("waiting for the event {word:?}; seen: {:?}", self.story())))
    }

    /// Waits until the event service has turned away `count` events.
    pub(crate) fn wait_troubled(&self, count: usize, seconds: u64) -> Result<()> {
        self.wait(seconds, || self.troubled().len() >= count)
    }

    fn wait(&self, seconds: u64, done: impl Fn() -> bool) -> Result<()> {
        let wait = async {
            loop {
                let arrived = self.inbox.arrived.notified();
                tokio::pin!(arrived);
                arrived.as_mut().enable();
                if done() {
                    return;
                }
                arrived.await;
            }
        };
        let limited = async { tokio::time::timeout(Duration::from_secs(seconds), wait).await };
        self.runtime.block_on(limited).map_err(|_| anyhow!("nothing came within {seconds} s"))
    }

    /// Runs something asynchronous beside the event service.
    pub(crate) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Every envelope so far.
    pub(crate) fn envelopes(&self) -> Vec<Envelope> {
        lock(&self.inbox.envelopes).clone()
    }
}

/// One event in a word or two.
fn tell(envelope: &Envelope) -> String {
    let value = envelope.event.as_ref().map(|e| e.value.clone()).unwrap_or_default();
    let name = envelope.topic.trim_start_matches("/tasks/");
    let told = match name {
        "create" => events::TaskCreate::parse_from_bytes(&value).map(|e| e.container_id),
        "start" => events::TaskStart::parse_from_bytes(&value).map(|e| e.container_id),
        "exec-added" => events::TaskExecAdded::parse_from_bytes(&value)
            .map(|e| format!("{}/{}", e.container_id, e.exec_id)),
        "exec-started" => events::TaskExecStarted::parse_from_bytes(&value)
            .map(|e| format!("{}/{}", e.container_id, e.exec_id)),
        "exit" => events::TaskExit::parse_from_bytes(&value).map(|e| {
            let who = if e.id == e.container_id { e.id } else { format!("{}/{}", e.container_id, e.id) };
            format!("{who} {}", e.exit_status)
        }),
        "delete" => events::TaskDelete::parse_from_bytes(&value).map(|e| e.container_id),
        "oom" => events::TaskOOM::parse_from_bytes(&value).map(|e| e.container_id),
        "paused" => events::TaskPaused::parse_from_bytes(&value).map(|e| e.container_id),
        "resumed" => events::TaskResumed::parse_from_bytes(&value).map(|e| e.container_id),
        _ => Ok(String::new()),
    };
    format!("{name} {}", told.unwrap_or_else(|e| format!("undecodable: {e}")))
}

/// The answer of `start`.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) version: u64,
    pub(crate) address: String,
    pub(crate) protocol: String,
}

impl Answer {
    /// Reads it as every containerd since 1.7 can: JSON.
    pub(crate) fn parse(output: &Output) -> Result<Self> {
        let value: Value =
            serde_json::from_slice(&output.stdout).with_context(|| format!("not JSON\n{output}"))?;
        Ok(Self {
            version: value["version"].as_u64().unwrap_or(0),
            address: value["address"].as_str().unwrap_or_default().to_string(),
            protocol: value["protocol"].as_str().unwrap_or_default().to_string(),
        })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        PathBuf::from(self.address.trim_start_matches("unix://"))
    }
}

/// A connection to a shim's task service.
pub(crate) struct Shim<'a> {
    fake: &'a Fake,
    client: Client,
    pub(crate) address: String,
}

/// How a call failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) message: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}: {}", self.code, self.message)
    }
}

impl std::error::Error for Failure {}

pub(crate) const V3: &str = "containerd.task.v3.Task";
pub(crate) const V2: &str = "containerd.task.v2.Task";

impl Shim<'_> {
    /// One call, not waited for.
    pub(crate) fn request<R: Message>(
        &self,
        service: &str,
        method: &str,
        message: &dyn containerd_shim_protos::protobuf::MessageDyn,
    ) -> impl Future<Output = Result<R, Failure>> + use<R> {
        let request = ttrpc::Request {
            service: service.into(),
            method: method.into(),
            timeout_nano: CALL.as_nanos() as i64,
            payload: message.write_to_bytes_dyn().unwrap_or_default(),
            ..Default::default()
        };
        let client = self.client.clone();
        async move {
            let failure = |code, message: String| Failure { code, message };
            let response = match tokio::time::timeout(CALL, client.request(request)).await {
                Err(_) => return Err(failure(Code::DEADLINE_EXCEEDED, "no answer".into())),
                Ok(Err(ttrpc::Error::RpcStatus(s))) => return Err(failure(s.code(), s.message)),
                Ok(Err(e)) => return Err(failure(Code::UNAVAILABLE, e.to_string())),
                Ok(Ok(response)) => response,
            };
            R::parse_from_bytes(&response.payload).map_err(|e| failure(Code::DATA_LOSS, e.to_string()))
        }
    }

    /// One call of the task service, version 3.
    pub(crate) fn call<R: Message>(
        &self,
        method: &str,
        message: &dyn containerd_shim_protos::protobuf::MessageDyn,
    ) -> Result<R, Failure> {
        self.fake.block_on(self.request(V3, method, message))
    }

    /// Fails unless the call is refused with `code`; its message.
    pub(crate) fn refused(
        &self,
        method: &str,
        message: &dyn containerd_shim_protos::protobuf::MessageDyn,
        code: Code,
    ) -> Result<String> {
        match self.call::<api::Empty>(method, message) {
            Ok(_) => bail!("{method} has succeeded, it should say {code:?}"),
            Err(failure) => {
                ensure!(failure.code == code, "{method} should say {code:?}: {failure}");
                Ok(failure.message)
            }
        }
    }

    pub(crate) fn create(&self, id: &str, bundle: &Path) -> Result<u32, Failure> {
        let request = api::CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            ..Default::default()
        };
        Ok(self.call::<api::CreateTaskResponse>("Create", &request)?.pid)
    }

    pub(crate) fn start(&self, id: &str, exec: &str) -> Result<u32, Failure> {
        let request = api::StartRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        Ok(self.call::<api::StartResponse>("Start", &request)?.pid)
    }

    /// A waiting call, not waited for: its exit status.
    pub(crate) fn wait_later(
        &self,
        id: &str,
        exec: &str,
    ) -> impl Future<Output = Result<u32, Failure>> + use<> {
        let request = api::WaitRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        let call = self.request::<api::WaitResponse>(V3, "Wait", &request);
        async move { Ok(call.await?.exit_status) }
    }

    pub(crate) fn wait(&self, id: &str, exec: &str) -> Result<u32, Failure> {
        self.fake.block_on(self.wait_later(id, exec))
    }

    pub(crate) fn kill(&self, id: &str, exec: &str, signal: u32) -> Result<(), Failure> {
        let request = api::KillRequest { id: id.into(), exec_id: exec.into(), signal, ..Default::default() };
        self.call::<api::Empty>("Kill", &request).map(|_| ())
    }

    pub(crate) fn exec(&self, id: &str, exec: &str, command: &[&str]) -> Result<(), Failure> {
        self.exec_to(id, exec, command, "")
    }

    /// An exec whose output goes to `stdout`.
    pub(crate) fn exec_to(
        &self,
        id: &str,
        exec: &str,
        command: &[&str],
        stdout: &str,
    ) -> Result<(), Failure> {
        let process = serde_json::json!({
            "args": command, "cwd": "/", "user": { "uid": 0, "gid": 0 },
            "env": ["PATH=/usr/bin:/bin"],
        });
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.to_string().into_bytes(),
            ..Default::default()
        };
        let request = api::ExecProcessRequest {
            id: id.into(),
            exec_id: exec.into(),
            stdout: stdout.into(),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.call::<api::Empty>("Exec", &request).map(|_| ())
    }

    pub(crate) fn state(&self, id: &str, exec: &str) -> Result<api::StateResponse, Failure> {
        let request = api::StateRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.call("State", &request)
    }

    pub(crate) fn connect_rpc(&self, id: &str) -> Result<api::ConnectResponse, Failure> {
        self.call("Connect", &api::ConnectRequest { id: id.into(), ..Default::default() })
    }

    pub(crate) fn delete(&self, id: &str, exec: &str) -> Result<api::DeleteResponse, Failure> {
        let request = api::DeleteRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.call("Delete", &request)
    }

    /// Asks the shim to end. It may end before it has answered.
    pub(crate) fn shutdown(&self, id: &str) {
        let request = api::ShutdownRequest { id: id.into(), ..Default::default() };
        self.call::<api::Empty>("Shutdown", &request).ok();
    }

    /// Ends a container by force, and the shim with it.
    pub(crate) fn end(&self, id: &str) -> Result<()> {
        self.kill(id, "", 9)?;
        self.wait(id, "")?;
        self.delete(id, "")?;
        self.shutdown(id);
        Ok(())
    }
}
