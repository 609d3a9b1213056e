//! How large a machine is.
//! Knows the spec's resources and the configuration, nothing of devices and mounts.

use std::collections::HashMap;

use bulkhead_vmm_spec::SizeMib;
use oci_spec::runtime::Spec;

use super::{
    HostFacts, PodConfig,
    resize::{Limits, millis, with_descriptions},
};
use crate::{
    config::Config,
    error::{Fault, Kind},
};

/// containerd's CRI puts the sums over a pod's containers here, on the sandbox (contract, C2).
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const POD_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizing {
    /// Processors.
    pub vcpus: u32,
    /// The workload's memory and the guest's reserve together.
    pub memory: SizeMib,
    /// Of it the guest's reserve.
    pub reserve: SizeMib,
    /// Processors that it can be given while it runs.
    pub max_vcpus: u32,
    /// Memory that it can be given while it runs, that of its boot among it.
    pub max_memory: SizeMib,
    /// What the pod has stated for its workload; what it has not is the configuration's default.
    pub stated: Limits,
    /// The configuration's default for a workload's memory.
    pub default_memory: SizeMib,
}

/// Processors that a machine has room for unless `sandbox.max_vcpus` says how many: the descriptions of so many fit
/// into one page of 2 MiB of the guest (each is of 256 KiB then, setup_percpu's unit), and the host has to keep a
/// processor for each.
const ROOM: u32 = 8;

impl Sizing {
    /// The memory that has to be kept ready, in steps of `step`.
    pub fn growth(&self, step: SizeMib) -> SizeMib {
        let more = SizeMib(self.max_memory.0.saturating_sub(self.memory.0));
        SizeMib(with_descriptions(more).0.next_multiple_of(step.0))
    }

    /// What the guest's kernel is told of its own tables, as words of its command line. Left to itself it
    /// sizes them for a host of that much memory: 4.9 of the 66.9 MiB that an idle guest of 1152 MiB had touched.
    pub fn kernel_words(&self) -> String {
        // Each is filled at boot, and must be a power of two, to which the kernel rounds up: 9216 connections
        // (one for 128 KiB, net/ipv4/tcp.c) to 16384.
        let rounded_down = |entries: u64| 1 << entries.max(1).ilog2();
        let connections: u64 = rounded_down(self.memory.bytes() >> 17);
        // The kernel has one for 8 KiB (fs/dcache.c), for a host's many trees of files.
        let names: u64 = rounded_down(self.memory.bytes() >> 15);
        let mut words = format!(
            "dhash_entries={names} ihash_entries={} thash_entries={connections} nf_conntrack.hashsize={}",
            names / 2,
            self.tracked() / TRACKED_PER_BUCKET
        );
        if self.memory < SMALL {
            // The allocator takes one page at a time for small objects, not eight, of which most stay empty.
            words.push_str(" slab_max_order=0");
        }
        words
    }

    /// How many connections a kernel with this memory tracks by default (`nf_conntrack_init_start` in
    /// net/netfilter/nf_conntrack_core.c): as many as it has buckets, unless it is told how many these are.
    fn tracked(&self) -> u64 {
        match self.memory {
            memory if memory > SizeMib(4096) => 262_144,
            memory if memory > SizeMib(1024) => 65_536,
            memory => (memory.bytes() >> 17).max(1024),
        }
    }
}

/// A kernel that is told how many buckets it has tracks as many connections in each (same function).
const TRACKED_PER_BUCKET: u64 = 8;
/// Below it the memory that an allocator holds in reserve counts more than its speed on many processors.
const SMALL: SizeMib = SizeMib(4096);

/// The size for a sandbox whose first container has `spec`.
pub(super) fn size(config: &Config, spec: &Spec, facts: &HostFacts) -> Result<Sizing, Fault> {
    let none = HashMap::new();
    let annotations = spec.annotations().as_ref().unwrap_or(&none);
    let memory = number(annotations, POD_MEMORY)?.or_else(|| memory_limit(spec));
    let pod_cpus = match (number(annotations, POD_QUOTA)?, number(annotations, POD_PERIOD)?) {
        (Some(quota), Some(period)) if quota > 0 && period > 0 => Some((quota, period)),
        _ => None,
    };
    Ok(fit(config, memory, pod_cpus.or_else(|| cpu_limit(spec)), facts))
}

/// The size for a pod that states the sums over its containers.
pub(super) fn of_pod(config: &Config, pod: &PodConfig, facts: &HostFacts) -> Sizing {
    let cpus = (pod.cpu_quota > 0 && pod.cpu_period > 0).then_some((pod.cpu_quota, pod.cpu_period));
    fit(config, Some(pod.memory_limit), cpus, facts)
}

/// The guest's own reserve comes on top of the workload's limit, never out of it.
fn fit(config: &Config, memory: Option<i64>, cpus: Option<(i64, i64)>, facts: &HostFacts) -> Sizing {
    let limit = memory.and_then(|bytes| u64::try_from(bytes).ok()).filter(|&bytes| bytes > 0);
    let workload = limit.map_or(SizeMib(config.sandbox.memory_mib), SizeMib::holding);
    let reserve = SizeMib(config.sandbox.memory_reserve_mib);
    // Whole 2 MiB pages, so that the host can back all of it with them.
    let memory = SizeMib((workload.0 + reserve.0).next_multiple_of(2));
    let cpu_millis = cpus.and_then(|(quota, period)| millis(quota, period.unsigned_abs()));
    let wanted = cpu_millis.map_or(config.sandbox.vcpus.into(), |millis| millis.div_ceil(1000));
    let most = match config.sandbox.max_vcpus {
        0 => facts.cpus,
        max => max.min(facts.cpus),
    };
    let vcpus = wanted.clamp(1, most.max(1).into()) as u32;
    let max_vcpus = if config.sandbox.max_vcpus == 0 { most.min(ROOM) } else { most };
    let max_memory = match config.sandbox.max_memory_mib {
        0 => facts.memory,
        max => SizeMib(max),
    };
    Sizing {
        vcpus,
        memory,
        reserve,
        max_vcpus: max_vcpus.max(vcpus),
        max_memory: max_memory.max(memory),
        stated: Limits { memory: limit, cpu_millis },
        default_memory: SizeMib(config.sandbox.memory_mib),
    }
}

fn memory_limit(spec: &Spec) -> Option<i64> {
    spec.linux().as_ref()?.resources().as_ref()?.memory().as_ref()?.limit()
}

fn cpu_limit(spec: &Spec) -> Option<(i64, i64)> {
    let cpu = spec.linux().as_ref()?.resources().as_ref()?.cpu().as_ref()?.clone();
    let quota = cpu.quota().filter(|&q| q > 0)?;
    // The kernel's default period (Documentation/scheduler/sched-bwc.rst).
    Some((quota, cpu.period().filter(|&p| p > 0).unwrap_or(100_000) as i64))
}

fn number(annotations: &HashMap<String, String>, key: &str) -> Result<Option<i64>, Fault> {
    let Some(text) = annotations.get(key) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| {
        Fault::new(Kind::InvalidArgument, format!("annotation {key} is {text:?}, which is not a number"))
    })
}
