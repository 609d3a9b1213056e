//! Gathers the figures of the pod for one scrape: from the shim, the host's kernel, the VMM and the guest.
//! Knows who has to be asked and how long that may take; how figures look is `metrics`' business.
//!
//! A part that does not answer in time is left out and counted, and is not asked again before it has answered or the
//! question has expired: a guest that is stopped is not buried in questions, however often it is scraped. Nobody else
//! waits for a scrape.

use std::{sync::Arc, time::Duration};

use bulkhead_hypervisor::{Counts, Meter};
use futures::future::BoxFuture;
use tokio::sync::{Mutex, Semaphore, oneshot};
use tracing::debug;

use super::{Host, lock};
use crate::{
    cgroup,
    error::Kind,
    guest::Agent,
    ids::ContainerId,
    metrics::{
        counters::Part,
        families,
        figures::{self, Files},
        text::Exposition,
    },
    plan::Role,
    tasks,
};

/// How long a part of a scrape may take. Prometheus waits 10 s for a whole one unless it is told otherwise.
const PART: Duration = Duration::from_secs(2);

/// Whether a part owes an answer.
struct Asked(Arc<Semaphore>);

impl Default for Asked {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

impl Asked {
    /// Asks, unless it owes an answer, and waits for so long. The question goes on when nobody waits any more.
    async fn ask<T: Send + 'static>(&self, limit: Duration, question: BoxFuture<'static, T>) -> Option<T> {
        let turn = self.0.clone().try_acquire_owned().ok()?;
        let (tell, told) = oneshot::channel();
        tasks::spawn(async move {
            let _ = tell.send(question.await);
            drop(turn);
        });
        tokio::time::timeout(limit, told).await.ok()?.ok()
    }
}

/// What scrapes have to know of each other.
#[derive(Default)]
pub(super) struct Scrapes {
    /// One at a time: what one owes is no fault of the next.
    turn: Mutex<()>,
    guest: Asked,
    monitor: Asked,
    host: Asked,
}

/// What the host's kernel tells of the pod.
struct OfHost {
    files: Files,
    oom_kills: u64,
    /// Names and contents of /proc/<pid>/stat.
    processes: Vec<(String, String)>,
}

impl Host {
    /// The page for one scrape.
    pub(super) async fn page(self: Arc<Self>) -> String {
        let _turn = self.scrapes.turn.lock().await;
        let identity = &self.identity;
        let mut page = Exposition::of(&[("namespace", &identity.namespace), ("pod", &identity.id)]);
        let (mut processes, mut agent, mut meter) = (Vec::new(), None, None);
        processes.push(("shim".to_owned(), std::process::id() as i32));
        if let Some(ready) = lock(&self.ready).as_ref() {
            let (facts, lives) = (&ready.facts, ready.running.lives());
            page.put(families::MACHINE_UP, &[], u64::from(lives));
            page.put(families::MACHINE_INFO, &[("backend", facts.backend)], 1);
            page.put(families::MACHINE_VCPUS, &[], u64::from(facts.vcpus));
            page.put(families::MACHINE_MEMORY, &[], facts.memory_mib << 20);
            // Pids of a machine that has ended may be others' by now.
            if lives {
                processes.extend_from_slice(ready.running.processes());
                (agent, meter) = (ready.agent.clone(), ready.running.meter());
            }
        }
        let (host, monitor, (guest, missing)) =
            tokio::join!(self.of_host(processes), self.of_monitor(meter), self.of_guest(agent));
        for (part, failed) in
            [(Part::Host, host.is_err()), (Part::Monitor, monitor.is_err()), (Part::Guest, missing)]
        {
            if failed {
                self.counters.scrape_failed(part);
            }
        }
        self.counters.tell(&mut page);
        if let Ok(host) = host {
            for (name, stat) in &host.processes {
                figures::process(&mut page, name, stat);
            }
            figures::pod(&mut page, &host.files, host.oom_kills);
        }
        figures::monitor(&mut page, &monitor.unwrap_or_default());
        for (id, files) in guest {
            figures::container(&mut page, id.as_str(), &files);
        }
        page.to_string()
    }

    async fn of_host(&self, processes: Vec<(String, i32)>) -> Result<OfHost, ()> {
        let path = lock(&self.cgroup).clone();
        let look = tokio::task::spawn_blocking(move || {
            let stat = |(name, pid)| Some((name, std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?));
            OfHost {
                files: path.as_deref().map(cgroup::figures).unwrap_or_default(),
                oom_kills: path.as_deref().map_or(0, cgroup::oom_kills),
                processes: processes.into_iter().filter_map(stat).collect(),
            }
        });
        self.scrapes.host.ask(PART, Box::pin(look)).await.and_then(Result::ok).ok_or(())
    }

    /// Nothing where the VMM counts nothing.
    async fn of_monitor(&self, meter: Option<Arc<dyn Meter>>) -> Result<Counts, ()> {
        let Some(meter) = meter else { return Ok(Counts::new()) };
        let read = async move { meter.read().await.inspect_err(|e| debug!("the VMM's figures: {e}")) };
        self.scrapes.monitor.ask(PART, Box::pin(read)).await.and_then(Result::ok).ok_or(())
    }

    /// The figures of each container in the guest, and whether some are missing.
    async fn of_guest(&self, agent: Option<Agent>) -> (Vec<(ContainerId, Files)>, bool) {
        let Some(agent) = agent else { return (Vec::new(), false) };
        let ids = self.in_guest();
        // One after the other, and no further than the first that gets no answer.
        let question = async move {
            let mut known = Vec::new();
            for id in ids {
                match agent.stats(&id).await {
                    Ok(answer) => known.push((id, answer.files)),
                    // It is being made or taken apart.
                    Err(fault) if fault.kind == Kind::NotFound => {}
                    Err(fault) => {
                        debug!("the guest's figures of {id}: {fault}");
                        return (known, true);
                    }
                }
            }
            (known, false)
        };
        self.scrapes.guest.ask(PART, Box::pin(question)).await.unwrap_or((Vec::new(), true))
    }

    /// Containers that are more than a name for their pod.
    fn in_guest(&self) -> Vec<ContainerId> {
        let prepared = lock(&self.prepared);
        let real = prepared.iter().filter(|(_, container)| container.role() != Role::Sandbox);
        let mut ids: Vec<_> = real.map(|(id, _)| id.clone()).collect();
        ids.sort();
        ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_that_owes_an_answer_is_not_asked_again() {
        let (asked, limit) = (Asked::default(), Duration::from_millis(100));
        assert_eq!(asked.ask(limit, Box::pin(async { 1 })).await, Some(1));
        let (answer, question) = oneshot::channel::<u8>();
        assert_eq!(asked.ask(limit, Box::pin(async { question.await.unwrap() })).await, None, "it is late");
        let patient = Duration::from_secs(60);
        assert_eq!(
            asked.ask(patient, Box::pin(async { 2 })).await,
            None,
            "it owes an answer and is not waited for"
        );
        answer.send(3).unwrap();
        // Its task takes the answer and makes room.
        drop(asked.0.acquire().await.unwrap());
        assert_eq!(asked.ask(patient, Box::pin(async { 4 })).await, Some(4));
    }
}
