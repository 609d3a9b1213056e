//! What happens in the guest, in order, until the host has read it.
//! Knows the queue; must not know who fills it.

use std::{
    sync::Mutex,
    time::{SystemTime, UNIX_EPOCH},
};

use bulkhead_proto::{
    agent::{self, Event, event::Kind},
    stream::Token,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// The sending end. Never blocks and never loses: what happens before the host listens waits for it.
#[derive(Clone)]
pub(crate) struct Events(UnboundedSender<Event>);

/// The receiving end, which can be taken once.
pub(crate) struct Queue(Mutex<Option<UnboundedReceiver<Event>>>);

/// A queue and its sending end.
pub(crate) fn queue() -> (Events, Queue) {
    let (to, from) = unbounded_channel();
    (Events(to), Queue(Mutex::new(Some(from))))
}

impl Queue {
    /// The receiving end; none if it was taken before.
    pub(crate) fn take(&self) -> Option<UnboundedReceiver<Event>> {
        self.0.lock().expect("no holder panics").take()
    }
}

impl Events {
    /// A process ended.
    pub(crate) fn exit(&self, container_id: &str, exec_id: &str, status: u32, at_unix_nanos: u64) {
        self.send(Kind::Exit(agent::Exit {
            container_id: container_id.into(),
            exec_id: exec_id.into(),
            status,
            at_unix_nanos,
            ..Default::default()
        }));
    }

    /// The kernel killed a process of this container for want of memory.
    pub(crate) fn oom(&self, container_id: &str) {
        self.send(Kind::Oom(agent::Oom { container_id: container_id.into(), ..Default::default() }));
    }

    /// The last byte of an output stream was written; or nobody takes more from the input stream of a connection.
    pub(crate) fn stream_end(&self, token: &Token, total_bytes: u64) {
        self.send(Kind::StreamEnd(agent::StreamEnd {
            token: token.0.to_vec(),
            total_bytes,
            ..Default::default()
        }));
    }

    /// A container has connected to a socket of the host.
    pub(crate) fn connect(&self, container_id: &str, socket: u32, connection: u64) {
        let container_id = container_id.into();
        self.send(Kind::Connect(agent::Connect { container_id, socket, connection, ..Default::default() }));
    }

    fn send(&self, kind: Kind) {
        // Fails only when the receiver is gone, that is: when the host is.
        let _ = self.0.send(Event { kind: Some(kind), ..Default::default() });
    }
}

/// Wall clock in nanoseconds since the epoch.
pub(crate) fn now_unix_nanos() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}
