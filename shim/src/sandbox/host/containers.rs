//! The containers of a sandbox: their files on the host, their lives in the guest, what is asked of them.
//! Knows the agent and the share; the machine is there, or is not.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::SystemTime,
};

use tracing::{Instrument, error, info_span, warn};

use super::{
    super::{hooks, model::*},
    Host, POD_DELETED, blocking, lock,
    wanted::load_spec,
};
use crate::{
    cgroup,
    error::{Fault, Kind, chain},
    guest::Agent,
    ids::{ContainerId, ProcessKey},
    plan::{self, ContainerPlan, Role},
    stdio::LoggerContext,
    storage::{PodFiles, Share},
};

/// A container whose files are in the share.
#[derive(Clone)]
pub(super) struct Prepared {
    plan: ContainerPlan,
    bundle: PathBuf,
    io: Io,
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

    pub(super) async fn guest_create(&self, id: &ContainerId) -> Result<(), Fault> {
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

    pub(super) async fn guest_start(&self, id: &ContainerId) -> Result<(), Fault> {
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
        let tokens = self
            .hub
            .open(key, io, &self.logger(&key.container))
            .map_err(|e| Fault::of(Kind::InvalidArgument, &e))?;
        let started = agent.exec(key, process.0, io, tokens, size).await;
        if started.is_err() {
            self.hub.forget(key);
        }
        started
    }

    pub(super) async fn ask(&self, ask: Ask) -> Result<Reply, Fault> {
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

    pub(super) async fn release(&self, id: &ContainerId, guest: bool) {
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
}

fn no_process(id: &ContainerId, verb: &str) -> Fault {
    let text = format!("cannot {verb} container {id}: it stands for its pod and has no process of its own");
    Fault::new(Kind::Unimplemented, text)
}
