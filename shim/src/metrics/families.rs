//! Every family that is exposed: name, kind, meaning. docs/observability.md has the same list, with labels.
//! Knows no figure.

use std::borrow::Cow;

use super::text::{Kind, Meta};

macro_rules! families {
    ($($(#[$doc:meta])* $id:ident: $kind:ident $name:literal, $help:literal;)+) => {
        $($(#[$doc])* pub const $id: &Meta =
            &Meta { name: Cow::Borrowed($name), kind: Kind::$kind, help: Cow::Borrowed($help) };)+

        /// All of them, but for the counters of a machine monitor, which tells their names itself.
        pub const ALL: &[&Meta] = &[$($id),+];
    };
}

families! {
    /// Label `version`.
    SHIM_INFO: Gauge "bulkhead_shim_info", "Always 1; the label says which shim this is.";
    /// On the host's clock.
    SHIM_START: Gauge "bulkhead_shim_start_time_seconds", "When the shim was started, since the epoch.";
    /// Labels `method` and `result`.
    REQUESTS: Counter "bulkhead_shim_requests_total", "Requests of containerd that were answered.";
    /// Label `method`.
    LATENCY: Histogram "bulkhead_shim_request_duration_seconds",
        "How long requests took to be answered; Wait is left out, which lasts as long as its process.";
    /// Taken by containerd.
    EVENTS_SENT: Counter "bulkhead_shim_events_sent_total", "Events that containerd has taken.";
    /// Each attempt but the first.
    EVENTS_RETRIED: Counter "bulkhead_shim_events_retried_total", "Further attempts to send an event.";
    /// Lost.
    EVENTS_DROPPED: Counter "bulkhead_shim_events_dropped_total", "Events that were given up.";
    /// Not yet taken.
    EVENTS_QUEUED: Gauge "bulkhead_shim_events_queued", "Events that wait to be sent.";
    /// To and from the guest.
    STREAMS: Gauge "bulkhead_shim_open_streams", "Streams between guest and host that are being copied.";
    /// Label `part`.
    SCRAPE_ERRORS: Counter "bulkhead_scrape_errors_total",
        "Scrapes that had to leave a part out because it did not answer in time or failed.";

    /// Label `process`.
    PROCESS_CPU: Counter "bulkhead_process_cpu_seconds_total",
        "Time of the host's processors that a process of the pod has used.";
    /// Label `process`.
    PROCESS_MEMORY: Gauge "bulkhead_process_resident_memory_bytes",
        "Memory of the host that a process of the pod has; the guest's own is in several of them.";

    /// 0 or 1.
    MACHINE_UP: Gauge "bulkhead_machine_up", "Whether the machine runs.";
    /// Label `backend`.
    MACHINE_INFO: Gauge "bulkhead_machine_info", "Always 1; the label says what kind of machine it is.";
    /// Processors.
    MACHINE_VCPUS: Gauge "bulkhead_machine_vcpus", "Processors of the machine.";
    /// Size.
    MACHINE_MEMORY: Gauge "bulkhead_machine_memory_bytes", "Memory of the machine.";
    /// Label `stage`.
    MACHINE_BOOT: Gauge "bulkhead_machine_boot_seconds", "How long a stage of the machine's start took.";

    /// What the pod costs the host.
    POD_CPU: Counter "bulkhead_pod_cpu_seconds_total",
        "Time of the host's processors that the pod has used, its machine included.";
    /// What the pod costs the host.
    POD_MEMORY: Gauge "bulkhead_pod_memory_bytes", "Memory of the host that is counted to the pod.";
    /// What the pod costs the host.
    POD_PIDS: Gauge "bulkhead_pod_pids", "Tasks of the host that are counted to the pod.";
    /// What the pod costs the host.
    POD_OOM_KILLS: Counter "bulkhead_pod_oom_kills_total",
        "Processes of the pod on the host that the kernel has killed for want of memory.";

    /// Label `container`, as of all that follow.
    CPU: Counter "bulkhead_container_cpu_seconds_total", "Time of the guest's processors that was used.";
    /// In user mode.
    CPU_USER: Counter "bulkhead_container_cpu_user_seconds_total", "Of that, in user mode.";
    /// In the kernel.
    CPU_SYSTEM: Counter "bulkhead_container_cpu_system_seconds_total", "Of that, in the kernel.";
    /// By the quota.
    CPU_THROTTLED: Counter "bulkhead_container_cpu_throttled_seconds_total",
        "Time that was not given because the quota was used up.";
    /// memory.current.
    MEMORY: Gauge "bulkhead_container_memory_bytes", "Memory in use, file cache included.";
    /// memory.max.
    MEMORY_LIMIT: Gauge "bulkhead_container_memory_limit_bytes", "The limit; absent where there is none.";
    /// memory.peak.
    MEMORY_PEAK: Gauge "bulkhead_container_memory_peak_bytes", "The most memory that was in use.";
    /// memory.events.
    OOM_KILLS: Counter "bulkhead_container_oom_kills_total",
        "Processes that the guest's kernel has killed for want of memory.";
    /// pids.current.
    PIDS: Gauge "bulkhead_container_pids", "Tasks in the container.";
    /// pids.max.
    PIDS_LIMIT: Gauge "bulkhead_container_pids_limit", "The limit; absent where there is none.";
    /// Label `device`, as of all that follow.
    IO_READ: Counter "bulkhead_container_io_read_bytes_total", "Bytes read from a block device of the guest.";
    /// io.stat.
    IO_WRITTEN: Counter "bulkhead_container_io_written_bytes_total",
        "Bytes written to a block device of the guest.";
    /// io.stat.
    IO_READS: Counter "bulkhead_container_io_reads_total", "Reads from a block device of the guest.";
    /// io.stat.
    IO_WRITES: Counter "bulkhead_container_io_writes_total", "Writes to a block device of the guest.";

    /// Label `status`. Of the node, by the command.
    NODE_PODS: Gauge "bulkhead_pods", "Pods on this node.";
    /// Of the node, by the command.
    NODE_SCRAPED: Gauge "bulkhead_pod_scraped", "Whether the shim of a pod told its figures.";
}

/// A counter of a device of the machine monitor; none if a name cannot be one. `part` is the device's name there,
/// such as `net0`.
pub fn of_monitor(part: &str, counter: &str) -> Option<Meta> {
    let kind = match part.trim_end_matches(|c: char| c.is_ascii_digit()) {
        // What is put into a spare slot is a disk.
        "spare" => "block",
        kind => kind,
    };
    let name = format!("bulkhead_vmm_{kind}_{counter}_total");
    let fits = super::text::is_name(kind) && super::text::is_name(counter) && name.len() <= 100;
    let help = format!("As bulkhead-vmm counts it: {counter} of a device of kind {kind}.");
    fits.then(|| Meta { name: name.into(), kind: Kind::Counter, help: help.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_conventions_and_are_all_documented() {
        let docs = include_str!("../../../docs/observability.md");
        for meta in ALL {
            let (name, kind) = (&meta.name, meta.kind);
            assert!(name.starts_with("bulkhead_") && super::super::text::is_name(name), "{name}");
            assert_eq!(name.ends_with("_total"), kind == Kind::Counter, "{name}");
            let row = format!("| `{name}` | {} |", kind.as_str());
            assert!(docs.contains(&row), "docs/observability.md lacks {row}");
        }
    }

    #[test]
    fn counters_of_the_monitor_are_named_by_kind() {
        assert_eq!(of_monitor("net0", "rx_frames").unwrap().name, "bulkhead_vmm_net_rx_frames_total");
        assert_eq!(of_monitor("spare1", "requests").unwrap().name, "bulkhead_vmm_block_requests_total");
        for (part, counter) in
            [("7", "x"), ("net0", "a b"), ("n\n", "x"), ("net0", ""), (&"x".repeat(99), "y")]
        {
            assert_eq!(of_monitor(part, counter), None, "{part:?} {counter:?}");
        }
    }
}
