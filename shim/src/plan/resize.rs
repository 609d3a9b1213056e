//! How large a machine that runs is to be: what its containers may use, and what it can be given.
//! Pure. Knows limits and sums; must not know how a machine changes.
//!
//! ```text
//!  boots with        workload + reserve                        memory never goes below
//!  is to have        max(workload, sum of limits) + reserve    up to sandbox.max_memory_mib
//!                    max(processors, sum of quotas)            up to sandbox.max_vcpus, or what the host has
//! ```
//! The workload is what the pod stated as the sum over its containers, or the configuration's default. Where the pod
//! stated it, a change of a container's limit changes it as well: it is that sum. The default is nobody's sum and stays.
//! A container without a limit is in no sum: where others have one, the default comes on top, once for all of these.

use std::collections::BTreeMap;

use bulkhead_vmm_spec::SizeMib;
use oci_spec::runtime::{LinuxResources, Spec};

use super::Sizing;
use crate::{
    error::{Fault, Kind},
    ids::ContainerId,
};

/// The kernel's default period (Documentation/scheduler/sched-bwc.rst), in microseconds.
const PERIOD: u64 = 100_000;

/// What a container may use. None: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Thousandths of a processor.
    pub cpu_millis: Option<u64>,
}

/// Of a quota and a period in microseconds; a quota that is not positive is none.
pub(super) fn millis(quota: i64, period: u64) -> Option<u64> {
    let quota = u64::try_from(quota).ok().filter(|&quota| quota > 0)?;
    let period = if period == 0 { PERIOD } else { period };
    Some((u128::from(quota) * 1000).div_ceil(period.into()).try_into().unwrap_or(u64::MAX))
}

impl Limits {
    /// Those of a container.
    pub fn of(spec: &Spec) -> Self {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        resources.map_or_else(Self::default, |resources| Self::default().updated(resources))
    }

    /// The same after an update, in which only what is set changes.
    pub fn updated(self, resources: &LinuxResources) -> Self {
        let memory = match resources.memory().as_ref().and_then(|memory| memory.limit()) {
            None | Some(0) => self.memory,
            Some(bytes) => u64::try_from(bytes).ok(),
        };
        let cpu = resources.cpu().as_ref();
        let cpu_millis = match cpu.and_then(|cpu| cpu.quota()) {
            None | Some(0) => self.cpu_millis,
            Some(quota) => millis(quota, cpu.and_then(|cpu| cpu.period()).unwrap_or(0)),
        };
        Self { memory, cpu_millis }
    }
}

/// A size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Processors that run.
    pub vcpus: u32,
    /// All its memory.
    pub memory: SizeMib,
}

/// Who may use how much of a machine.
#[derive(Clone, Debug)]
pub struct Claims {
    sizing: Sizing,
    /// What the pod has stated for all its containers together, as far as updates have left it.
    stated: Limits,
    containers: BTreeMap<ContainerId, Limits>,
}

impl Claims {
    /// Those on a machine that has booted.
    pub fn new(sizing: Sizing) -> Self {
        Self { sizing, stated: sizing.stated, containers: BTreeMap::new() }
    }

    /// What the machine was made with.
    pub fn sizing(&self) -> &Sizing {
        &self.sizing
    }

    /// The containers that have limits here.
    pub fn ids(&self) -> impl Iterator<Item = &ContainerId> {
        self.containers.keys()
    }

    /// With a container that has been added.
    pub fn with(&self, id: &ContainerId, limits: Limits) -> Self {
        let mut claims = self.clone();
        claims.containers.insert(id.clone(), limits);
        claims
    }

    /// Without a container that has gone.
    pub fn without(&self, id: &ContainerId) -> Self {
        let mut claims = self.clone();
        claims.containers.remove(id);
        claims
    }

    /// After an update of one container.
    pub fn updated(&self, id: &ContainerId, resources: &LinuxResources) -> Self {
        let before = self.containers.get(id).copied().unwrap_or_default();
        let after = before.updated(resources);
        let mut claims = self.with(id, after);
        // Without an old or a new limit there is nothing by which the sum would have changed.
        let moved =
            |stated: Option<u64>, before: Option<u64>, after: Option<u64>| match (stated, before, after) {
                (Some(sum), Some(before), Some(after)) => {
                    Some(sum.saturating_sub(before).saturating_add(after))
                }
                _ => stated,
            };
        claims.stated = Limits {
            memory: moved(self.stated.memory, before.memory, after.memory),
            cpu_millis: moved(self.stated.cpu_millis, before.cpu_millis, after.cpu_millis),
        };
        claims
    }

    /// What the machine should have, whether it can or not.
    fn asked(&self) -> (u64, SizeMib) {
        let sum = |of: fn(&Limits) -> Option<u64>| {
            self.containers.values().filter_map(of).fold(0u64, u64::saturating_add)
        };
        let Sizing { vcpus, memory, reserve, .. } = self.sizing;
        let floor = self.stated.cpu_millis.map_or(u64::from(vcpus), |millis| millis.div_ceil(1000));
        let vcpus = floor.max(sum(|limits| limits.cpu_millis).div_ceil(1000)).max(1);
        let workload = SizeMib::holding(self.stated.memory.unwrap_or(0).max(sum(|limits| limits.memory)));
        (vcpus, memory.max(SizeMib(workload.0.saturating_add(reserve.0))))
    }

    /// What containers without a limit get beside those that have one. It is promised to nobody.
    fn for_the_unlimited(&self) -> SizeMib {
        let unlimited = self.containers.values().any(|limits| limits.memory.is_none());
        match self.stated.memory {
            Some(_) if unlimited => self.sizing.default_memory,
            _ => SizeMib(0),
        }
    }

    /// The size for containers that may be promised more than there is, as when a pod is made: what cannot be had
    /// is left out.
    pub fn nearest(&self) -> Size {
        let (vcpus, memory) = self.asked();
        let memory = SizeMib(memory.0.saturating_add(self.for_the_unlimited().0));
        Size {
            vcpus: vcpus.min(self.sizing.max_vcpus.into()) as u32,
            memory: memory.min(self.sizing.max_memory),
        }
    }

    /// The size for a container that is added: processors as when a pod is made, but all of its memory.
    ///
    /// # Errors
    /// The machine cannot have that much memory.
    pub fn added(&self, id: &ContainerId, now: Size) -> Result<Size, Fault> {
        self.check_memory(id, "create", now)?;
        Ok(self.nearest())
    }

    /// The size after an update, in which everything is meant.
    ///
    /// # Errors
    /// The machine cannot have that much.
    pub fn changed(&self, id: &ContainerId, now: Size) -> Result<Size, Fault> {
        self.check_memory(id, "update", now)?;
        let (need, most) = (self.asked().0, self.sizing.max_vcpus);
        if need > most.into() {
            return Err(Fault::new(
                Kind::FailedPrecondition,
                format!(
                    "cannot update container {id}: its pod would need {need} processors, has {} and can have {most} at \
                     most, by sandbox.max_vcpus and what the host has",
                    now.vcpus
                ),
            ));
        }
        Ok(self.nearest())
    }

    fn check_memory(&self, id: &ContainerId, verb: &str, now: Size) -> Result<(), Fault> {
        let (need, most) = (self.asked().1, self.sizing.max_memory);
        if need <= most {
            return Ok(());
        }
        Err(Fault::new(
            Kind::FailedPrecondition,
            format!(
                "cannot {verb} container {id}: its pod would need {} MiB of memory, {} of them for the guest itself, has {} \
                 and can have {} at most, by sandbox.max_memory_mib or what the host has",
                need.0, self.sizing.reserve.0, now.memory.0, most.0
            ),
        ))
    }
}

/// What has to be added to a machine so that it has `more` memory to use: each page that is added takes 64 bytes of
/// the guest's for its description.
pub fn with_descriptions(more: SizeMib) -> SizeMib {
    SizeMib(more.0 + more.0.div_ceil(63))
}

#[cfg(test)]
#[path = "resize_tests.rs"]
mod tests;
