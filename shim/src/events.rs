//! Tells containerd what happens, in the order in which it happened, whatever the connection does.
//! Knows containerd's event service; does not know why an event is sent.
//!
//! One queue and one sender: an event that has to be sent again holds back all that follow it, so a
//! TaskExit can never overtake its TaskStart (contract, E2 and E6).

use std::{path::PathBuf, sync::Arc, time::Duration};

use containerd_shim_protos::{
    protobuf::{
        MessageDyn, MessageField, well_known_types::any::Any, well_known_types::timestamp::Timestamp,
    },
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
    ttrpc::{self, asynchronous::transport::Socket},
};
use tokio::{net::UnixStream, sync::mpsc};
use tracing::{debug, warn};

use crate::{metrics::counters::Counters, tasks};

/// How long one attempt may take (contract, E5).
const ATTEMPT: Duration = Duration::from_secs(5);
/// Attempts for one event before it is given up (contract, E5).
const ATTEMPTS: u32 = 6;
/// Grows by itself with each attempt.
const BACK_OFF: Duration = Duration::from_secs(1);

/// Takes events for containerd.
#[derive(Clone)]
pub struct Publisher {
    queue: mpsc::UnboundedSender<Envelope>,
    namespace: String,
    counters: Arc<Counters>,
}

/// Resolves when every event has been sent or given up, after the last [`Publisher`] was dropped.
pub type Drained = tokio::task::JoinHandle<()>;

impl Publisher {
    /// Begins to send to the ttrpc socket at `address`.
    pub fn new(address: &str, namespace: &str, counters: Arc<Counters>) -> (Self, Drained) {
        let (queue, events) = mpsc::unbounded_channel();
        let path = PathBuf::from(address.strip_prefix("unix://").unwrap_or(address));
        let drained = tasks::spawn(Sender { path, client: None, counters: counters.clone() }.run(events));
        (Self { queue, namespace: namespace.to_owned(), counters }, drained)
    }

    /// Queues an event that happened now.
    pub fn publish(&self, topic: &str, event: &dyn MessageDyn) {
        let envelope = Envelope {
            timestamp: MessageField::some(Timestamp::now()),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(Any {
                // containerd looks its types up by the bare name.
                type_url: event.descriptor_dyn().full_name().to_owned(),
                value: event.write_to_bytes_dyn().unwrap_or_default(),
                ..Default::default()
            }),
            ..Default::default()
        };
        self.counters.event_queued();
        // The receiver outlives every publisher.
        let _ = self.queue.send(envelope);
    }
}

struct Sender {
    path: PathBuf,
    client: Option<EventsClient>,
    counters: Arc<Counters>,
}

impl Sender {
    async fn run(mut self, mut events: mpsc::UnboundedReceiver<Envelope>) {
        while let Some(envelope) = events.recv().await {
            self.deliver(envelope).await;
        }
    }

    async fn deliver(&mut self, envelope: Envelope) {
        let topic = envelope.topic.clone();
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
        for attempt in 1..=ATTEMPTS {
            if attempt > 1 {
                self.counters.event_retried();
            }
            match self.forward(&request).await {
                Ok(()) => return self.counters.event_sent(),
                Err(error) => debug!(topic, attempt, %error, "event was not taken"),
            }
            if attempt < ATTEMPTS {
                // containerd gives no sign of its return that could be waited for: a back-off is its protocol.
                tokio::time::sleep(BACK_OFF * attempt).await;
            }
        }
        self.counters.event_dropped();
        warn!(topic, "event given up: containerd did not take it in {ATTEMPTS} attempts");
    }

    async fn forward(&mut self, request: &ForwardRequest) -> Result<(), String> {
        let client = match self.client.take() {
            Some(client) => client,
            None => {
                let stream = UnixStream::connect(&self.path).await.map_err(|e| e.to_string())?;
                EventsClient::new(Client::new(Socket::new(stream)))
            }
        };
        let context = ttrpc::context::with_duration(ATTEMPT);
        match tokio::time::timeout(ATTEMPT, client.forward(context, request)).await {
            Ok(Ok(_)) => {
                self.client = Some(client);
                Ok(())
            }
            // A connection that failed once is not trusted with the next attempt.
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no answer".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use containerd_shim_protos::api::Empty;
    use tokio::{net::UnixListener, time::Instant};

    use super::*;
    use crate::metrics::text::Exposition;

    /// What is done with each connection of a sender.
    type Peer = fn(UnixStream, &mut Vec<UnixStream>);

    /// Publishes two events to a containerd that does `peer` with every connection; how many there were, and how
    /// long it took until both were given up.
    async fn give_up(peer: Peer) -> (u32, Duration) {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("c.ttrpc");
        let listener = UnixListener::bind(&path).unwrap();
        let attempts = Rc::new(Cell::new(0));
        let counted = attempts.clone();
        let serving = async move {
            let mut held = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                counted.set(counted.get() + 1);
                peer(stream, &mut held);
            }
        };
        let began = Instant::now();
        let counters = Arc::new(Counters::default());
        let (publisher, drained) = Publisher::new(&path.display().to_string(), "n", counters.clone());
        publisher.publish("/tasks/start", &Empty::new());
        publisher.publish("/tasks/exit", &Empty::new());
        drop(publisher);
        tokio::select! {
            () = serving => unreachable!("it listens for ever"),
            ended = drained => ended.unwrap(),
        }
        let mut page = Exposition::default();
        counters.tell(&mut page);
        let text = page.to_string();
        for line in ["bulkhead_shim_events_retried_total 10", "bulkhead_shim_events_dropped_total 2"] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        (attempts.get(), began.elapsed())
    }

    /// Between the attempts are 1, 2, 3, 4 and 5 s.
    const PAUSES: Duration = Duration::from_secs(15);

    #[tokio::test(start_paused = true)]
    async fn e5_an_event_is_given_up_after_five_repetitions_and_the_next_has_its_own() {
        let (attempts, took) = give_up(|stream, _| drop(stream)).await;
        assert_eq!(attempts, 2 * (1 + 5));
        assert!(took >= 2 * PAUSES && took < 2 * PAUSES + ATTEMPT, "it took {took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn e5_a_delivery_without_an_answer_takes_five_seconds() {
        let (attempts, took) = give_up(|stream, held| held.push(stream)).await;
        assert_eq!(attempts, 2 * (1 + 5));
        let each = PAUSES + 6 * Duration::from_secs(5);
        assert!(took >= 2 * each && took < 2 * each + ATTEMPT, "it took {took:?}");
    }
}
