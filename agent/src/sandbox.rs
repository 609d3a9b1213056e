//! The containers of the pod: what state each is in, and what each request does to it.
//! Knows containers and their processes; must not know ttrpc, nor how a container is made.
//!
//! ```text
//!            create            start
//!   nothing ───────▶ created ───────▶ running ◀──pause/resume──▶ paused
//!                       │                │                         │
//!                       └───── exit ─────┴────▶ stopped ◀── exit ──┘
//!                                                 │ delete
//!                                                 ▼ nothing
//! ```

mod debug;
mod ends;

use std::{
    collections::HashMap,
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bulkhead_proto::{
    MOST_CONNECTIONS,
    agent::{
        ConfigureRequest, ConfigureResponse, ConnectedRequest, CreateContainerRequest, ExecRequest,
        FollowVolumeRequest, ForwardRequest, GuestProcess, Network, ResizePtyRequest, ResizeRequest,
        ResizeResponse, SignalRequest, Stdio, UpdateRequest,
    },
};
use tokio::{
    sync::{Notify, Semaphore},
    task::AbortHandle,
    time::timeout,
};

use crate::{
    cgroup, configure,
    disks::Disks,
    error::{Doing, Error, Result},
    events::Events,
    forward,
    launcher::{Create, LastMile, LaunchError, Launched, Launcher, Size},
    limits, machine,
    memory::Memory,
    net, netns, podns,
    reaper::{Key, Reaper},
    sockets::Sockets,
    spec::{self, Guest},
    stats,
    stdio::{self, Terminal},
    users::Users,
    volumes::{self, Copies},
};

/// How long the kernel may take to freeze a container, or to end one that was killed.
const DEADLINE: Duration = Duration::from_secs(10);

/// All containers of the pod.
pub(crate) struct Sandbox {
    launcher: Box<dyn Launcher>,
    events: Events,
    state: Mutex<State>,
    /// Wakes those who wait for the end of a process.
    ended: Notify,
    /// Held while the guest is made a sandbox.
    configuring: tokio::sync::Mutex<()>,
    /// Held while the shared namespace of processes is made.
    sharing_pids: tokio::sync::Mutex<()>,
    /// Held while a copy of a volume is exchanged.
    following: tokio::sync::Mutex<()>,
    /// Held while limits, or what the guest uses of its machine, change.
    updating: tokio::sync::Mutex<()>,
    /// Connections to sockets of the host that there may be yet.
    connections: Arc<Semaphore>,
}

#[derive(Default)]
struct State {
    configured: bool,
    /// The pod's user namespace, if it has one.
    users: Option<Users>,
    ipc_sysctls: Vec<(String, String)>,
    network: net::Applied,
    containers: HashMap<String, Container>,
    debug: debug::Programs,
    reaper: Reaper,
}

struct Container {
    status: Status,
    /// Path of its root file system in the guest.
    root: PathBuf,
    last_mile: LastMile,
    /// Set if it is in the pod's user namespace.
    users: Option<Users>,
    /// Its block devices.
    disks: Disks,
    /// Its volumes that are copies.
    copies: Arc<Copies>,
    /// What it has mounted of volumes in memory.
    _memory: Memory,
    /// Its sockets that stand for the host's.
    sockets: Arc<Sockets>,
    /// Running processes by exec id; an empty id is init.
    processes: HashMap<String, Process>,
    /// The kernel's count of OOM kills that was last told.
    oom_kills: u64,
    oom_watch: Option<AbortHandle>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    /// An operation that others must wait for is under way.
    Busy(&'static str),
    Created,
    Running,
    Paused,
    Stopped,
}

struct Process {
    /// 0 while it is being launched.
    pid: i32,
    terminal: Option<(Terminal, AbortHandle)>,
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some((_, stdin)) = &self.terminal {
            stdin.abort();
        }
    }
}

impl Container {
    fn process(&self, id: &str, exec: &str) -> Result<&Process> {
        self.processes.get(exec).filter(|p| p.pid != 0).ok_or_else(|| Error::no_process(id, exec))
    }
}

impl Sandbox {
    pub(crate) fn new(launcher: Box<dyn Launcher>, events: Events) -> Arc<Self> {
        Arc::new(Self {
            launcher,
            events,
            state: Mutex::default(),
            ended: Notify::new(),
            configuring: Default::default(),
            sharing_pids: Default::default(),
            following: Default::default(),
            updating: Default::default(),
            connections: Arc::new(Semaphore::new(MOST_CONNECTIONS)),
        })
    }

    /// Makes the guest a sandbox; once.
    pub(crate) async fn configure(&self, request: &ConfigureRequest) -> Result<ConfigureResponse> {
        let _one_at_a_time = self.configuring.lock().await;
        if self.state().configured {
            return Err(Error::State("the sandbox is configured already".into()));
        }
        let users = request.users.as_ref().map(Users::read).transpose()?;
        let response = configure::apply(request)?;
        let sysctls = configure::namespaced_sysctls(request);
        match &users {
            None => podns::create(sysctls).doing(|| "make the namespaces of the pod".into())?,
            Some(users) => self.launcher.make_pod(users.clone(), sysctls).await?,
        }
        let mut state = self.state();
        if let Some(network) = request.network.as_ref() {
            state.network.set(network)?;
        }
        state.ipc_sysctls = configure::ipc_sysctls(request);
        state.users = users;
        state.debug.allow(request.debug_exec);
        state.configured = true;
        Ok(response)
    }

    /// Makes the pod's network what the host says.
    pub(crate) fn set_network(&self, network: &Network) -> Result<()> {
        let mut state = self.state();
        if !state.configured {
            return Err(Error::State("the sandbox is not configured yet".into()));
        }
        state.network.set(network)
    }

    /// Connects the host to a server of the pod.
    pub(crate) async fn forward(&self, request: &ForwardRequest) -> Result<()> {
        if !self.state().configured {
            return Err(Error::State("the sandbox is not configured yet".into()));
        }
        forward::forward(request, &self.events).await
    }

    /// The host's answer to a container that has connected to one of its sockets.
    pub(crate) async fn connected(&self, request: &ConnectedRequest) -> Result<()> {
        let sockets = Arc::clone(&self.state().container(&request.container_id)?.sockets);
        sockets.connected(request).await
    }

    /// Makes a container whose command waits for [`Sandbox::start`]. Answers the pid of its init.
    pub(crate) async fn create(self: &Arc<Self>, request: &CreateContainerRequest) -> Result<u32> {
        let id = &request.container_id;
        spec::check_id(id)?;
        if self.state().containers.contains_key(id) {
            return Err(Error::Exists(format!("container {id} exists already")));
        }
        let copies = Copies::make(id, &request.followed);
        let wanted = request.disks.clone();
        let disks = tokio::task::spawn_blocking(move || Disks::find(&wanted)).await;
        let disks = disks.unwrap_or_else(|e| Err(std::io::Error::other(e)));
        let disks = disks.doing(|| "find the container's block devices".into())?;
        let memory = Memory::make(id, &request.memory)
            .doing(|| format!("make the volumes in memory of container {id}"))?;
        let sockets = Sockets::make(id, &request.sockets, &self.events, &self.connections)?;
        let create = {
            let mut state = self.state();
            if !state.configured {
                return Err(Error::State("the sandbox is not configured yet".into()));
            }
            if state.containers.contains_key(id) {
                return Err(Error::Exists(format!("container {id} exists already")));
            }
            let guest = Guest {
                network: netns::network(),
                namespaces: Path::new(netns::DIR),
                has_device: &|typ, major, minor| spec::sys_dev(typ, major, minor).exists(),
                disks,
                copies: Some(&copies),
                memory: Some(&memory),
                sockets: Some(&sockets),
                ipc_sysctls: &state.ipc_sysctls,
                users: state.users.as_ref(),
            };
            let create = spec::container(id, &request.spec, terminal_of(&request.stdio), &guest)?;
            let disks = guest.disks;
            state.containers.insert(
                id.clone(),
                Container {
                    status: Status::Busy("being created"),
                    root: create.spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default(),
                    last_mile: create.last_mile.clone(),
                    users: create.users.clone(),
                    disks,
                    copies: Arc::new(copies),
                    _memory: memory,
                    sockets: Arc::new(sockets),
                    processes: HashMap::new(),
                    oom_kills: 0,
                    oom_watch: None,
                },
            );
            create
        };
        let key = (id.clone(), String::new());
        let launched = match self.share_pids_for(&create).await {
            Ok(()) => {
                let launch = |stdio| self.launcher.create(create, stdio);
                self.launch(&key, &request.stdio, launch).await
            }
            Err(e) => Err(e),
        };
        match launched {
            Ok(pid) => {
                self.watch_oom(id);
                Ok(pid)
            }
            Err(e) => {
                self.state().containers.remove(id);
                Err(e)
            }
        }
    }

    /// Has a container's copy of a volume become what the host's is.
    pub(crate) async fn follow_volume(&self, request: &FollowVolumeRequest) -> Result<()> {
        let (id, source) = (&request.container_id, Path::new(&request.volume.source));
        let copies = Arc::clone(&self.state().container(id)?.copies);
        let Some(copy) = copies.of(source).map(Path::to_owned) else {
            // It is mounted as any other.
            return Ok(());
        };
        let _one_at_a_time = self.following.lock().await;
        volumes::exchange(source, &copy, &request.volume.version)
            .doing(|| format!("exchange {} of container {id}", source.display()))
    }

    /// The namespace of processes that containers may share is made when the first of them wants it: it costs
    /// a process.
    async fn share_pids_for(&self, create: &Create) -> Result<()> {
        let pid = podns::pid();
        let namespaces = create.spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        if !namespaces.into_iter().flatten().any(|n| n.path().as_ref() == Some(&pid)) {
            return Ok(());
        }
        let _one_at_a_time = self.sharing_pids.lock().await;
        Ok(self.launcher.share_pids().await?)
    }

    /// Lets the command of a created container run.
    pub(crate) async fn start(&self, id: &str) -> Result<()> {
        self.claim(id, &[Status::Created], "being started")?;
        let started = self.launcher.start(id).await;
        let ended = self.release(id, if started.is_ok() { Status::Running } else { Status::Created });
        match started {
            Err(_) if ended => Err(Error::no_process(id, "")),
            started => Ok(started?),
        }
    }

    /// Runs a further process in a running container. Answers its pid.
    pub(crate) async fn exec(self: &Arc<Self>, request: &ExecRequest) -> Result<u32> {
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        let exec = {
            let mut state = self.state();
            let container = state.container(id)?;
            if exec_id.is_empty() {
                return Err(Error::Invalid("an exec needs an id".into()));
            }
            if container.processes.contains_key(exec_id) {
                return Err(Error::Exists(format!("container {id}: process {exec_id} exists already")));
            }
            if container.status != Status::Running {
                return Err(not_in(id, container.status, "run a process in it"));
            }
            let init = container.process(id, "")?.pid;
            let (of_init, users) = (&container.last_mile, container.users.as_ref());
            let exec = spec::exec(init, &request.process, terminal_of(&request.stdio), of_init, users)?;
            container.processes.insert(exec_id.clone(), Process { pid: 0, terminal: None });
            exec
        };
        let key = (id.clone(), exec_id.clone());
        let launched = self.launch(&key, &request.stdio, |stdio| self.launcher.exec(exec, stdio)).await;
        if launched.is_err()
            && let Ok(container) = self.state().container(id)
        {
            container.processes.remove(exec_id);
        }
        launched
    }

    /// What creating and exec have in common: streams, the process, its bookkeeping.
    async fn launch<'a, F>(
        self: &'a Arc<Self>,
        key: &Key,
        stdio: &Stdio,
        launch: impl FnOnce(Option<[std::os::fd::OwnedFd; 3]>) -> F,
    ) -> Result<u32>
    where
        F: Future<Output = std::result::Result<Launched, LaunchError>> + 'a,
    {
        let streams = stdio::dial(stdio).await?;
        let (fds, streams, pumps) = match stdio.terminal {
            true => (None, Some(streams), None),
            false => {
                let (fds, pumps) = streams.pipes()?;
                (Some(fds), None, Some(pumps))
            }
        };
        self.state().reaper.begin(key);
        let launched = launch(fds).await;
        let Launched { pid, terminal } = match launched {
            Ok(launched) => launched,
            Err(e) => {
                let outcomes = self.state().reaper.failed(key);
                self.follow(outcomes);
                return Err(e.into());
            }
        };
        if let Some(pumps) = pumps {
            pumps.start(&self.events);
        }
        let terminal = match (terminal, streams) {
            (Some(master), Some(streams)) => {
                Some(streams.pump_terminal(master, &self.events).doing(|| "use the terminal".into())?)
            }
            _ => None,
        };
        let outcomes = {
            let mut state = self.state();
            if debug::is_key(key) {
                state.debug.launched(&key.1, Process { pid, terminal });
            } else if let Ok(container) = state.container(&key.0) {
                if key.1.is_empty() {
                    container.status = Status::Created;
                }
                container.processes.insert(key.1.clone(), Process { pid, terminal });
            }
            state.reaper.launched(key.clone(), pid)
        };
        if !outcomes.is_empty() {
            // Not before the answer is on its way: the task runs when this one has given it and waits again.
            let sandbox = Arc::clone(self);
            tokio::spawn(async move { sandbox.follow(outcomes) });
        }
        Ok(pid as u32)
    }

    /// Sends a signal to one process, or to all of a container.
    pub(crate) fn signal(&self, request: &SignalRequest) -> Result<()> {
        let (id, signal) = (&request.container_id, request.signal);
        if signal > libc::SIGRTMAX() as u32 {
            return Err(Error::Invalid(format!("{signal} is no signal")));
        }
        if id.is_empty() {
            return self.signal_debug(request);
        }
        let mut state = self.state();
        let container = state.container(id)?;
        let what = || format!("send signal {signal} to container {id}");
        if !request.all {
            let pid = container.process(id, &request.exec_id)?.pid;
            return crate::sys::kill(pid, signal).doing(what);
        }
        if container.status == Status::Stopped {
            return Err(Error::no_process(id, ""));
        }
        let cgroup = cgroup::path(id);
        if signal == libc::SIGKILL as u32 {
            return cgroup::kill(&cgroup).doing(what);
        }
        for pid in cgroup::processes(&cgroup).doing(what)? {
            match crate::sys::kill(pid, signal) {
                // It may end between the look and the signal.
                Err(e) if e.raw_os_error() != Some(libc::ESRCH) => return Err(e).doing(what),
                _ => {}
            }
        }
        Ok(())
    }

    /// Changes the size of a terminal.
    pub(crate) fn resize(&self, request: &ResizePtyRequest) -> Result<()> {
        let (id, exec) = (&request.container_id, &request.exec_id);
        let mut state = self.state();
        let process = match id.as_str() {
            "" => state.debug.process(exec)?,
            id => state.container(id)?.process(id, exec)?,
        };
        let Some((terminal, _)) = &process.terminal else {
            return Err(Error::State(format!("container {id}: the process has no terminal")));
        };
        let (width, height) = (size(request.width)?, size(request.height)?);
        crate::sys::set_winsize(terminal.get_ref().as_fd(), width, height)
            .doing(|| format!("set the size of the terminal to {width}x{height}"))
    }

    /// Stops every process of a container where it is.
    pub(crate) async fn pause(&self, id: &str) -> Result<()> {
        self.freeze(id, Status::Running, Status::Paused).await
    }

    /// Lets a paused container go on.
    pub(crate) async fn resume(&self, id: &str) -> Result<()> {
        self.freeze(id, Status::Paused, Status::Running).await
    }

    async fn freeze(&self, id: &str, from: Status, to: Status) -> Result<()> {
        let (frozen, doing) =
            if to == Status::Paused { (true, "being paused") } else { (false, "being resumed") };
        self.claim(id, &[from], doing)?;
        let path = cgroup::path(id);
        let result = cgroup::freeze(&path, frozen, DEADLINE).await;
        if result.is_err() && frozen {
            // Half frozen is worse than not at all.
            let _ = fs::write(path.join("cgroup.freeze"), "0");
        }
        let ended = self.release(id, if result.is_ok() { to } else { from });
        match result {
            Err(_) if ended => Err(Error::no_process(id, "")),
            result => result.doing(|| format!("container {id}: freeze {frozen}")),
        }
    }

    /// Changes the limits of a container, only what is set; or takes an earlier change back. Answers what the files
    /// that have changed said before. After an error they say it again.
    pub(crate) async fn update(&self, request: &UpdateRequest) -> Result<HashMap<String, Vec<u8>>> {
        let id = &request.container_id;
        self.live(id)?;
        let cgroup = cgroup::path(id);
        let _one_at_a_time = self.updating.lock().await;
        let before = limits::read(&cgroup).doing(|| format!("read the limits of container {id}"))?;
        let updated = if request.before.is_empty() {
            let disks = self.state().container(id)?.disks.clone();
            let resources = spec::resources(&request.resources, &disks)?;
            self.launcher.update(id, resources).await.map_err(Error::from)
        } else {
            limits::write(&cgroup, &request.before).doing(|| format!("set the limits of container {id}"))
        };
        let after = limits::read(&cgroup).doing(|| format!("read the limits of container {id}"))?;
        let changed = limits::changed(before, &after);
        if let Err(error) = updated {
            limits::write(&cgroup, &changed).doing(|| format!("restore the limits of container {id}"))?;
            return Err(error);
        }
        Ok(changed)
    }

    /// Changes what the guest uses of its machine.
    pub(crate) async fn use_machine(&self, request: &ResizeRequest) -> Result<ResizeResponse> {
        let _one_at_a_time = self.updating.lock().await;
        machine::resize(request).await
    }

    /// The kernel's numbers of a container; without an id, of all together.
    pub(crate) fn stats(&self, id: &str) -> Result<HashMap<String, Vec<u8>>> {
        if id.is_empty() {
            return stats::read(Path::new(cgroup::PODS)).doing(|| "read the numbers of the pod".into());
        }
        self.state().container(id)?;
        stats::read(&cgroup::path(id)).doing(|| format!("read the numbers of container {id}"))
    }

    /// Every process of a container.
    pub(crate) fn processes(&self, id: &str) -> Result<Vec<GuestProcess>> {
        let mut state = self.state();
        let container = state.container(id)?;
        let pids =
            cgroup::processes(&cgroup::path(id)).doing(|| format!("list the processes of container {id}"))?;
        let of = |pid: i32| {
            let exec = container.processes.iter().find(|(_, process)| process.pid == pid);
            let init = exec.is_some_and(|(exec_id, _)| exec_id.is_empty());
            let exec_id = exec.map(|(exec_id, _)| exec_id.clone()).unwrap_or_default();
            GuestProcess { pid: pid as u32, exec_id, init, ..Default::default() }
        };
        Ok(pids.into_iter().map(of).collect())
    }

    /// Removes a container that does not run. One that is unknown is removed already.
    pub(crate) async fn delete(&self, id: &str) -> Result<()> {
        if !self.state().containers.contains_key(id) {
            return Ok(());
        }
        let before = self.claim(id, &[Status::Stopped, Status::Created], "being deleted")?;
        let result = self.remove(id).await;
        match result {
            Ok(()) => {
                let removed = self.state().containers.remove(id);
                if let Some(watch) = removed.and_then(|container| container.oom_watch) {
                    watch.abort();
                }
                // Nobody waits for it.
                drop(tokio::task::spawn_blocking(configure::forget_unused_files));
            }
            Err(_) => {
                self.release(id, before);
            }
        }
        result
    }

    async fn remove(&self, id: &str) -> Result<()> {
        let cgroup = cgroup::path(id);
        cgroup::kill(&cgroup).doing(|| format!("kill what is left of container {id}"))?;
        cgroup::emptied(&cgroup, DEADLINE).await.doing(|| format!("wait for the end of container {id}"))?;
        // Their mounts are of its root.
        self.end_debug_of(id).await?;
        timeout(DEADLINE, self.init_told(id)).await.doing(|| format!("reap the init of container {id}"))?;
        Ok(self.launcher.delete(id).await?)
    }

    /// Waits until the end of init has been told: a container of the same id may come after this one.
    async fn init_told(&self, id: &str) {
        loop {
            let mut ended = std::pin::pin!(self.ended.notified());
            // Listen first: the end must not slip between the look and the wait.
            ended.as_mut().enable();
            if !self.state().container(id).is_ok_and(|container| container.processes.contains_key("")) {
                return;
            }
            ended.await;
        }
    }

    /// Ends every container and writes everything out.
    pub(crate) async fn shutdown(&self) -> Result<()> {
        let all = Path::new(cgroup::PODS);
        cgroup::kill(all).doing(|| "kill every container".into())?;
        cgroup::emptied(all, DEADLINE).await.doing(|| "wait for the end of every container".into())?;
        nix::unistd::sync();
        Ok(())
    }

    /// Reserves a container for an operation that takes time. Answers the state that it was in.
    fn claim(&self, id: &str, allowed: &[Status], doing: &'static str) -> Result<Status> {
        let mut state = self.state();
        let container = state.container(id)?;
        if !allowed.contains(&container.status) {
            return Err(match container.status {
                Status::Stopped => Error::no_process(id, ""),
                status => not_in(id, status, &doing.replace("being", "be")),
            });
        }
        Ok(std::mem::replace(&mut container.status, Status::Busy(doing)))
    }

    /// Ends [`Sandbox::claim`]. Answers true if init has ended meanwhile.
    fn release(&self, id: &str, status: Status) -> bool {
        let mut state = self.state();
        let Ok(container) = state.container(id) else { return true };
        let ended = !container.processes.contains_key("");
        container.status = if ended { Status::Stopped } else { status };
        ended
    }

    fn live(&self, id: &str) -> Result<()> {
        match self.state().container(id)?.status {
            Status::Stopped => Err(Error::no_process(id, "")),
            _ => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Held for the time of a look, never across an await. After a panic the books may be wrong, but a pod
        // that can still be killed is better than none.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl State {
    fn container(&mut self, id: &str) -> Result<&mut Container> {
        self.containers.get_mut(id).ok_or_else(|| Error::no_container(id))
    }
}

impl From<LaunchError> for Error {
    fn from(error: LaunchError) -> Self {
        match error {
            LaunchError::Refused(text) => Self::Launch(text),
            LaunchError::Broken(source) => Self::Io { verb: "launcher".into(), source },
        }
    }
}

fn not_in(id: &str, status: Status, verb: &str) -> Error {
    let status = match status {
        Status::Busy(doing) => doing,
        Status::Created => "created but not started",
        Status::Running => "running",
        Status::Paused => "paused",
        Status::Stopped => "stopped",
    };
    Error::State(format!("container {id} is {status}: cannot {verb}"))
}

fn terminal_of(stdio: &Stdio) -> spec::Terminal {
    let fit = |n: u32| n.min(u16::MAX.into()) as u16;
    stdio.terminal.then(|| Size { width: fit(stdio.width), height: fit(stdio.height) })
}

fn size(characters: u32) -> Result<u16> {
    characters.try_into().map_err(|_| Error::Invalid(format!("a terminal has no {characters} characters")))
}
