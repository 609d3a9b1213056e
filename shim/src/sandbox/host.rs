//! Carries out jobs: launches the machine, speaks with the guest, prepares files, takes all back.
//! Decides nothing: what is done and when comes from the state machine.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use bulkhead_hypervisor::{
    Hypervisor, Journal,
    builtin::{Builtin, BuiltinConfig},
    probe::{self, Acceleration},
    qemu::{Qemu, QemuConfig},
};
use bulkhead_proto::{
    CONTROL_PORT, SHARE_TAG, STREAM_PORT,
    agent::{Network, event::Kind as GuestEvent},
    stream::Token,
};
use bulkhead_vmm_spec::{Bindings, Shape};
use oci_spec::runtime::Spec;
use protobuf::well_known_types::any::Any;
use tokio::sync::mpsc;
use tracing::{Instrument, debug, error, info_span, warn};

use super::{forward, hooks, machine::Running, model::*, network::PodNetwork};
use crate::{
    cgroup,
    config::{Backend, Config},
    error::{Fault, Kind, chain},
    guest::{self, Agent, GuestEvents},
    ids::{ContainerId, ProcessKey},
    ledger::{Entry, Ledger},
    plan::{self, ContainerPlan, Disk, HostFacts, Role, Sizing},
    process,
    stdio::{Hub, LoggerContext},
    storage::{Disks, PodFiles, Share},
    trace,
};

/// How long the guest may take to write out what is left when its sandbox ends. Little can be left: every
/// container was deleted before. With what follows it must stay below the 3 s that containerd gives a
/// Shutdown, after which it calls `delete` for a sandbox that is still being taken back.
const GOODBYE: Duration = Duration::from_millis(500);
/// How long a machine may outlive its agent: a panic takes a moment to be told.
const AGENT_GONE: Duration = Duration::from_secs(2);

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

/// What machine a sandbox is to have.
#[derive(Clone)]
struct Wanted {
    config: Config,
    sizing: Sizing,
    /// Where on the host it is to be counted, as an OCI spec says it.
    cgroup: Option<String>,
    /// Empty for the host's.
    hostname: String,
    /// Of the pod's own namespaces.
    sysctls: HashMap<String, String>,
    /// The network namespace of the host that its links are in; its own if none.
    netns: Option<PathBuf>,
    /// Block devices of the host that it is to have.
    disks: Vec<Disk>,
}

struct Ready {
    running: Running,
    agent: Option<Agent>,
    facts: MachineFacts,
}

struct Prepared {
    plan: ContainerPlan,
    bundle: PathBuf,
    io: Io,
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
    prepared: Mutex<HashMap<ContainerId, Prepared>>,
    /// The pod of the sandbox API, once it is planned.
    pod: Mutex<Option<Wanted>>,
    /// Runtime options that came with `start`: type name and protobuf value.
    options: Option<(String, Vec<u8>)>,
    cgroup: Mutex<Option<String>>,
    disks: Mutex<Disks>,
    network: Mutex<Option<Arc<PodNetwork>>>,
}

/// Records processes in the ledger and counts them to the sandbox.
struct Accounts<'a> {
    ledger: &'a Mutex<Option<Ledger>>,
    cgroup: Option<&'a str>,
}

impl Journal for Accounts<'_> {
    fn process(&self, name: &str, pid: i32, start_time: u64) -> io::Result<()> {
        let entry = Entry::Process { name: name.to_owned(), pid, start_time };
        record(self.ledger, entry).map_err(io::Error::other)?;
        if let Some(path) = self.cgroup
            && let Err(error) = cgroup::join(path, pid)
        {
            warn!(name, pid, "not counted to the sandbox: {}", chain(&error));
        }
        Ok(())
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
    ) -> Result<Self, Fault> {
        let dir = sandbox_dir(&config.state_dir, &identity.namespace, &identity.id);
        let fault = |e: io::Error| Fault::internal(&format!("create {}", dir.display()), &e);
        // What a sandbox of the same name left behind would be mistaken for ours.
        if let Err(error) = crate::ledger::release_left_behind(&dir) {
            warn!("an earlier sandbox of this name: {}", chain(&error));
        }
        std::fs::create_dir_all(&dir).map_err(fault)?;
        std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).map_err(fault)?;
        let mut ledger = Ledger::open(&dir).map_err(|e| Fault::of(Kind::Internal, &e))?;
        let own = Entry::Directory { path: dir.clone(), container: None };
        ledger.record(own).map_err(|e| Fault::of(Kind::Internal, &e))?;
        let pid = std::process::id() as i32;
        let start_time = process::start_time(pid).ok().flatten().unwrap_or(0);
        let shim = Entry::Process { name: "shim".into(), pid, start_time };
        ledger.record(shim).map_err(|e| Fault::of(Kind::Internal, &e))?;
        let hub = Hub::new(inputs.clone());
        Ok(Self {
            identity,
            config,
            config_error,
            dir,
            hub,
            inputs,
            ledger: Arc::new(Mutex::new(Some(ledger))),
            ready: Mutex::default(),
            prepared: Mutex::default(),
            pod: Mutex::default(),
            options: None,
            cgroup: Mutex::default(),
            disks: Mutex::default(),
            network: Mutex::default(),
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
                Done::GuestCreate(id, result)
            }
            Job::GuestStart(id) => {
                let result = self.guest_start(&id).instrument(info_span!("exec_command")).await;
                Done::GuestStart(id, result)
            }
            Job::GuestExec { key, io, process, size } => {
                let result = self.guest_exec(&key, &io, process, size).instrument(info_span!("exec")).await;
                Done::GuestExec(key, result)
            }
            Job::Release { container, guest } => {
                self.release(&container, guest).await;
                Done::Release(container)
            }
            Job::Ask(ticket, ask) => {
                let result = self.ask(ask.clone()).await;
                Done::Ask(ticket, ask, result)
            }
            Job::Teardown => Done::Teardown(self.teardown().instrument(info_span!("teardown")).await),
        }
    }

    fn agent(&self) -> Result<Agent, Fault> {
        lock(&self.ready)
            .as_ref()
            .and_then(|r| r.agent.clone())
            .ok_or_else(|| Fault::new(Kind::Unavailable, "the sandbox has no running machine"))
    }

    /// The machine of the sandbox's first container.
    async fn boot(&self, request: &CreateRequest) -> Result<i32, Fault> {
        let wanted = info_span!("plan").in_scope(|| self.plan_machine(request))?;
        self.launch(wanted).await
    }

    /// The machine of the pod that was planned.
    async fn boot_pod(&self) -> Result<i32, Fault> {
        let planned = lock(&self.pod).clone();
        let wanted = planned.ok_or_else(|| Fault::new(Kind::Internal, "the pod is not planned"))?;
        self.launch(wanted).await
    }

    async fn launch(&self, wanted: Wanted) -> Result<i32, Fault> {
        let acquire = info_span!("acquire").entered();
        let path = cgroup::path_for(wanted.cgroup.as_deref(), &self.identity.namespace, &self.identity.id);
        let cgroup = self.make_cgroup(&path);
        let share = self.dir.join("share");
        std::fs::create_dir_all(&share)
            .map_err(|e| Fault::internal(&format!("create {}", share.display()), &e))?;
        let vsock = self.dir.join("vsock");
        let control = guest::listen(&vsock, CONTROL_PORT).map_err(|e| Fault::of(Kind::Internal, &e))?;
        let streams = guest::listen(&vsock, STREAM_PORT).map_err(|e| Fault::of(Kind::Internal, &e))?;
        tokio::spawn(self.hub.clone().serve(streams));
        drop(acquire);
        let (path, spare) = (wanted.netns.clone(), wanted.config.network.spare_cards);
        let network =
            blocking("look at the pod's network", move || PodNetwork::acquire(path.as_deref(), spare));
        let network = Arc::new(network.instrument(info_span!("network")).await?);
        *lock(&self.network) = Some(network.clone());

        let Wanted { config, sizing, .. } = &wanted;
        let guest_files = config.resolve_guest().map_err(config_fault)?;
        let hypervisor = choose(config)?;
        let mut shape = Shape {
            vcpus: sizing.vcpus,
            max_vcpus: sizing.vcpus,
            memory: sizing.memory,
            growth: bulkhead_vmm_spec::SizeMib(0),
            cmdline: config.hypervisor.kernel_params.clone(),
            share_tag: Some(SHARE_TAG.to_owned()),
            blocks: Vec::new(),
            nets: Vec::new(),
            spare_slots: 0,
        };
        let mut bindings = Bindings {
            kernel: guest_files.kernel,
            initrd: guest_files.image,
            share: Some(share),
            vsock,
            blocks: Vec::new(),
            nets: Vec::new(),
            netns: None,
            run_dir: self.dir.clone(),
        };
        network.equip(&mut shape, &mut bindings);
        let disks = Disks::find(wanted.disks.clone()).map_err(|e| Fault::of(Kind::InvalidArgument, &e))?;
        disks.equip(&mut shape, &mut bindings);
        *lock(&self.disks) = disks;
        let accounts = Accounts { ledger: &self.ledger, cgroup: cgroup.as_deref() };
        let launch = hypervisor.launch(&shape, &bindings, &accounts).instrument(info_span!("launch"));
        let machine = launch.await.map_err(|e| Fault::of(Kind::FailedPrecondition, &e))?;
        let running = Running::watch(machine, cgroup.clone(), self.inputs.clone());
        let facts = MachineFacts {
            vmm_pid: running.pid(),
            backend: hypervisor.name(),
            memory_mib: sizing.memory.0,
            vcpus: sizing.vcpus,
        };
        let mut ended = running.ended();
        *lock(&self.ready) = Some(Ready { running, agent: None, facts: facts.clone() });

        let limit = Duration::from_secs(config.hypervisor.boot_timeout_seconds);
        let up = tokio::select! {
            up = self.meet(&control, &wanted) => up,
            end = ended.wait_for(Option::is_some) => {
                let reason = end.ok().and_then(|e| e.as_ref().map(|e| e.reason.clone())).unwrap_or_default();
                Err(Fault::new(Kind::Unavailable, format!("the machine ended before its agent reported: {reason}")))
            }
            () = tokio::time::sleep(limit) => Err(Fault::new(
                Kind::DeadlineExceeded,
                format!(
                    "the guest's agent did not report within {} s (hypervisor.boot_timeout_seconds)",
                    limit.as_secs()
                ),
            )),
        };
        if let Err(fault) = up {
            self.kill_machine("it did not boot");
            return Err(fault);
        }
        Ok(facts.vmm_pid)
    }

    /// File, runtime options, annotations: each overrides the one before.
    fn plan_machine(&self, request: &CreateRequest) -> Result<Wanted, Fault> {
        let spec = load_spec(&request.bundle)?;
        // Once more where its files are prepared, but what is refused needs no machine.
        plan::container(&request.id, spec.clone())?;
        let none = HashMap::new();
        let config =
            self.configure(request.options.as_ref(), spec.annotations().as_ref().unwrap_or(&none))?;
        let sizing = plan::machine(&config, &spec, &host_facts())?;
        Ok(Wanted {
            config,
            sizing,
            cgroup: cgroups_path(&spec).map(str::to_owned),
            hostname: spec.hostname().clone().unwrap_or_default(),
            sysctls: plan::pod_sysctls(&spec),
            netns: plan::network(&spec),
            disks: plan::disks(&spec),
        })
    }

    fn plan_pod(&self, create: &CreatePod) -> Result<(), Fault> {
        let pod = plan::PodConfig::read(&create.config)?;
        let config = self.configure(self.options.as_ref(), &pod.annotations)?;
        let sizing = plan::pod(&config, &pod, &host_facts())?;
        let own = own_hostname();
        let hostname = if pod.hostname.is_empty() { own } else { pod.hostname.clone() };
        let files = PodFiles::new(&self.dir);
        files.write(&hostname, &pod.dns)?;
        let cgroup = Some(pod.cgroup_parent).filter(|parent| !parent.is_empty());
        let cgroup = cgroup.map(|parent| cgroup::below(&parent, &self.identity.id));
        let netns = Some(create.netns.clone()).filter(|path| !path.as_os_str().is_empty());
        let sysctls = pod.sysctls;
        // The sandbox API names a pod before its containers, hence before their devices.
        let disks = Vec::new();
        *lock(&self.pod) = Some(Wanted { config, sizing, cgroup, hostname, sysctls, netns, disks });
        Ok(())
    }

    fn configure(
        &self,
        options: Option<&(String, Vec<u8>)>,
        annotations: &HashMap<String, String>,
    ) -> Result<Config, Fault> {
        if let Some(reason) = &self.config_error {
            return Err(Fault::new(Kind::FailedPrecondition, reason.clone()));
        }
        let mut config = self.config.clone();
        if let Some((type_url, value)) = options {
            let options = Any { type_url: type_url.clone(), value: value.clone(), ..Default::default() };
            config = config.with_runtime_options(&options).map_err(config_fault)?;
        }
        config.with_annotations(annotations).map_err(config_fault)
    }

    /// A sandbox that cannot be counted still runs: accounting is not isolation.
    fn make_cgroup(&self, path: &str) -> Option<String> {
        for part in cgroup::missing(path) {
            record(&self.ledger, Entry::Cgroup { path: part }).ok()?;
        }
        match cgroup::create(path) {
            Ok(()) => {
                *lock(&self.cgroup) = Some(path.to_owned());
                Some(path.to_owned())
            }
            Err(error) => {
                warn!("the sandbox is not counted: {}", chain(&error));
                None
            }
        }
    }

    /// Waits for the agent's hello, configures the guest and listens to its events.
    async fn meet(&self, control: &tokio::net::UnixListener, wanted: &Wanted) -> Result<(), Fault> {
        let config = &wanted.config;
        let timeout = Duration::from_secs(config.agent.request_timeout_seconds);
        // The taps are there by now. Meanwhile the guest boots.
        let joined = tokio::spawn(self.joined());
        let joined = async { joined.await.unwrap_or_else(|e| Err(Fault::internal("join the links", &e))) };
        let (agent, hello) = Agent::accept(control, timeout)
            .instrument(info_span!("hello"))
            .await
            .map_err(|e| Fault::of(Kind::Unavailable, &e))?;
        if let Some(path) = &config.trace_file {
            let now = SystemTime::now();
            trace::append(path, "kernel", now - Duration::from_nanos(hello.uptime_nanos), now);
        }
        debug!(kernel = hello.kernel, agent = hello.agent, "guest is up");
        let events = agent.events().await?;
        // A container without a name of its own has the host's, as with runc.
        let own = own_hostname();
        let hostname = if wanted.hostname.is_empty() { &own } else { &wanted.hostname };
        let network = joined.instrument(info_span!("join")).await?;
        let first = network.clone().unwrap_or_default();
        let configured = agent.configure(hostname, wanted.sysctls.clone(), first);
        let guest = configured.instrument(info_span!("configure")).await?;
        if let (Some(pod), Some(network)) = (lock(&self.network).as_ref(), network) {
            pod.was_told(network);
        }
        self.forward_ports(&agent).await;
        debug!(controllers = ?guest.controllers, "guest is configured");
        if let Some(ready) = lock(&self.ready).as_mut() {
            ready.agent = Some(agent);
            tokio::spawn(listen(events, self.hub.clone(), self.inputs.clone(), ready.running.ended()));
        }
        Ok(())
    }

    /// Joins links that are new, and answers the network if the guest has another one.
    fn joined(&self) -> impl Future<Output = Result<Option<Network>, Fault>> + use<> {
        let (network, ledger) = (lock(&self.network).clone(), self.ledger.clone());
        async move {
            let Some(network) = network else { return Ok(None) };
            blocking("look at the pod's network", move || network.refresh(&ledger)).await
        }
    }

    /// Tells the guest of links and of what is set for them, if that has changed.
    async fn refresh_network(&self) -> Result<(), Fault> {
        let Some(network) = self.joined().await? else { return Ok(()) };
        self.agent()?.set_network(&network).await?;
        if let Some(pod) = lock(&self.network).as_ref() {
            pod.was_told(network);
        }
        Ok(())
    }

    /// Lets connections to the pod's `localhost` through. A pod without is a pod: only forwarders dial that.
    async fn forward_ports(&self, agent: &Agent) {
        let Some(network) = lock(&self.network).clone() else { return };
        match blocking("listen in the pod's network", move || network.forwarder()).await {
            Ok(Some(forwarder)) => {
                tokio::spawn(forward::serve(forwarder, agent.clone(), self.hub.clone()));
            }
            Ok(None) => {}
            Err(fault) => warn!("ports of the pod cannot be forwarded: {fault}"),
        }
    }

    async fn prepare(&self, request: CreateRequest) -> Result<Role, Fault> {
        let spec = load_spec(&request.bundle)?;
        let mut plan = plan::container(&request.id, spec)?;
        let role = plan.role;
        if lock(&self.pod).is_some() {
            PodFiles::new(&self.dir).add_to(&request.id, &mut plan);
        }
        // Nothing runs in the root of a container that only stands for its pod.
        if role != Role::Sandbox {
            self.share_files(&request, &plan).await?;
        }
        let prepared = Prepared { plan, bundle: request.bundle, io: request.io };
        lock(&self.prepared).insert(request.id, prepared);
        Ok(role)
    }

    async fn share_files(&self, request: &CreateRequest, plan: &ContainerPlan) -> Result<(), Fault> {
        let (id, rootfs) = (request.id.clone(), request.rootfs.clone());
        // With mounts the root is where containerd will unmount it; without, it is what the spec names.
        let root = request.bundle.join(if rootfs.is_empty() { &plan.root_path } else { Path::new("rootfs") });
        let (binds, read_only) = (plan.binds.clone(), plan.root_read_only);
        let share = Share::new(self.dir.join("share"));
        let ledger = self.ledger.clone();
        // Mounting may block on the host's storage; the driver must not.
        let work = tokio::task::spawn_blocking(move || {
            let mut guard = lock(&ledger);
            let ledger = guard
                .as_mut()
                .ok_or_else(|| Fault::new(Kind::Unavailable, "the sandbox is being taken back"))?;
            share
                .add_root(ledger, &id, &root, &rootfs, read_only)
                .map_err(|e| Fault::of(Kind::Internal, &e))?;
            for bind in &binds {
                share.add_bind(ledger, &id, bind).map_err(|e| Fault::of(Kind::InvalidArgument, &e))?;
            }
            Ok(())
        });
        work.await.unwrap_or_else(|e| Err(Fault::internal("prepare the container's files", &e)))
    }

    /// Whether this container only stands for its pod: nothing of it is in the guest.
    fn stands_for_pod(&self, id: &ContainerId) -> bool {
        lock(&self.prepared).get(id).is_some_and(|p| p.plan.role == Role::Sandbox)
    }

    fn logger(&self, id: &ContainerId) -> LoggerContext {
        LoggerContext { namespace: self.identity.namespace.clone(), container: id.to_string() }
    }

    async fn guest_create(&self, id: &ContainerId) -> Result<(), Fault> {
        let agent = self.agent()?;
        let (hooks, bundle, io, console, spec, network, disks) = {
            let prepared = lock(&self.prepared);
            let p = prepared
                .get(id)
                .ok_or_else(|| Fault::new(Kind::Internal, format!("{id} is not prepared")))?;
            let spec =
                serde_json::to_vec(&p.plan.guest_spec).map_err(|e| Fault::internal("write the spec", &e))?;
            (
                p.plan.hooks.create.clone(),
                p.bundle.clone(),
                p.io.clone(),
                p.plan.console,
                spec,
                p.plan.network.clone(),
                p.plan.disks.clone(),
            )
        };
        let disks =
            lock(&self.disks).of_container(&disks).map_err(|e| Fault::of(Kind::InvalidArgument, &e))?;
        let pod = lock(&self.network).clone();
        if let Some(pod) = pod {
            blocking("look at the pod's network", move || pod.check_joins(network.as_deref())).await?;
        }
        hooks::run(&hooks, id, "created", self.vmm_pid(), &bundle).await?;
        if self.stands_for_pod(id) {
            // It has no output that would have to end before its own end is told.
            let _ = self.inputs.send(Input::StreamsClosed(ProcessKey::init(id)));
            return Ok(());
        }
        let key = ProcessKey::init(id);
        let tokens =
            self.hub.open(&key, &io, &self.logger(id)).map_err(|e| Fault::of(Kind::InvalidArgument, &e))?;
        let created = agent.create(id, spec, &io, tokens, console, disks).await;
        if created.is_err() {
            self.hub.forget(&key);
        }
        created
    }

    fn vmm_pid(&self) -> i32 {
        self.machine().map_or(0, |m| m.vmm_pid)
    }

    async fn guest_start(&self, id: &ContainerId) -> Result<(), Fault> {
        // Hooks and plugins may have given the pod its network since it was created.
        self.refresh_network().instrument(info_span!("network")).await?;
        if !self.stands_for_pod(id) {
            self.agent()?.start(id).await?;
        }
        let (hooks, bundle) = match lock(&self.prepared).get(id) {
            Some(p) => (p.plan.hooks.poststart.clone(), p.bundle.clone()),
            None => return Ok(()),
        };
        // The specification says of poststart: an error is told, the lifecycle goes on.
        if let Err(fault) = hooks::run(&hooks, id, "running", self.vmm_pid(), &bundle).await {
            warn!("poststart {fault}");
        }
        Ok(())
    }

    async fn guest_exec(
        &self,
        key: &ProcessKey,
        io: &Io,
        process: Vec<u8>,
        size: Option<(u32, u32)>,
    ) -> Result<(), Fault> {
        if self.stands_for_pod(&key.container) {
            return Err(no_process(&key.container, "run a process in"));
        }
        let agent = self.agent()?;
        let tokens = self
            .hub
            .open(key, io, &self.logger(&key.container))
            .map_err(|e| Fault::of(Kind::InvalidArgument, &e))?;
        let started = agent.exec(key, process, io, tokens, size).await;
        if started.is_err() {
            self.hub.forget(key);
        }
        started
    }

    async fn ask(&self, ask: Ask) -> Result<Reply, Fault> {
        if ask.container().is_some_and(|id| self.stands_for_pod(id)) {
            return self.ask_pod(ask).await;
        }
        let agent = self.agent()?;
        match ask {
            Ask::Signal { key, signal, all } => agent.signal(&key, signal, all).await?,
            Ask::Pause(id) => agent.pause(&id).await?,
            Ask::Resume(id) => agent.resume(&id).await?,
            Ask::Update(id, resources) => agent.update(&id, resources).await?,
            Ask::ResizePty(key, width, height) => agent.resize(&key, width, height).await?,
            Ask::Stats(id) => return Ok(Reply::Stats(agent.stats(&id).await?.files)),
            Ask::PodStats => return Ok(Reply::Stats(self.pod_stats(&agent).await?)),
            Ask::Pids(id) => {
                let processes = agent.pids(&id).await?.processes;
                return Ok(Reply::Pids(processes.into_iter().map(|p| (p.pid, p.exec_id)).collect()));
            }
        }
        Ok(Reply::Empty)
    }

    /// What is asked of the container that stands for the pod: it behaves as a pause process would.
    async fn ask_pod(&self, ask: Ask) -> Result<Reply, Fault> {
        match ask {
            Ask::Signal { key, signal, .. } => {
                let status = match signal as i32 {
                    libc::SIGKILL => 128 + signal,
                    libc::SIGTERM | libc::SIGINT => 0,
                    // As the first process of its namespace it would not notice any other.
                    _ => return Ok(Reply::Empty),
                };
                let exit = ExitInfo { status, at: SystemTime::now() };
                let _ = self.inputs.send(Input::GuestExit(key, exit));
                Ok(Reply::Empty)
            }
            Ask::Pids(_) => Ok(Reply::Pids(vec![(self.vmm_pid().unsigned_abs(), String::new())])),
            Ask::Stats(_) | Ask::PodStats => Ok(Reply::Stats(self.pod_stats(&self.agent()?).await?)),
            Ask::Pause(id) => Err(no_process(&id, "pause")),
            Ask::Resume(id) => Err(no_process(&id, "resume")),
            Ask::Update(id, _) => Err(no_process(&id, "update")),
            Ask::ResizePty(key, ..) => Err(no_process(&key.container, "resize a terminal of")),
        }
    }

    /// What the pod costs the host, the machine's overhead included; where it is not counted, what its containers
    /// use in the guest.
    async fn pod_stats(&self, agent: &Agent) -> Result<HashMap<String, Vec<u8>>, Fault> {
        let path = lock(&self.cgroup).clone();
        match path.map(|path| cgroup::figures(&path)).filter(|files| !files.is_empty()) {
            Some(files) => Ok(files),
            None => Ok(agent.pod_stats().await?.files),
        }
    }

    async fn release(&self, id: &ContainerId, guest: bool) {
        if guest
            && !self.stands_for_pod(id)
            && let Ok(agent) = self.agent()
            && let Err(fault) = agent.delete(id).await
        {
            warn!(%id, "the guest did not delete the container: {fault}");
        }
        self.hub.forget(&ProcessKey::init(id));
        let (ledger, name) = (self.ledger.clone(), id.to_string());
        let work = tokio::task::spawn_blocking(move || match lock(&ledger).as_mut() {
            Some(ledger) => ledger.release_container(&name),
            None => Ok(()),
        });
        match work.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => error!(%id, "{}", chain(&error)),
            Err(error) => error!(%id, %error, "taking the container back"),
        }
        let prepared = lock(&self.prepared).remove(id);
        if prepared.as_ref().is_some_and(|p| p.plan.role == Role::Sandbox)
            && let Err(error) = std::fs::write(self.dir.join(POD_DELETED), "")
        {
            warn!(%error, "{POD_DELETED}");
        }
        if let Some(p) = prepared
            && let Err(fault) = hooks::run(&p.plan.hooks.poststop, id, "stopped", 0, &p.bundle).await
        {
            warn!("poststop {fault}");
        }
    }

    /// Ends the machine in order; its end is told as an input.
    async fn halt(&self) {
        if let Ok(agent) = self.agent() {
            let _ = tokio::time::timeout(GOODBYE, agent.shutdown()).await;
        }
        if let Some(ready) = lock(&self.ready).as_ref() {
            ready.running.kill("the pod is stopped");
        }
    }

    async fn teardown(&self) -> Result<(), Fault> {
        let ready = lock(&self.ready).take();
        if let Some(ready) = ready {
            let alive = ready.running.ended().borrow().is_none();
            if let Some(agent) = ready.agent.filter(|_| alive) {
                // Only to write everything out; the machine goes either way.
                let _ = tokio::time::timeout(GOODBYE, agent.shutdown()).await;
            }
            ready.running.stop("the sandbox ends").await;
        }
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

/// Hands the guest's events on, in order, until the guest is gone.
async fn listen(
    mut events: GuestEvents,
    hub: Hub,
    inputs: mpsc::UnboundedSender<Input>,
    mut ended: tokio::sync::watch::Receiver<Option<MachineEnd>>,
) {
    while let Some(event) = events.next().await {
        let Some(kind) = event.kind else { continue };
        match kind {
            GuestEvent::Exit(exit) => {
                let Ok(key) = ProcessKey::parse(&exit.container_id, &exit.exec_id) else { continue };
                // Told with the host's clock: the guest's may be off, and is not trusted.
                let info = ExitInfo { status: exit.status & 0xff, at: SystemTime::now() };
                let _ = inputs.send(Input::GuestExit(key, info));
            }
            GuestEvent::Oom(oom) => {
                if let Ok(id) = ContainerId::parse(&oom.container_id) {
                    let _ = inputs.send(Input::GuestOom(id));
                }
            }
            GuestEvent::StreamEnd(end) => {
                if let Ok(token) = Token::try_from(end.token.as_slice()) {
                    hub.ended(&token, end.total_bytes);
                }
            }
            _ => {}
        }
    }
    // The agent is the guest's PID 1: without it there is no guest. Normally the machine's end follows.
    let gone = tokio::time::timeout(AGENT_GONE, ended.wait_for(Option::is_some)).await;
    if gone.is_err() {
        let _ = inputs.send(Input::AgentLost);
    }
}

/// A file in the sandbox's directory: the pod was deleted in order, and the shim ends with its last container.
/// containerd calls `delete` for the pod all the same, while it deletes its containers.
pub const POD_DELETED: &str = "pod-deleted";

/// Added to the state directory's name: a file beside it that remembers, until the host's next boot, that its
/// processor virtualises. Not in it, for that is empty when there is no pod.
const ACCELERATION: &str = ".acceleration";

/// The machine that the configuration asks for, and that this host can run.
fn choose(config: &Config) -> Result<Box<dyn Hypervisor>, Fault> {
    let virtiofsd = config.resolve_virtiofsd().map_err(config_fault)?;
    if uses_kvm(config)? {
        let vmm = config.resolve_vmm().map_err(config_fault)?;
        return Ok(Box::new(Builtin::new(BuiltinConfig { vmm, virtiofsd })));
    }
    let qemu = config.resolve_qemu().map_err(config_fault)?;
    let vsock = config.resolve_vhost_device_vsock().map_err(config_fault)?;
    Ok(Box::new(Qemu::new(QemuConfig { qemu, virtiofsd, vsock, ..QemuConfig::default() })))
}

/// Whether pods run on KVM: opening /dev/kvm proves nothing, so a guest is asked.
fn uses_kvm(config: &Config) -> Result<bool, Fault> {
    let backend = config.hypervisor.backend;
    if backend == Backend::Emulation {
        return Ok(false);
    }
    let mut memory = config.state_dir.as_os_str().to_owned();
    memory.push(ACCELERATION);
    match (probe::acceleration_remembered(Path::new(&memory)), backend) {
        (Acceleration::Hardware { .. }, _) => Ok(true),
        (Acceleration::Emulated { .. }, Backend::Auto) => Ok(false),
        (Acceleration::Emulated { why }, _) => Err(Fault::new(
            Kind::FailedPrecondition,
            format!(
                "hypervisor.backend = \"kvm\", but this machine does not virtualise: {why}; use \"auto\" or \"emulation\""
            ),
        )),
    }
}

fn host_facts() -> HostFacts {
    HostFacts { cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u32) }
}

fn own_hostname() -> String {
    nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn no_process(id: &ContainerId, verb: &str) -> Fault {
    let text = format!("cannot {verb} container {id}: it stands for its pod and has no process of its own");
    Fault::new(Kind::Unimplemented, text)
}

fn config_fault(error: crate::config::ConfigError) -> Fault {
    Fault::of(Kind::FailedPrecondition, &error)
}

fn load_spec(bundle: &Path) -> Result<Spec, Fault> {
    let path = bundle.join("config.json");
    let text = std::fs::read(&path).map_err(|e| Fault::internal(&format!("read {}", path.display()), &e))?;
    serde_json::from_slice(&text)
        .map_err(|e| Fault::new(Kind::InvalidArgument, format!("{}: {e}", path.display())))
}

fn cgroups_path(spec: &Spec) -> Option<&str> {
    spec.linux().as_ref()?.cgroups_path().as_ref()?.to_str()
}
