//! Carries out jobs: launches the machine, speaks with the guest, prepares files, takes all back.
//! Decides nothing: what is done and when comes from the state machine.

mod backend;
mod containers;
mod disks;
mod figures;
mod follow;
mod launch;
mod resize;
mod wanted;

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bulkhead_hypervisor::{Journal, child::LineSink};
use tokio::sync::mpsc;
use tracing::{Instrument, error, info_span, warn};

use self::{containers::Prepared, figures::Scrapes, resize::Book, wanted::Wanted};
use super::{
    machine::{self, Running},
    model::*,
    network::PodNetwork,
    sockets::Sockets,
    stand_in::StandIn,
};
use crate::{
    cgroup,
    config::Config,
    error::{Fault, Kind, chain},
    guest::Agent,
    guest_exec::{self, Exits},
    ids::{ContainerId, ProcessKey},
    kept::{CAPACITY, CONSOLE_LOG, Ring},
    ledger::{Entry, Ledger},
    metrics::{SOCKET, counters::Counters, http},
    process,
    stdio::Hub,
    storage::{Disks, Follower, Places},
    tasks,
};

/// A file in the sandbox's directory: the pod was deleted in order, and the shim ends with its last container.
/// containerd calls `delete` for the pod all the same, while it deletes its containers.
pub const POD_DELETED: &str = "pod-deleted";

/// How long the guest may take to write out what is left when its sandbox ends. Little can be left: every
/// container was deleted before. With what follows it must stay below the 3 s that containerd gives a
/// Shutdown, after which it calls `delete` for a sandbox that is still being taken back.
const GOODBYE: Duration = Duration::from_millis(500);

/// Which sandbox this is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// containerd's namespace.
    pub namespace: String,
    /// Id of the sandbox: that of its first container.
    pub id: String,
    /// Where the shim was started.
    pub bundle: PathBuf,
}

/// What `bulkhead ps` wants to know of a machine.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct MachineFacts {
    /// The VMM's process.
    pub vmm_pid: i32,
    /// "emulation" or "kvm".
    pub backend: &'static str,
    /// Size.
    pub memory_mib: u64,
    /// Processors.
    pub vcpus: u32,
}

struct Ready {
    running: Running,
    agent: Option<Agent>,
    facts: MachineFacts,
}

/// The host's side of one sandbox.
pub struct Host {
    identity: Identity,
    config: Config,
    /// Why the configuration could not be read; Create is told.
    config_error: Option<String>,
    dir: PathBuf,
    hub: Hub,
    inputs: mpsc::UnboundedSender<Input>,
    ledger: Arc<Mutex<Option<Ledger>>>,
    ready: Mutex<Option<Ready>>,
    /// Once the machine is up.
    size: tokio::sync::Mutex<Option<Book>>,
    prepared: Mutex<HashMap<ContainerId, Prepared>>,
    /// The pod of the sandbox API, once it is planned.
    pod: Mutex<Option<Wanted>>,
    /// Runtime options that came with `start`: type name and protobuf value.
    options: Option<(String, Vec<u8>)>,
    cgroup: Mutex<Option<String>>,
    /// Whoever holds them may give the machine one, or take one from it.
    disks: tokio::sync::Mutex<Disks>,
    /// Locked after the ledger.
    places: Arc<Mutex<Places>>,
    network: Mutex<Option<Arc<PodNetwork>>>,
    stand_ins: Mutex<HashMap<ContainerId, StandIn>>,
    follower: Mutex<Option<Arc<Follower>>>,
    sockets: Sockets,
    counters: Arc<Counters>,
    scrapes: Scrapes,
    /// Who waits for the end of a program in the guest itself.
    guest_exits: Exits,
}

/// Records processes in the ledger and counts them to the sandbox.
struct Accounts<'a> {
    ledger: &'a Mutex<Option<Ledger>>,
    cgroup: Option<&'a str>,
    dir: &'a Path,
}

impl Journal for Accounts<'_> {
    fn process(&self, name: &str, pid: i32, start_time: u64) -> io::Result<()> {
        let entry = Entry::Process { name: name.to_owned(), pid, start_time, container: None };
        fail_point!(LaunchSpawned);
        record(self.ledger, entry).map_err(io::Error::other)?;
        fail_point!(LaunchRecorded);
        if let Some(path) = self.cgroup
            && let Err(error) = cgroup::join(path, pid)
        {
            warn!(name, pid, "not counted to the sandbox: {}", chain(&error));
        }
        Ok(())
    }

    /// The last lines are kept, for `bulkhead logs`; a pod whose console cannot be kept runs all the same.
    fn console(&self) -> Option<LineSink> {
        let path = self.dir.join(CONSOLE_LOG);
        let mut ring = Ring::create(&path, CAPACITY)
            .inspect_err(|error| warn!(%error, "the guest's console is not kept in {}", path.display()))
            .ok()?;
        Some(Box::new(move |line| drop(ring.append(format!("{line}\n").as_bytes()))))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn record(ledger: &Mutex<Option<Ledger>>, entry: Entry) -> Result<(), Fault> {
    match lock(ledger).as_mut() {
        Some(ledger) => ledger.record(entry).map_err(|e| Fault::of(Kind::Internal, &e)),
        None => Err(Fault::new(Kind::Unavailable, "the sandbox is being taken back")),
    }
}

/// The directory of a sandbox below the state directory. Its name is short: paths of unix sockets are.
pub fn sandbox_dir(state_dir: &Path, namespace: &str, id: &str) -> PathBuf {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(format!("{namespace}/{id}"));
    let name: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    state_dir.join(name)
}

impl Host {
    /// Makes the sandbox's directory and its ledger. With a `config_error` every machine is refused for it.
    pub fn new(
        identity: Identity,
        config: Config,
        config_error: Option<String>,
        inputs: mpsc::UnboundedSender<Input>,
        counters: Arc<Counters>,
    ) -> Result<Self, Fault> {
        let dir = sandbox_dir(&config.state_dir, &identity.namespace, &identity.id);
        let fault = |e: io::Error| Fault::internal(&format!("create {}", dir.display()), &e);
        // What a sandbox of the same name left behind would be mistaken for ours.
        if let Err(error) = crate::ledger::release_left_behind(&dir) {
            warn!("an earlier sandbox of this name: {}", chain(&error));
        }
        std::fs::create_dir_all(&dir).map_err(fault)?;
        std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).map_err(fault)?;
        fail_point!(SandboxDirectory);
        let mut ledger = Ledger::open(&dir).map_err(|e| Fault::of(Kind::Internal, &e))?;
        let own = Entry::Directory { path: dir.clone(), container: None };
        ledger.record(own).map_err(|e| Fault::of(Kind::Internal, &e))?;
        let pid = std::process::id() as i32;
        let start_time = process::start_time(pid).ok().flatten().unwrap_or(0);
        let shim = Entry::Process { name: "shim".into(), pid, start_time, container: None };
        ledger.record(shim).map_err(|e| Fault::of(Kind::Internal, &e))?;
        fail_point!(SandboxLedger);
        let hub = Hub::new(inputs.clone(), counters.clone());
        Ok(Self {
            identity,
            config,
            config_error,
            dir,
            hub,
            inputs,
            ledger: Arc::new(Mutex::new(Some(ledger))),
            ready: Mutex::default(),
            size: Default::default(),
            prepared: Mutex::default(),
            pod: Mutex::default(),
            options: None,
            cgroup: Mutex::default(),
            disks: Default::default(),
            places: Arc::default(),
            network: Mutex::default(),
            stand_ins: Mutex::default(),
            follower: Mutex::default(),
            sockets: Sockets::default(),
            counters,
            scrapes: Scrapes::default(),
            guest_exits: Exits::default(),
        })
    }

    /// With the runtime options that came with `start`, for a pod of the sandbox API.
    pub fn with_options(mut self, options: Option<(String, Vec<u8>)>) -> Self {
        self.options = options;
        self
    }

    /// The sandbox's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is counted of this shim.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Tells the pod's figures at a socket in its directory from now on. A pod without them is a pod.
    pub fn tell_figures(self: &Arc<Self>) {
        let path = self.dir.join(SOCKET);
        let listener = record(&self.ledger, Entry::File { path: path.clone() })
            .and_then(|()| http::listen(&path).map_err(|e| Fault::internal("listen", &e)));
        match listener {
            Ok(listener) => {
                let host = self.clone();
                tasks::spawn(http::serve(listener, Box::new(move || Box::pin(host.clone().page()))));
            }
            Err(fault) => warn!("metrics are not told at {}: {fault}", path.display()),
        }
    }

    /// Lets root of this host run programs in the guest from now on. A pod without is a pod.
    fn open_guest(&self, agent: &Agent) {
        let path = self.dir.join(guest_exec::SOCKET);
        let listener = record(&self.ledger, Entry::File { path: path.clone() })
            .and_then(|()| http::listen(&path).map_err(|e| Fault::internal("listen", &e)));
        match listener {
            Ok(listener) => {
                let (agent, hub, exits) = (agent.clone(), self.hub.clone(), self.guest_exits.clone());
                tasks::spawn(guest_exec::door::serve(listener, agent, hub, exits));
            }
            Err(fault) => warn!("no program can be run in the guest by {}: {fault}", path.display()),
        }
    }

    /// Which sandbox this is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The machine, once there is one.
    pub fn machine(&self) -> Option<MachineFacts> {
        lock(&self.ready).as_ref().map(|r| r.facts.clone())
    }

    /// Stops feeding a process's stdin.
    pub fn close_stdin(&self, key: &ProcessKey) {
        self.hub.close_stdin(key);
    }

    /// Ends the machine; its end will be told as an input.
    pub fn kill_machine(&self, why: &str) {
        if let Some(ready) = lock(&self.ready).as_ref() {
            error!("killing the machine: {why}");
            ready.running.kill(why);
        }
    }

    /// Carries out one job to its end.
    pub async fn run(self: Arc<Self>, job: Job) -> Done {
        match job {
            Job::Boot(request) => Done::Boot(self.boot(&request).await),
            Job::PlanPod(create) => Done::PlanPod(info_span!("plan").in_scope(|| self.plan_pod(&create))),
            Job::BootPod => Done::Boot(self.boot_pod().await),
            Job::Halt => {
                self.halt().await;
                Done::Halt
            }
            Job::Prepare(request) => {
                let id = request.id.clone();
                Done::Prepare(id, self.prepare(*request).instrument(info_span!("prepare")).await)
            }
            Job::GuestCreate(id) => {
                let result = self.guest_create(&id).instrument(info_span!("create")).await;
                Done::GuestCreate(id, self.explained(result).await)
            }
            Job::GuestStart(id) => {
                let result = self.guest_start(&id).instrument(info_span!("exec_command")).await;
                Done::GuestStart(id, self.explained(result).await)
            }
            Job::GuestExec { key, io, process, size } => {
                let result = self.guest_exec(&key, &io, process, size).instrument(info_span!("exec")).await;
                Done::GuestExec(key, self.explained(result).await)
            }
            Job::Release { container, guest } => {
                self.release(&container, guest).await;
                Done::Release(container)
            }
            Job::Fit => {
                self.fit().await;
                Done::Fit
            }
            Job::Ask(ticket, ask) => {
                let result = self.ask(ask.clone()).await;
                Done::Ask(ticket, ask, result)
            }
            Job::Teardown => Done::Teardown(self.teardown().instrument(info_span!("teardown")).await),
        }
    }

    /// What the guest answered; where its machine ended meanwhile, with the reason of that.
    async fn explained<T>(&self, result: Result<T, Fault>) -> Result<T, Fault> {
        let ended = lock(&self.ready).as_ref().map(|ready| ready.running.ended());
        match (result, ended) {
            (Err(fault), Some(ended)) => Err(machine::explained(fault, ended).await),
            (result, _) => result,
        }
    }

    fn agent(&self) -> Result<Agent, Fault> {
        lock(&self.ready)
            .as_ref()
            .and_then(|r| r.agent.clone())
            .ok_or_else(|| Fault::new(Kind::Unavailable, "the sandbox has no running machine"))
    }

    /// A sandbox that cannot be counted still runs: accounting is not isolation.
    fn make_cgroup(&self, path: &str) -> Option<String> {
        for part in cgroup::missing(path) {
            record(&self.ledger, Entry::Cgroup { path: part }).ok()?;
        }
        kill_point!(CgroupRecorded);
        match fail_point!(CgroupMake, cgroup::create(path).map_err(|e| Fault::of(Kind::Internal, &e))) {
            Ok(()) => {
                kill_point!(CgroupMade);
                *lock(&self.cgroup) = Some(path.to_owned());
                Some(path.to_owned())
            }
            Err(error) => {
                warn!("the sandbox is not counted: {}", chain(&error));
                None
            }
        }
    }

    async fn teardown(&self) -> Result<(), Fault> {
        let stand_ins = std::mem::take(&mut *lock(&self.stand_ins));
        for stand_in in stand_ins.into_values() {
            stand_in.stop().await;
        }
        let ready = lock(&self.ready).take();
        if let Some(ready) = ready {
            let alive = ready.running.ended().borrow().is_none();
            if let Some(agent) = ready.agent.filter(|_| alive) {
                // Only to write everything out; the machine goes either way.
                kill_point!(TeardownGuest);
                let _ = tokio::time::timeout(GOODBYE, agent.shutdown()).await;
            }
            ready.running.stop("the sandbox ends").await;
        }
        fail_point!(TeardownHost);
        let ledger = lock(&self.ledger).take();
        let Some(ledger) = ledger else { return Ok(()) };
        match tokio::task::spawn_blocking(move || ledger.release_all()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                error!("{}", chain(&error));
                Err(Fault::of(Kind::Internal, &error))
            }
            Err(error) => Err(Fault::internal("take the sandbox back", &error)),
        }
    }
}

/// Does something that blocks for a moment; `doing` names it should it panic.
async fn blocking<T: Send + 'static>(
    doing: &str,
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(Fault::internal(doing, &e)))
}
