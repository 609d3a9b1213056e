//! Which processors a further process may use, and how the kernel is to schedule it.
//! Knows the fields of the specification that say so; must not know what else a process is.

use std::io;

use libcontainer::syscall::Syscall;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use oci_spec::runtime::{IOPriorityClass, LinuxSchedulerFlag, LinuxSchedulerPolicy, Process, Scheduler};

use super::{last_mile::why, worker::chain};
use crate::sys::SchedAttr;

/// Before the process joins its cgroup.
pub(super) fn initial_affinity(process: &Process) -> Result<(), String> {
    let list = process.exec_cpu_affinity().as_ref().and_then(|affinity| affinity.initial().as_deref());
    set_affinity("initial", list)
}

/// After it has: joining gives it all processors of the cgroup.
pub(super) fn final_affinity(process: &Process) -> Result<(), String> {
    let list = process.exec_cpu_affinity().as_ref().and_then(|a| a.cpu_affinity_final().as_deref());
    set_affinity("final", list)
}

fn set_affinity(field: &str, list: Option<&str>) -> Result<(), String> {
    let Some(list) = list.filter(|list| !list.is_empty()) else { return Ok(()) };
    let set = parse(list).ok_or_else(|| format!("process.execCPUAffinity.{field}: {list:?} is no list"))?;
    sched_setaffinity(Pid::from_raw(0), &set)
        .map_err(|e| format!("process.execCPUAffinity.{field} {list:?}: {}", why(&io::Error::from(e))))
}

/// "0-3,7" (cpuset(7), list format).
fn parse(list: &str) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        for cpu in (first <= last && last < CpuSet::count()).then_some(first..=last)? {
            set.set(cpu).ok()?;
        }
    }
    Some(set)
}

/// Scheduler and I/O priority.
pub(super) fn policy(process: &Process, syscall: &dyn Syscall) -> Result<(), String> {
    if let Some(scheduler) = process.scheduler() {
        crate::sys::set_scheduler(&attributes(scheduler))
            .map_err(|e| format!("process.scheduler: {}", why(&e)))?;
    }
    if let Some(io) = process.io_priority() {
        // linux/ioprio.h
        let class = match io.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        syscall
            .set_io_priority(class, io.priority())
            .map_err(|e| format!("process.ioPriority: {}", chain(&e)))?;
    }
    Ok(())
}

/// As sched_setattr(2) wants it.
fn attributes(scheduler: &Scheduler) -> SchedAttr {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flag = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    };
    SchedAttr {
        policy,
        flags: scheduler.flags().iter().flatten().map(flag).sum(),
        nice: scheduler.nice().unwrap_or(0),
        priority: scheduler.priority().unwrap_or(0) as u32,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
        ..SchedAttr::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_processors_is_read_as_the_kernel_reads_it() {
        let set = parse("0-2,7").unwrap();
        let chosen: Vec<_> = (0..16).filter(|&cpu| set.is_set(cpu).unwrap()).collect();
        assert_eq!(chosen, [0, 1, 2, 7]);
        for wrong in ["", "x", "3-1", "1-", "99999", "0,,1"] {
            assert!(parse(wrong).is_none(), "{wrong:?}");
        }
    }

    #[test]
    fn a_process_that_asks_for_another_policy_gets_it() {
        let scheduler: Scheduler = serde_json::from_value(serde_json::json!({
            "policy": "SCHED_BATCH", "nice": 5, "flags": ["SCHED_RESET_ON_FORK"],
        }))
        .unwrap();
        // On a thread that ends: the test's own keeps its policy.
        std::thread::spawn(move || {
            crate::sys::set_scheduler(&attributes(&scheduler)).unwrap();
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
            // nice and policy are fields 19 and 41 of the whole line (proc_pid_stat(5)).
            assert_eq!((fields[16], fields[38]), ("5", "3"));
        })
        .join()
        .unwrap();
    }
}
