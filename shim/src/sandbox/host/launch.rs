//! Brings a sandbox's machine up: what it stands on, the launch, the first words with its agent; and ends it.
//! Decides neither what machine it is nor when it comes and goes.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bulkhead_hypervisor::{Growth, qemu::BLOCK};
use bulkhead_proto::{
    CONTROL_PORT, SHARE_TAG, STREAM_PORT,
    agent::{Network, event::Kind as GuestEvent},
    stream::Token,
};
use bulkhead_vmm_spec::{Bindings, Shape};
use tokio::sync::mpsc;
use tracing::{Instrument, debug, info_span, warn};

use super::{
    super::{forward, machine::Running, model::*, network::PodNetwork, sockets::Sockets},
    Accounts, GOODBYE, Host, MachineFacts, Ready,
    backend::choose,
    blocking, lock,
    resize::Book,
    wanted::{Wanted, config_fault, own_hostname},
};
use crate::{
    cgroup,
    error::{Fault, Kind},
    guest::{self, Agent, GuestEvents},
    guest_exec::Exits,
    ids::{ContainerId, ProcessKey},
    plan::IdMaps,
    stdio::Hub,
    storage::Disks,
    tasks, trace,
};

/// How long a machine may outlive its agent: a panic takes a moment to be told.
const AGENT_GONE: Duration = Duration::from_secs(2);

impl Host {
    /// The machine of the sandbox's first container.
    pub(super) async fn boot(&self, request: &CreateRequest) -> Result<i32, Fault> {
        let wanted = info_span!("plan").in_scope(|| self.plan_machine(request))?;
        self.launch(wanted).await
    }

    /// The machine of the pod that was planned.
    pub(super) async fn boot_pod(&self) -> Result<i32, Fault> {
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
        fail_point!(AcquireShare);
        let vsock = self.dir.join("vsock");
        let control = guest::listen(&vsock, CONTROL_PORT).map_err(|e| Fault::of(Kind::Internal, &e))?;
        fail_point!(AcquireListen);
        let streams = guest::listen(&vsock, STREAM_PORT).map_err(|e| Fault::of(Kind::Internal, &e))?;
        tasks::spawn(self.hub.clone().serve(streams));
        drop(acquire);
        let (path, spare) = (wanted.netns.clone(), wanted.config.network.spare_cards);
        let network =
            blocking("look at the pod's network", move || PodNetwork::acquire(path.as_deref(), spare));
        let network = Arc::new(network.instrument(info_span!("network")).await?);
        *lock(&self.network) = Some(network.clone());
        fail_point!(AcquireNetwork);

        let Wanted { config, sizing, .. } = &wanted;
        let guest_files = config.resolve_guest().map_err(config_fault)?;
        let hypervisor = choose(config)?;
        let mut shape = Shape {
            vcpus: sizing.vcpus,
            max_vcpus: sizing.max_vcpus,
            memory: sizing.memory,
            growth: sizing.growth(BLOCK),
            // What is configured comes last and thus wins.
            cmdline: format!("{} {}", sizing.kernel_words(), config.hypervisor.kernel_params),
            share_tag: Some(SHARE_TAG.to_owned()),
            blocks: Vec::new(),
            nets: Vec::new(),
            spare_slots: wanted.spare_disks,
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
        *self.disks.lock().await = disks;
        let accounts = Accounts { ledger: &self.ledger, cgroup: cgroup.as_deref(), dir: &self.dir };
        let began = Instant::now();
        let launch = hypervisor.launch(&shape, &bindings, &accounts).instrument(info_span!("launch"));
        let machine = launch.await.map_err(|e| Fault::of(Kind::FailedPrecondition, &e))?;
        fail_point!(LaunchDone);
        self.counters.stage("launch", began.elapsed());
        let running = Running::watch(machine, cgroup.clone(), self.inputs.clone());
        let facts = MachineFacts {
            vmm_pid: running.pid(),
            backend: hypervisor.name(),
            memory_mib: sizing.memory.0,
            vcpus: sizing.vcpus,
        };
        let (mut ended, processors, growth) = (running.ended(), running.processors(), running.growth());
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
        *self.size.lock().await = Some(Book::new(wanted.sizing, processors, growth));
        Ok(facts.vmm_pid)
    }

    /// Waits for the agent's hello, configures the guest and listens to its events.
    async fn meet(&self, control: &tokio::net::UnixListener, wanted: &Wanted) -> Result<(), Fault> {
        let config = &wanted.config;
        let timeout = Duration::from_secs(config.agent.request_timeout_seconds);
        fail_point!(HelloAwaited);
        // The taps are there by now. Meanwhile the guest boots.
        let joined = tokio::spawn(self.joined());
        let joined = async { joined.await.unwrap_or_else(|e| Err(Fault::internal("join the links", &e))) };
        let began = Instant::now();
        let hello = Agent::accept(control, timeout).instrument(info_span!("hello"));
        let (agent, hello) = hello.await.map_err(|e| Fault::of(Kind::Unavailable, &e))?;
        fail_point!(HelloSaid);
        self.counters.stage("hello", began.elapsed());
        if let Some(Growth::Kept(kept)) = lock(&self.ready).as_ref().and_then(|r| r.running.growth()) {
            kept.cut().map_err(|e| Fault::internal("keep memory from the machine", &e))?;
        }
        let now = SystemTime::now();
        trace::append("kernel", now - Duration::from_nanos(hello.uptime_nanos), now);
        debug!(kernel = hello.kernel, agent = hello.agent, "guest is up");
        let events = agent.events().await?;
        // A container without a name of its own has the host's, as with runc.
        let own = own_hostname();
        let hostname = if wanted.hostname.is_empty() { &own } else { &wanted.hostname };
        let network = joined.instrument(info_span!("join")).await?;
        let first = network.clone().unwrap_or_default();
        fail_point!(Configure);
        let users = wanted.users.as_ref().map(IdMaps::message);
        let debug_exec = config.agent.debug_exec;
        let configured = agent.configure(hostname, wanted.sysctls.clone(), first, users, debug_exec);
        let began = Instant::now();
        let guest = configured.instrument(info_span!("configure")).await?;
        fail_point!(Configured);
        self.counters.stage("configure", began.elapsed());
        if let (Some(pod), Some(network)) = (lock(&self.network).as_ref(), network) {
            pod.was_told(network);
        }
        self.forward_ports(&agent).await;
        if debug_exec {
            self.open_guest(&agent);
        }
        debug!(controllers = ?guest.controllers, "guest is configured");
        self.sockets.allow(&config.volumes.host_sockets);
        if let Some(ready) = lock(&self.ready).as_mut() {
            let listener = Listener {
                hub: self.hub.clone(),
                exits: self.guest_exits.clone(),
                sockets: self.sockets.clone(),
                agent: agent.clone(),
                inputs: self.inputs.clone(),
                ended: ready.running.ended(),
            };
            ready.agent = Some(agent);
            tasks::spawn(listener.listen(events));
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
    pub(super) async fn refresh_network(&self) -> Result<(), Fault> {
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
                tasks::spawn(forward::serve(forwarder, agent.clone(), self.hub.clone()));
            }
            Ok(None) => {}
            Err(fault) => warn!("ports of the pod cannot be forwarded: {fault}"),
        }
    }

    /// Ends the machine in order; its end is told as an input.
    pub(super) async fn halt(&self) {
        if let Ok(agent) = self.agent() {
            let goodbye = async { fail_point!(HaltGuest, agent.shutdown().await) };
            let _ = tokio::time::timeout(GOODBYE, goodbye).await;
        }
        kill_point!(HaltMachine);
        if let Some(ready) = lock(&self.ready).as_ref() {
            ready.running.kill("the pod is stopped");
        }
    }
}

/// Who is told of what happens in the guest.
struct Listener {
    hub: Hub,
    exits: Exits,
    sockets: Sockets,
    agent: Agent,
    inputs: mpsc::UnboundedSender<Input>,
    ended: tokio::sync::watch::Receiver<Option<MachineEnd>>,
}

impl Listener {
    /// Hands the guest's events on, in order, until the guest is gone.
    async fn listen(mut self, mut events: GuestEvents) {
        while let Some(event) = events.next().await {
            if let Some(kind) = event.kind {
                self.tell(kind);
            }
        }
        self.exits.guest_gone();
        // The agent is the guest's PID 1: without it there is no guest. Normally the machine's end follows.
        let gone = tokio::time::timeout(AGENT_GONE, self.ended.wait_for(Option::is_some)).await.is_err();
        if gone {
            let _ = self.inputs.send(Input::AgentLost);
        }
    }

    fn tell(&self, kind: GuestEvent) {
        match kind {
            GuestEvent::Exit(exit) if exit.container_id.is_empty() => {
                self.exits.told(&exit.exec_id, (exit.status & 0xff) as u8);
            }
            GuestEvent::Exit(exit) => {
                let Ok(key) = ProcessKey::parse(&exit.container_id, &exit.exec_id) else { return };
                // Told with the host's clock: the guest's may be off, and is not trusted.
                let info = ExitInfo { status: exit.status & 0xff, at: SystemTime::now() };
                let _ = self.inputs.send(Input::GuestExit(key, info));
            }
            GuestEvent::Oom(oom) => {
                if let Ok(id) = ContainerId::parse(&oom.container_id) {
                    let _ = self.inputs.send(Input::GuestOom(id));
                }
            }
            GuestEvent::StreamEnd(end) => {
                if let Ok(token) = Token::try_from(end.token.as_slice()) {
                    self.hub.ended(&token, end.total_bytes);
                }
            }
            GuestEvent::Connect(wanted) => self.sockets.connect(&wanted, &self.agent, &self.hub),
            _ => {}
        }
    }
}
