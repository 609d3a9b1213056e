//! Hands connections of containers to sockets of the host on to these.
//! Knows who may connect to what; what that is on the host is the storage's.
//!
//! ```text
//!  a container ──connect──▶ agent ──Connect{container, number}──▶ shim ──connect──▶ the host's socket
//!                            agent ◀──Connected{tokens}──────────── shim
//!                bytes       agent ══ two streams, as of a process ══ shim       bytes
//! ```
//!
//! The guest names a socket by its number among those that its container was given, never by a path.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bulkhead_proto::{MOST_CONNECTIONS, agent::Connect, stream::Token};
use tokio::{
    net::UnixStream,
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};
use tracing::{debug, warn};

use crate::{
    config::Pattern, error::Fault, guest::Agent, ids::ContainerId, stdio::Hub, storage::HostSocket, tasks,
};

/// A connection has ended for the agent a little before it has for the shim.
const MOST_AT_ONCE: usize = MOST_CONNECTIONS + MOST_CONNECTIONS / 4;

/// The sockets of the host that containers may connect to, and the connections.
#[derive(Clone)]
pub(super) struct Sockets(Arc<Inner>);

struct Inner {
    /// What is allowed, once the pod's configuration is known.
    patterns: Mutex<Vec<Pattern>>,
    containers: Mutex<HashMap<ContainerId, Given>>,
    room: Arc<Semaphore>,
}

/// What one container was given.
struct Given {
    sockets: Vec<HostSocket>,
    /// Its connections end when this is dropped.
    ends: watch::Sender<()>,
}

impl Default for Sockets {
    fn default() -> Self {
        let room = Arc::new(Semaphore::new(MOST_AT_ONCE));
        Self(Arc::new(Inner { patterns: Mutex::default(), containers: Mutex::default(), room }))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sockets {
    /// What the administrator allows.
    pub(super) fn allow(&self, patterns: &[Pattern]) {
        patterns.clone_into(&mut lock(&self.0.patterns));
    }

    /// What the administrator allows.
    pub(super) fn patterns(&self) -> Vec<Pattern> {
        lock(&self.0.patterns).clone()
    }

    /// Lets a container connect to these from now on, by their numbers.
    pub(super) fn give(&self, id: &ContainerId, sockets: Vec<HostSocket>) {
        let given = Given { sockets, ends: watch::Sender::new(()) };
        lock(&self.0.containers).insert(id.clone(), given);
    }

    /// Ends all connections of a container; there will be no more.
    pub(super) fn take_back(&self, id: &ContainerId) {
        lock(&self.0.containers).remove(id);
    }

    /// The guest says that a container wants to be connected.
    pub(super) fn connect(&self, wanted: &Connect, agent: &Agent, hub: &Hub) {
        let Ok(id) = ContainerId::parse(&wanted.container_id) else { return };
        let Some((socket, mut ended)) = self.look_up(&id, wanted.socket) else {
            return warn!(%id, "the guest asks for a socket that the container was not given");
        };
        // An agent of ours waits in time. Whoever does not gets no answer, which would cost as much as a connection.
        let Ok(place) = self.0.room.clone().try_acquire_owned() else {
            return debug!(%id, "the guest asks for more connections than a pod may have");
        };
        let call = Call { id, connection: wanted.connection, socket, agent: agent.clone(), hub: hub.clone() };
        tasks::spawn(async move {
            tokio::select! {
                () = call.carry(place) => {}
                // Only by the drop of the sender.
                _ = ended.changed() => {}
            }
        });
    }

    fn look_up(&self, id: &ContainerId, number: u32) -> Option<(HostSocket, watch::Receiver<()>)> {
        let containers = lock(&self.0.containers);
        let given = containers.get(id)?;
        let socket = given.sockets.get(usize::try_from(number).ok()?)?;
        Some((socket.clone(), given.ends.subscribe()))
    }
}

/// A connection that a container wants.
struct Call {
    id: ContainerId,
    connection: u64,
    socket: HostSocket,
    agent: Agent,
    hub: Hub,
}

impl Call {
    /// Connects, and moves bytes until both sides have closed.
    async fn carry(self, _place: OwnedSemaphorePermit) {
        let socket = self.socket.clone();
        let connected = tokio::task::spawn_blocking(move || {
            let stream = socket.connect()?;
            stream.set_nonblocking(true)?;
            Ok::<_, std::io::Error>(stream)
        });
        let connected = connected.await.unwrap_or_else(|e| Err(std::io::Error::other(e)));
        let peer = match connected.and_then(UnixStream::from_std) {
            Ok(peer) => peer,
            Err(error) => {
                let (id, socket) = (&self.id, &self.socket);
                debug!(%id, %error, "connect to {socket}");
                return self.told(self.answer(None).await);
            }
        };
        let streams = match self.hub.expect_connection() {
            Ok(streams) => streams,
            Err(error) => {
                warn!(id = %self.id, %error, "a connection to {}", self.socket);
                return self.told(self.answer(None).await);
            }
        };
        match self.answer(Some(streams.tokens())).await {
            Ok(()) => streams.carry(peer, async { self.told(self.answer(None).await) }).await,
            Err(fault) => self.told(Err(fault)),
        }
    }

    async fn answer(&self, tokens: Option<[Token; 2]>) -> Result<(), Fault> {
        self.agent.connected(&self.id, self.connection, tokens).await
    }

    fn told(&self, answered: Result<(), Fault>) {
        if let Err(fault) = answered {
            debug!(id = %self.id, "a connection to {}: {fault}", self.socket);
        }
    }
}
