//! containerd's events, as `ctr events` prints them: what a test waits on.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::pace::stretched;

/// One line of `ctr events`.
#[derive(Clone, Debug)]
pub struct Event {
    /// For example `/tasks/exit`.
    pub topic: String,
    /// The containerd namespace it belongs to.
    pub namespace: String,
    /// The event's fields.
    pub body: Value,
}

impl Event {
    /// The text field `name`; empty where there is none.
    pub fn text(&self, name: &str) -> &str {
        self.body[name].as_str().unwrap_or("")
    }

    /// The numeric field `name`; 0 where there is none (as protobuf's JSON leaves zeroes out).
    pub fn number(&self, name: &str) -> u64 {
        self.body[name].as_u64().unwrap_or(0)
    }

    fn parse(line: &str) -> Option<Self> {
        // "<date> <time> <zone> <zone name> <namespace> <topic> <json>"
        let mut fields = line.splitn(7, ' ').skip(4);
        let (namespace, topic, json) = (fields.next()?, fields.next()?, fields.next()?);
        let body = serde_json::from_str(json).unwrap_or(Value::Null);
        Some(Self { topic: topic.into(), namespace: namespace.into(), body })
    }
}

/// A subscription to the events of one containerd namespace.
pub struct Events {
    child: Child,
    lines: Receiver<Event>,
    namespace: String,
    /// Everything received so far, in order, without what other namespaces do.
    pub seen: Vec<Event>,
}

impl Events {
    /// Subscribes, and returns when the subscription is known to work: `mark` must make containerd publish
    /// some event in the namespace. ctr does not say when it has subscribed, so the mark is made until it is seen.
    pub(crate) fn subscribe(
        mut ctr: Command,
        namespace: &str,
        mark: impl Fn(u32) -> Result<()>,
    ) -> Result<Self> {
        let mut child = ctr
            .arg("events")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("start ctr events")?;
        let pipe = child.stdout.take().context("ctr events has no output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                if let Some(event) = Event::parse(&line)
                    && sender.send(event).is_err()
                {
                    break;
                }
            }
        });
        let mut events = Self { child, lines, namespace: namespace.to_string(), seen: Vec::new() };
        for round in 0..40 {
            mark(round)?;
            if events.receive(stretched(Duration::from_millis(500)))?.is_some() {
                events.drain();
                events.seen.clear();
                return Ok(events);
            }
        }
        bail!("ctr events shows nothing, although events were made");
    }

    /// The next event of the namespace, or none within `timeout`.
    fn receive(&mut self, timeout: Duration) -> Result<Option<Event>> {
        let until = Instant::now() + timeout;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(event) if event.namespace == self.namespace => {
                    self.seen.push(event.clone());
                    return Ok(Some(event));
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => bail!("ctr events has ended"),
            }
        }
    }

    /// Takes in what has already arrived.
    fn drain(&mut self) {
        while let Ok(Some(_)) = self.receive(Duration::ZERO) {}
    }

    /// Waits for an event that satisfies `want`, among those already seen and those to come.
    pub fn wait(&mut self, seconds: u64, what: &str, want: impl Fn(&Event) -> bool) -> Result<Event> {
        if let Some(event) = self.seen.iter().find(|e| want(e)) {
            return Ok(event.clone());
        }
        let time = stretched(Duration::from_secs(seconds));
        let until = Instant::now() + time;
        loop {
            match self.receive(until.saturating_duration_since(Instant::now()))? {
                Some(event) if want(&event) => return Ok(event),
                Some(_) => {}
                None => bail!("waited {time:?} for {what}; seen: {:?}", self.topics()),
            }
        }
    }

    /// Waits for the exit of a container's init and returns its status.
    pub fn wait_exit(&mut self, container: &str, seconds: u64) -> Result<u64> {
        let event = self.wait(seconds, &format!("the exit of {container}"), |e| {
            e.topic == "/tasks/exit" && e.text("container_id") == container && e.text("id") == container
        })?;
        Ok(event.number("exit_status"))
    }

    /// The topics seen so far, in order.
    pub fn topics(&self) -> Vec<String> {
        self.seen.iter().map(|e| e.topic.clone()).collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
