//! The containers of a sandbox: their files on the host, their lives in the guest, what is asked of them.
//! Knows the agent and the share; the machine is there, or is not.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use bulkhead_proto::agent::{self, GuestProcess, HostSocket};
use tracing::{Instrument, error, info_span, warn};

use super::{
    super::{
        model::*,
        stand_in::{Arrival, StandIn, arrived},
    },
    Host, POD_DELETED, blocking,
    follow::{catch_up, followed},
    lock, record,
    wanted::load_spec,
};
use crate::{
    cgroup,
    error::{Fault, Kind, chain},
    guest::{Agent, Files},
    hooks,
    ids::{ContainerId, ProcessKey},
    ledger::{self, Entry},
    logger::LoggerContext,
    plan::{self, Bind, ContainerPlan, Limits, Role},
    process,
    stdio::Tokens,
    storage::{self, Facts, MemoryVolume, PodFiles, Share, Shown, Volume, find_sockets},
};

/// Below a sandbox's directory: the empty root of what stands for a pod.
const NO_ROOT: &str = "void";

/// No process of the host has a pid from here on (`PID_MAX_LIMIT` of include/linux/threads.h, 64 bits). Processes
/// of the guest are told beyond it, by their pid in the guest: whoever looks such a pid up on the host must find
/// nothing, not a process that happens to have the same number.
const BEYOND_THE_HOST: u32 = 4 << 20;

/// A container whose files are in the share.
#[derive(Clone)]
pub(super) struct Prepared {
    plan: ContainerPlan,
    /// As its hooks are told of it.
    subject: hooks::Subject,
    io: Io,
    /// What of its bind mounts the host exchanges as a whole.
    volumes: Vec<Volume>,
    /// The numbers of those that are sockets.
    sockets: Vec<usize>,
    /// Where the guest finds those that containers may have together, by their numbers.
    places: HashMap<usize, PathBuf>,
    /// Those that the guest has in its own memory.
    memory: Vec<MemoryVolume>,
}

/// What there is to know of a container's files when they are shared.
#[derive(Default)]
struct SharedFiles {
    /// Where the guest finds each of the bind mounts, by their numbers.
    shown: Vec<(usize, Shown)>,
    /// Those that the host exchanges as a whole.
    volumes: Vec<Volume>,
}

impl Prepared {
    /// What it is to its pod.
    pub(super) fn role(&self) -> Role {
        self.plan.role
    }
}

impl Host {
    pub(super) async fn prepare(&self, request: CreateRequest) -> Result<Role, Fault> {
        let spec = load_spec(&request.bundle)?;
        let mut plan = plan::container(&request.id, spec)?;
        let role = plan.role;
        if lock(&self.pod).is_some() {
            PodFiles::new(&self.dir).add_to(&request.id, &mut plan);
        }
        let (mut volumes, mut sockets, mut places) = (Vec::new(), Vec::new(), HashMap::new());
        let mut memory = Vec::new();
        // Nothing runs in the root of a container that only stands for its pod.
        if role != Role::Sandbox {
            let files = self.share_files(&request, &plan).await?;
            volumes = files.volumes;
            for (slot, shown) in files.shown {
                match shown {
                    Shown::Own => {}
                    Shown::Mixed => plan.leave_to_host(&request.id, slot),
                    Shown::Socket => sockets.push(slot),
                    Shown::Memory(volume) => memory.push(volume),
                    Shown::At(place) => {
                        plan.is_at(&request.id, slot, &place);
                        places.insert(slot, place);
                    }
                }
            }
        }
        let subject = hooks::Subject {
            id: request.id.to_string(),
            bundle: request.bundle,
            annotations: plan.guest_spec.annotations().clone().unwrap_or_default(),
        };
        let prepared = Prepared { plan, subject, io: request.io, volumes, sockets, places, memory };
        lock(&self.prepared).insert(request.id, prepared);
        Ok(role)
    }

    async fn share_files(&self, request: &CreateRequest, plan: &ContainerPlan) -> Result<SharedFiles, Fault> {
        let (id, rootfs) = (request.id.clone(), request.rootfs.clone());
        // With mounts the root is where containerd will unmount it; without, it is what the spec names.
        let root = request.bundle.join(if rootfs.is_empty() { &plan.root_path } else { Path::new("rootfs") });
        let (binds, read_only) = (plan.binds.clone(), plan.root_read_only);
        let points = plan.mount_points();
        let share = Share::new(self.dir.join("share"));
        let (ledger, places) = (self.ledger.clone(), self.places.clone());
        // Mounting may block on the host's storage; the driver must not.
        let work = tokio::task::spawn_blocking(move || {
            let mut guard = lock(&ledger);
            let ledger = guard
                .as_mut()
                .ok_or_else(|| Fault::new(Kind::Unavailable, "the sandbox is being taken back"))?;
            let is_folder = |slot: usize| binds.get(slot).is_none_or(|bind| bind.source.is_dir());
            let points: Vec<_> =
                points.into_iter().map(|(point, bind)| (point, bind.is_none_or(is_folder))).collect();
            share
                .add_root(ledger, &id, &root, &rootfs, read_only, &points)
                .map_err(|e| Fault::of(Kind::Internal, &e))?;
            let mut places = lock(&places);
            let mut files = SharedFiles::default();
            for bind in &binds {
                // Of what the host exchanges as a whole each container has a copy.
                let volume = Volume::of(bind);
                let added = share.add_bind(ledger, &mut places, &id, bind, volume.is_some());
                let added = added.map_err(|e| Fault::of(Kind::InvalidArgument, &e))?;
                files.volumes.extend(volume.filter(|_| added == Shown::Own));
                files.shown.push((bind.slot, added));
            }
            Ok(files)
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

    /// Makes the container in the guest and its stand-in on the host; answers the pid of the latter.
    pub(super) async fn guest_create(&self, id: &ContainerId) -> Result<i32, Fault> {
        let agent = self.agent()?;
        let (hooks, subject, io, console, limits, spec, network, disks, volumes, binds, sockets, memory) = {
            let prepared = lock(&self.prepared);
            let p = prepared
                .get(id)
                .ok_or_else(|| Fault::new(Kind::Internal, format!("{id} is not prepared")))?;
            let spec =
                serde_json::to_vec(&p.plan.guest_spec).map_err(|e| Fault::internal("write the spec", &e))?;
            (
                p.plan.hooks.clone(),
                p.subject.clone(),
                p.io.clone(),
                p.plan.console,
                Limits::of(&p.plan.guest_spec),
                spec,
                p.plan.network.clone(),
                p.plan.disks.clone(),
                p.volumes.clone(),
                p.plan.binds.clone(),
                (p.sockets.clone(), p.places.clone()),
                p.memory.iter().map(|volume| in_memory(id, volume)).collect(),
            )
        };
        let disks = self.give_disks(id, &disks).await?;
        let pod = lock(&self.network).clone();
        if let Some(pod) = pod {
            blocking("look at the pod's network", move || pod.check_joins(network.as_deref())).await?;
        }
        if !hooks.poststop.is_empty() {
            let state = subject.state("stopped", 0);
            let poststop = hooks.poststop;
            record(&self.ledger, Entry::Hooks { poststop, state, container: Some(id.to_string()) })?;
        }
        let (pid, mut arrival) = self.stand_in(id)?;
        fail_point!(CreateHooks);
        if !hooks.create.is_empty() {
            // They look where its pid leads.
            arrived(&mut arrival).await?;
            let hooked = hooks::run(&hooks.create, &subject.state("created", pid)).await;
            hooked.map_err(|why| Fault::new(Kind::Internal, why))?;
        }
        if self.stands_for_pod(id) {
            // It has no output that would have to end before its own end is told.
            let _ = self.inputs.send(Input::StreamsClosed(ProcessKey::init(id)));
            arrived(&mut arrival).await?;
            return Ok(pid);
        }
        self.make_room(id, limits).await?;
        let key = ProcessKey::init(id);
        let tokens = self.open_streams(&key, &io).await?;
        let volumes = self.follow(id, volumes, &agent);
        let followed = volumes.iter().map(|volume| followed(id, volume)).collect();
        let sockets = self.give_sockets(id, binds, sockets).await?;
        let files = Files { disks, followed, sockets, memory };
        let created = fail_point!(CreateStreams, agent.create(id, spec, &io, tokens, console, files).await);
        if created.is_err() {
            self.hub.forget(&key);
        }
        created?;
        catch_up(id, &volumes, &agent).await;
        fail_point!(CreateGuest);
        arrived(&mut arrival).await?;
        Ok(pid)
    }

    /// Finds the sockets of the host in a container's bind mounts, some of which are `sockets` themselves, and lets it
    /// connect to them.
    async fn give_sockets(
        &self,
        id: &ContainerId,
        binds: Vec<Bind>,
        (sockets, places): (Vec<usize>, HashMap<usize, PathBuf>),
    ) -> Result<Vec<HostSocket>, Fault> {
        let patterns = self.sockets.patterns();
        if patterns.is_empty() && sockets.is_empty() {
            return Ok(Vec::new());
        }
        let mut found = blocking("look for sockets in the container's volumes", move || {
            find_sockets(&patterns, &binds, &sockets).map_err(|e| Fault::of(Kind::InvalidArgument, &e))
        })
        .await?;
        let message = |socket: &storage::HostSocket| {
            let place = places.get(&socket.slot).cloned();
            let source = place.unwrap_or_else(|| plan::in_share(id, socket.slot)).display().to_string();
            let below = socket.below.to_str()?.to_owned();
            let Facts { mode, uid, gid } = socket.facts;
            Some(HostSocket { source, below, mode, uid, gid, ..Default::default() })
        };
        // protobuf's texts are UTF-8, as paths in a specification are.
        found.retain(|socket| message(socket).is_some());
        let told = found.iter().filter_map(message).collect();
        self.sockets.give(id, found);
        Ok(told)
    }

    /// Opens the host's ends of a process's streams. A logging program must not outlive a shim that is killed: what
    /// it waits for may never come.
    async fn open_streams(&self, key: &ProcessKey, io: &Io) -> Result<Tokens, Fault> {
        let opened = self.hub.open(key, io, &self.logger(&key.container)).await;
        let tokens = opened.map_err(|e| Fault::of(Kind::InvalidArgument, &e))?;
        if let Some(pid) = self.hub.logger_pid(key)
            && let Ok(Some(start_time)) = process::start_time(pid)
        {
            let (name, container) = ("logging program".into(), Some(key.container.to_string()));
            record(&self.ledger, Entry::Process { name, pid, start_time, container })?;
        }
        Ok(tokens)
    }

    /// Starts the process of the host that stands for the container.
    fn stand_in(&self, id: &ContainerId) -> Result<(i32, Arrival), Fault> {
        let failed = |e: io::Error| Fault::internal("start the process that stands for the container", &e);
        let (root, command) = match lock(&self.prepared).get(id) {
            // Nobody has anything to look for in the root of a pod.
            Some(p) if p.plan.role == Role::Sandbox => (self.dir.join(NO_ROOT), Vec::new()),
            prepared => {
                let process = prepared.and_then(|p| p.plan.guest_spec.process().as_ref());
                let args = process.and_then(|p| p.args().clone()).unwrap_or_default();
                (Share::new(self.dir.join("share")).root(id), args)
            }
        };
        if root.ends_with(NO_ROOT) {
            std::fs::create_dir_all(&root).map_err(failed)?;
        }
        let network = lock(&self.network).clone();
        let network = network.ok_or_else(|| Fault::new(Kind::Unavailable, "the pod has no network"))?;
        let network = network.namespace().map_err(failed)?;
        let (stand_in, arrival) =
            StandIn::start(id, &command, root, network, self.inputs.clone()).map_err(failed)?;
        let (pid, start_time) = (stand_in.pid(), stand_in.start_time());
        let container = Some(id.to_string());
        record(&self.ledger, Entry::Process { name: "stand-in".into(), pid, start_time, container })?;
        if let Some(path) = lock(&self.cgroup).clone()
            && let Err(error) = cgroup::join(&path, pid)
        {
            warn!(pid, "the stand-in is not counted to the sandbox: {}", chain(&error));
        }
        lock(&self.stand_ins).insert(id.clone(), stand_in);
        Ok((pid, arrival))
    }

    /// The pid of the container for the host; 0 for one that has none.
    fn pid(&self, id: &ContainerId) -> i32 {
        lock(&self.stand_ins).get(id).map_or(0, StandIn::pid)
    }

    pub(super) async fn guest_start(&self, id: &ContainerId) -> Result<(), Fault> {
        fail_point!(StartNetwork);
        // Hooks and plugins may have given the pod its network since it was created.
        self.refresh_network().instrument(info_span!("network")).await?;
        if !self.stands_for_pod(id) {
            fail_point!(StartGuest);
            self.agent()?.start(id).await?;
            fail_point!(StartDone);
        }
        let (hooks, subject) = match lock(&self.prepared).get(id) {
            Some(p) => (p.plan.hooks.poststart.clone(), p.subject.clone()),
            None => return Ok(()),
        };
        // The specification says of poststart: an error is told, the lifecycle goes on.
        if let Err(why) = hooks::run(&hooks, &subject.state("running", self.pid(id))).await {
            warn!("poststart {why}");
        }
        Ok(())
    }

    pub(super) async fn guest_exec(
        &self,
        key: &ProcessKey,
        io: &Io,
        process: Opaque,
        size: Option<(u32, u32)>,
    ) -> Result<(), Fault> {
        if self.stands_for_pod(&key.container) {
            return Err(no_process(&key.container, "run a process in"));
        }
        let agent = self.agent()?;
        let tokens = self.open_streams(key, io).await?;
        let started = fail_point!(ExecStreams, agent.exec(key, process.0, io, tokens, size).await);
        if started.is_err() {
            self.hub.forget(key);
        }
        fail_point!(ExecDone, started)
    }

    pub(super) async fn ask(&self, ask: Ask) -> Result<Reply, Fault> {
        if ask.container().is_some_and(|id| self.stands_for_pod(id)) {
            return self.ask_pod(ask).await;
        }
        let agent = self.agent()?;
        match ask {
            Ask::Signal { key, signal, all } => {
                fail_point!(Signal);
                agent.signal(&key, signal, all).await?;
                fail_point!(Signalled);
            }
            Ask::Pause(id) => agent.pause(&id).await?,
            Ask::Resume(id) => agent.resume(&id).await?,
            Ask::Update(id, resources) => self.update(&id, resources).await?,
            Ask::ResizePty(key, width, height) => agent.resize(&key, width, height).await?,
            Ask::Stats(id) => return Ok(Reply::Stats(agent.stats(&id).await?.files)),
            Ask::PodStats => return Ok(Reply::Stats(self.pod_stats(&agent).await?)),
            Ask::Pids(id) => {
                let processes = agent.pids(&id).await?.processes;
                let init = self.pid(&id).unsigned_abs();
                let pid =
                    |p: &GuestProcess| if p.init { init } else { BEYOND_THE_HOST.saturating_add(p.pid) };
                return Ok(Reply::Pids(processes.into_iter().map(|p| (pid(&p), p.exec_id)).collect()));
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
            Ask::Pids(id) => Ok(Reply::Pids(vec![(self.pid(&id).unsigned_abs(), String::new())])),
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

    pub(super) async fn release(&self, id: &ContainerId, guest: bool) {
        if guest
            && !self.stands_for_pod(id)
            && let Ok(agent) = self.agent()
            && let Err(fault) = fail_point!(ReleaseGuest, agent.delete(id).await)
        {
            warn!(%id, "the guest did not delete the container: {fault}");
        }
        self.take_disks(id, guest).await;
        if let Some(follower) = lock(&self.follower).as_ref() {
            follower.remove(id);
        }
        self.sockets.take_back(id);
        self.hub.forget(&ProcessKey::init(id));
        self.hub.end_loggers(id).await;
        let stand_in = lock(&self.stand_ins).remove(id);
        if let Some(stand_in) = stand_in {
            stand_in.stop().await;
        }
        let (ledger, places, id_there) = (self.ledger.clone(), self.places.clone(), id.clone());
        let share = Share::new(self.dir.join("share"));
        let work = tokio::task::spawn_blocking(move || {
            let Some(ours) = lock(&ledger).as_ref().map(|ledger| ledger.of_container(id_there.as_str()))
            else {
                return Ok(());
            };
            let ours = ours?;
            let left = ledger::release(&ours);
            let Some(ledger) = &mut *lock(&ledger) else { return Ok(()) };
            let forgotten = ledger.forget(&ours, left);
            share.leave_places(ledger, &mut lock(&places), &id_there);
            forgotten
        });
        match work.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => error!(%id, "{}", chain(&error)),
            Err(error) => error!(%id, %error, "taking the container back"),
        }
        kill_point!(ReleaseDone);
        let prepared = lock(&self.prepared).remove(id);
        if prepared.as_ref().is_some_and(|p| p.plan.role == Role::Sandbox)
            && let Err(error) = std::fs::write(self.dir.join(POD_DELETED), "")
        {
            warn!(%error, "{POD_DELETED}");
        }
    }
}

fn in_memory(id: &ContainerId, volume: &MemoryVolume) -> agent::MemoryVolume {
    let folder = |(below, facts): &(PathBuf, Facts)| agent::MemoryFolder {
        below: below.display().to_string(),
        mode: facts.mode,
        uid: facts.uid,
        gid: facts.gid,
        ..Default::default()
    };
    agent::MemoryVolume {
        source: plan::in_share(id, volume.slot).display().to_string(),
        name: volume.name.clone(),
        size_bytes: volume.size,
        folders: volume.folders.iter().map(folder).collect(),
        ..Default::default()
    }
}

fn no_process(id: &ContainerId, verb: &str) -> Fault {
    let text = format!("cannot {verb} container {id}: it stands for its pod and has no process of its own");
    Fault::new(Kind::Unimplemented, text)
}
