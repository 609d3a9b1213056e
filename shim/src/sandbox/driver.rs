//! The one task that owns a sandbox's state: feeds it what happens and carries out what it wants.
//! Never awaits I/O itself: jobs run beside it and come back as inputs, so a slow Create cannot hold up a
//! Kill.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use serde::Serialize;
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};

use super::{
    host::{Host, MachineFacts},
    model::*,
    state::{Sandbox, Summary},
};
use crate::{
    error::{Fault, Kind},
    events::Publisher,
    metrics::counters::Counters,
    task::announce,
    tasks,
};

type Answer = oneshot::Sender<Result<Reply, Fault>>;

/// Asks the sandbox.
#[derive(Clone)]
pub struct Handle {
    requests: mpsc::UnboundedSender<(Request, Answer)>,
    counters: Arc<Counters>,
}

impl Handle {
    /// Asks and waits for the answer.
    pub async fn ask(&self, request: Request) -> Result<Reply, Fault> {
        let (name, began) = (request.name(), (!request.waits()).then(Instant::now));
        let answer = self.ask_driver(request).await;
        let result = answer.as_ref().map_or_else(|fault| fault.kind.as_str(), |_| "ok");
        self.counters.answered(name, result, began.map(|began| began.elapsed()));
        answer
    }

    async fn ask_driver(&self, request: Request) -> Result<Reply, Fault> {
        let gone = || Fault::new(Kind::Unavailable, "the shim is ending");
        let (answer, reply) = oneshot::channel();
        self.requests.send((request, answer)).map_err(|_| gone())?;
        reply.await.map_err(|_| gone())?
    }
}

/// Owns the sandbox.
pub struct Driver {
    sandbox: Sandbox,
    host: Arc<Host>,
    publisher: Publisher,
    requests: mpsc::UnboundedReceiver<(Request, Answer)>,
    inputs: mpsc::UnboundedReceiver<Input>,
    own: mpsc::UnboundedSender<Input>,
    answers: HashMap<Ticket, Answer>,
    last_ticket: u64,
    written: (Vec<Summary>, Option<MachineFacts>),
    /// The sandbox is being taken back, or has been.
    taken_back: bool,
    created: SystemTime,
}

impl Driver {
    /// A driver for `host`, whose inputs arrive at `inputs` and are sent by `own`.
    pub fn new(
        host: Arc<Host>,
        publisher: Publisher,
        inputs: mpsc::UnboundedReceiver<Input>,
        own: mpsc::UnboundedSender<Input>,
    ) -> (Self, Handle) {
        let (send, requests) = mpsc::unbounded_channel();
        let counters = host.counters().clone();
        let driver = Self {
            sandbox: Sandbox::new(),
            host,
            publisher,
            requests,
            inputs,
            own,
            answers: HashMap::new(),
            last_ticket: 0,
            written: (Vec::new(), None),
            taken_back: false,
            created: SystemTime::now(),
        };
        (driver, Handle { requests: send, counters })
    }

    /// Runs until the sandbox has been shut down; answers whether everything could be taken back.
    pub async fn run(mut self) -> bool {
        loop {
            let input = tokio::select! {
                Some((request, answer)) = self.requests.recv() => {
                    self.last_ticket += 1;
                    let ticket = Ticket(self.last_ticket);
                    self.answers.insert(ticket, answer);
                    Input::Request(ticket, request)
                }
                Some(input) = self.inputs.recv() => input,
            };
            debug!(?input, "input");
            let (mut quit, failed) = (false, matches!(input, Input::Done(Done::Teardown(Err(_)))));
            for effect in self.sandbox.handle(input) {
                quit |= effect == Effect::Quit;
                self.carry_out(effect);
            }
            if quit {
                return !failed;
            }
            self.tell_state();
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Reply(ticket, result) => {
                if let Some(answer) = self.answers.remove(&ticket) {
                    // Whoever asked may have gone away.
                    let _ = answer.send(result);
                }
            }
            Effect::Start(job) => {
                self.taken_back |= matches!(job, Job::Teardown);
                let (host, own) = (self.host.clone(), self.own.clone());
                tasks::spawn(async move {
                    let done = host.run(job).await;
                    let _ = own.send(Input::Done(done));
                });
            }
            Effect::Publish(event) => {
                if matches!(event, Event::Exit(..)) {
                    kill_point!(ExitKnown);
                }
                announce(&self.publisher, &event);
            }
            Effect::Arm(deadline) => {
                let own = self.own.clone();
                tasks::spawn(async move {
                    tokio::time::sleep(deadline.after()).await;
                    let _ = own.send(Input::Expired(deadline));
                });
            }
            Effect::CloseStdin(key) => self.host.close_stdin(&key),
            Effect::KillMachine(why) => self.host.kill_machine(&why),
            Effect::Quit => {}
        }
    }

    /// Keeps `state.json` true for `bulkhead ps`.
    fn tell_state(&mut self) {
        // Its directory is being removed, which a file that comes meanwhile would prevent.
        if self.taken_back {
            return;
        }
        let now = (self.sandbox.summary(), self.host.machine());
        if now == self.written {
            return;
        }
        let written = fail_point!(SandboxState, write_state(&self.host, &now.0, self.created));
        if let Err(error) = written {
            warn!(%error, "state.json is out of date");
        }
        self.written = now;
    }
}

#[derive(Serialize)]
struct StateFile<'a> {
    namespace: &'a str,
    id: &'a str,
    shim_pid: u32,
    #[serde(flatten)]
    machine: Option<MachineFacts>,
    created_unix_nanos: u64,
    bundle: &'a std::path::Path,
    containers: Vec<ContainerState<'a>>,
}

#[derive(Serialize)]
struct ContainerState<'a> {
    id: &'a str,
    pid: i32,
    status: &'static str,
}

fn write_state(host: &Host, summary: &[Summary], created: SystemTime) -> std::io::Result<()> {
    let identity = host.identity();
    let state = StateFile {
        namespace: &identity.namespace,
        id: &identity.id,
        shim_pid: std::process::id(),
        machine: host.machine(),
        created_unix_nanos: created
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or(Duration::ZERO)
            .as_nanos() as u64,
        bundle: &identity.bundle,
        containers: summary
            .iter()
            .map(|c| ContainerState {
                id: c.id.as_str(),
                pid: c.pid,
                status: match c.status {
                    Status::Created => "created",
                    Status::Running => "running",
                    Status::Stopped => "stopped",
                    Status::Paused => "paused",
                },
            })
            .collect(),
    };
    let next = host.dir().join("state.json.next");
    std::fs::write(&next, serde_json::to_vec(&state)?)?;
    std::fs::rename(&next, host.dir().join("state.json"))
}
