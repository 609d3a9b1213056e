//! What the shim counts of itself.
//! Knows names of methods and results; does not know who shows the figures.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use super::{families, text::Exposition};

/// Upper bounds of the latencies that are told apart, in milliseconds.
const BOUNDS: [u64; 8] = [1, 5, 25, 100, 500, 1_000, 2_500, 10_000];

/// A part of a scrape that can fail by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// What the agent tells of containers.
    Guest,
    /// What the machine monitor counts.
    Monitor,
    /// What the host's kernel counts.
    Host,
}

impl Part {
    const ALL: [Part; 3] = [Part::Guest, Part::Monitor, Part::Host];

    fn as_str(self) -> &'static str {
        match self {
            Part::Guest => "guest",
            Part::Monitor => "vmm",
            Part::Host => "host",
        }
    }
}

#[derive(Default)]
struct Method {
    results: BTreeMap<&'static str, u64>,
    /// How many took up to each of [`BOUNDS`], those of the bounds before not among them.
    buckets: [u64; BOUNDS.len()],
    timed: u64,
    sum: Duration,
}

/// The counters of one shim.
pub struct Counters {
    began: SystemTime,
    methods: Mutex<BTreeMap<&'static str, Method>>,
    events: AtomicU64,
    sent: AtomicU64,
    retried: AtomicU64,
    dropped: AtomicU64,
    streams: AtomicU64,
    failed: [AtomicU64; Part::ALL.len()],
    stages: Mutex<Vec<(&'static str, Duration)>>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            began: SystemTime::now(),
            methods: Mutex::default(),
            events: AtomicU64::default(),
            sent: AtomicU64::default(),
            retried: AtomicU64::default(),
            dropped: AtomicU64::default(),
            streams: AtomicU64::default(),
            failed: Default::default(),
            stages: Mutex::default(),
        }
    }
}

/// Counts a stream as open while it lives.
pub struct OpenStream(Arc<Counters>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Counters {
    /// A request was answered; `took` is none for one that waits for something else than us.
    pub fn answered(&self, method: &'static str, result: &'static str, took: Option<Duration>) {
        let mut methods = lock(&self.methods);
        let method = methods.entry(method).or_default();
        *method.results.entry(result).or_default() += 1;
        let Some(took) = took else { return };
        method.timed += 1;
        method.sum += took;
        if let Some(at) = BOUNDS.iter().position(|bound| took <= Duration::from_millis(*bound)) {
            method.buckets[at] += 1;
        }
    }

    /// An event waits to be sent.
    pub fn event_queued(&self) {
        self.events.fetch_add(1, Ordering::Relaxed);
    }

    /// containerd has taken an event.
    pub fn event_sent(&self) {
        self.sent.fetch_add(1, Ordering::Relaxed);
    }

    /// An event is sent once more.
    pub fn event_retried(&self) {
        self.retried.fetch_add(1, Ordering::Relaxed);
    }

    /// An event was given up.
    pub fn event_dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// A stream is open until what this answers is dropped.
    pub fn stream(self: &Arc<Self>) -> OpenStream {
        self.streams.fetch_add(1, Ordering::Relaxed);
        OpenStream(self.clone())
    }

    /// A scrape has left a part out.
    pub fn scrape_failed(&self, part: Part) {
        self.failed[part as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// A stage of the machine's start took so long.
    pub fn stage(&self, name: &'static str, took: Duration) {
        lock(&self.stages).push((name, took));
    }

    /// Adds all of them to a page.
    pub fn tell(&self, page: &mut Exposition) {
        let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
        page.put(families::SHIM_INFO, &[("version", env!("CARGO_PKG_VERSION"))], 1);
        let began = self.began.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        page.put(families::SHIM_START, &[], began);
        for (name, method) in &*lock(&self.methods) {
            for (result, count) in &method.results {
                page.put(families::REQUESTS, &[("method", name), ("result", result)], *count);
            }
            if method.timed == 0 {
                continue;
            }
            let mut within = 0;
            let bounds = BOUNDS.iter().zip(&method.buckets).map(|(bound, count)| {
                within += count;
                (Duration::from_millis(*bound), within)
            });
            let bounds: Vec<_> = bounds.collect();
            page.put_histogram(families::LATENCY, &[("method", name)], &bounds, method.timed, method.sum);
        }
        let (sent, dropped) = (get(&self.sent), get(&self.dropped));
        page.put(families::EVENTS_SENT, &[], sent);
        page.put(families::EVENTS_RETRIED, &[], get(&self.retried));
        page.put(families::EVENTS_DROPPED, &[], dropped);
        page.put(families::EVENTS_QUEUED, &[], get(&self.events).saturating_sub(sent + dropped));
        page.put(families::STREAMS, &[], get(&self.streams));
        for part in Part::ALL {
            let failed = get(&self.failed[part as usize]);
            page.put(families::SCRAPE_ERRORS, &[("part", part.as_str())], failed);
        }
        for (stage, took) in &*lock(&self.stages) {
            page.put(families::MACHINE_BOOT, &[("stage", stage)], *took);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(counters: &Counters) -> String {
        let mut page = Exposition::default();
        counters.tell(&mut page);
        let text = page.to_string();
        assert_eq!(Exposition::parse(&text).unwrap().to_string(), text);
        text
    }

    #[test]
    fn requests_are_told_by_method_and_result_and_waits_are_not_timed() {
        let counters = Counters::default();
        counters.answered("Start", "ok", Some(Duration::from_millis(5)));
        counters.answered("Start", "not_found", Some(Duration::from_secs(60)));
        counters.answered("Wait", "ok", None);
        let text = told(&counters);
        for line in [
            "bulkhead_shim_requests_total{method=\"Start\",result=\"ok\"} 1",
            "bulkhead_shim_requests_total{method=\"Start\",result=\"not_found\"} 1",
            "bulkhead_shim_requests_total{method=\"Wait\",result=\"ok\"} 1",
            "bulkhead_shim_request_duration_seconds_bucket{method=\"Start\",le=\"0.001\"} 0",
            "bulkhead_shim_request_duration_seconds_bucket{method=\"Start\",le=\"0.005\"} 1",
            "bulkhead_shim_request_duration_seconds_bucket{method=\"Start\",le=\"10\"} 1",
            "bulkhead_shim_request_duration_seconds_bucket{method=\"Start\",le=\"+Inf\"} 2",
            "bulkhead_shim_request_duration_seconds_sum{method=\"Start\"} 60.005",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("duration_seconds_count{method=\"Wait\"}"), "{text}");
    }

    #[test]
    fn what_comes_and_goes_is_told_as_it_is() {
        let counters = Arc::new(Counters::default());
        let (one, two) = (counters.stream(), counters.stream());
        drop(one);
        for _ in 0..3 {
            counters.event_queued();
        }
        counters.event_sent();
        counters.event_retried();
        counters.event_dropped();
        counters.scrape_failed(Part::Monitor);
        let text = told(&counters);
        for line in [
            "bulkhead_shim_open_streams 1",
            "bulkhead_shim_events_queued 1",
            "bulkhead_shim_events_retried_total 1",
            "bulkhead_scrape_errors_total{part=\"vmm\"} 1",
            "bulkhead_scrape_errors_total{part=\"guest\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        drop(two);
        assert!(told(&counters).contains("bulkhead_shim_open_streams 0\n"));
    }
}
