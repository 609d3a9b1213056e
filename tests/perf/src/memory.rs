//! What pods cost in memory: by process, in proportion where pages are shared, and as a slope over their number.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Context;
use serde::Serialize;

use crate::stats;

/// The memory of a set of processes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Usage {
    /// Proportional set size of all of them.
    pub(crate) pss: u64,
    /// The part of it that lies in memory files: the guests' own memory.
    pub(crate) pss_memfd: u64,
    /// By program.
    pub(crate) pss_by_program: BTreeMap<String, u64>,
}

/// One point of the slope.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Point {
    pub(crate) pods: usize,
    #[serde(flatten)]
    pub(crate) usage: Usage,
    /// Of the whole machine, hence with everybody's noise.
    pub(crate) mem_available: u64,
}

/// Memory over the number of pods.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Growth {
    pub(crate) points: Vec<Point>,
    pub(crate) pss_per_pod: Option<f64>,
    pub(crate) pss_memfd_per_pod: Option<f64>,
    /// What MemAvailable loses with each pod: page cache and kernel memory included.
    pub(crate) available_per_pod: Option<f64>,
}

impl Growth {
    pub(crate) fn of(points: Vec<Point>) -> Self {
        let slope = |pick: fn(&Point) -> f64| {
            stats::slope(&points.iter().map(|point| (point.pods as f64, pick(point))).collect::<Vec<_>>())
        };
        Self {
            pss_per_pod: slope(|point| point.usage.pss as f64),
            pss_memfd_per_pod: slope(|point| point.usage.pss_memfd as f64),
            available_per_pod: slope(|point| -(point.mem_available as f64)),
            points,
        }
    }
}

/// The shims that serve the containers with one of these ids.
pub(crate) fn shims(address: &str, ids: &[String]) -> Vec<u32> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| is_shim(&arguments(*pid), address, ids)).collect()
}

fn is_shim(arguments: &[String], address: &str, ids: &[String]) -> bool {
    let after = |flag: &str| arguments.iter().skip_while(|word| *word != flag).nth(1);
    arguments.first().is_some_and(|program| program.contains("containerd-shim-"))
        && after("-address").is_some_and(|found| found == address)
        && after("-id").is_some_and(|found| ids.contains(found))
}

fn arguments(pid: u32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// A process and all that descend from it.
pub(crate) fn family(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        next += 1;
        for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            found.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
    }
    found
}

/// The processor time of all these processes and of the children that they have waited for, in seconds.
pub(crate) fn cpu_seconds(pids: &[u32]) -> f64 {
    pids.iter()
        .map(|pid| ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default()))
        .sum::<u64>() as f64
        / TICKS_PER_SECOND
}

/// USER_HZ of every architecture that we build for.
const TICKS_PER_SECOND: f64 = 100.0;

/// utime, stime, cutime and cstime (proc_pid_stat(5)), which follow the name in parentheses.
fn ticks(stat: &str) -> u64 {
    let fields = stat.rsplit(") ").next().unwrap_or_default();
    fields.split(' ').skip(11).take(4).filter_map(|field| field.parse::<u64>().ok()).sum()
}

/// The memory of all these processes.
pub(crate) fn usage(pids: &[u32]) -> Usage {
    let mut usage = Usage::default();
    for pid in pids {
        let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
        let (pss, memfd) = pss(&maps);
        usage.pss += pss;
        usage.pss_memfd += memfd;
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        *usage.pss_by_program.entry(name.trim_end().to_owned()).or_default() += pss;
    }
    usage
}

/// PSS of all mappings, and of those of memory files, from the text of /proc/pid/smaps.
fn pss(smaps: &str) -> (u64, u64) {
    let (mut all, mut memfd, mut in_memfd) = (0, 0, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Pss:") => {
                let bytes = words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10;
                all += bytes;
                memfd += if in_memfd { bytes } else { 0 };
            }
            // A mapping's first line begins with its addresses; a field's with a name and a colon.
            Some(word) if !word.ends_with(':') => {
                in_memfd = line.contains("/memfd:") || line.contains("/dev/shm/")
            }
            _ => {}
        }
    }
    (all, memfd)
}

/// The memory of a process that nobody shares, in bytes.
pub(crate) fn private(pid: u32) -> anyhow::Result<u64> {
    let file = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
    Ok(field(&text, "Private_Clean:") + field(&text, "Private_Dirty:"))
}

/// What the machine could still give, in bytes.
pub(crate) fn available() -> u64 {
    field(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable:")
}

/// A figure in kB from one of the kernel's tables, in bytes.
fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// What the agent and its launcher keep resident, from /proc/meminfo and /proc/self/status as a container sees them.
///
/// The container cannot see the agent's process, but the guest has no others: all anonymous and mapped pages of the
/// guest are theirs or the container's own, which its status states.
pub(crate) fn agent_resident(seen: &str) -> Option<u64> {
    let guest = field(seen, "AnonPages:") + field(seen, "Mapped:");
    let own = field(seen, "RssAnon:") + field(seen, "RssFile:") + field(seen, "RssShmem:");
    (guest > 0 && own > 0).then(|| guest.saturating_sub(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_files_are_counted_apart() {
        let smaps = "7f00-7f01 rw-s 00000000 00:01 5 /memfd:ram (deleted)\nSize: 8 kB\nPss: 6 kB\nPss_Dirty: 6 kB\n\
                     7f02-7f03 rw-p 00000000 00:00 0 [heap]\nPss: 4 kB\nVmFlags: rd wr\n";
        assert_eq!(pss(smaps), (10 << 10, 6 << 10));
    }

    #[test]
    fn a_shim_is_known_by_program_address_and_id() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let ids = ["a".to_owned()];
        let shim = words("/x/containerd-shim-runc-v2 -namespace default -id a -address /s");
        assert!(is_shim(&shim, "/s", &ids));
        assert!(!is_shim(&shim, "/other", &ids) && !is_shim(&shim, "/s", &["b".to_owned()]));
        assert!(!is_shim(&words("grep containerd-shim- -id a -address /s"), "/s", &ids));
    }

    #[test]
    fn our_own_usage_is_there() {
        let pid = std::process::id();
        assert!(family(pid).contains(&pid));
        assert!(usage(&[pid]).pss > 1 << 19 && private(pid).unwrap() > 1 << 19 && available() > 1 << 20);
    }

    #[test]
    fn the_agent_is_what_the_container_is_not() {
        let seen = "AnonPages: 3000 kB\nMapped: 2000 kB\nRssAnon: 100 kB\nRssFile: 800 kB\nRssShmem: 0 kB\n";
        assert_eq!(agent_resident(seen), Some(4100 << 10));
        assert_eq!(agent_resident(""), None);
    }

    #[test]
    fn processor_time_is_found_behind_a_name_with_blanks() {
        assert_eq!(ticks("7 (a ) b) S 1 1 1 0 -1 4 0 0 0 0 100 20 3 4 20 0"), 127);
        assert_eq!(ticks(""), 0);
    }

    #[test]
    fn growth_is_a_slope() {
        let point = |pods: usize| Point {
            pods,
            usage: Usage { pss: (10 + 50 * pods) as u64, ..Usage::default() },
            mem_available: 10_000 - 60 * pods as u64,
        };
        let growth = Growth::of(vec![point(1), point(2), point(4)]);
        let near = |slope: Option<f64>, wanted: f64| (slope.unwrap() - wanted).abs() < 1e-6;
        assert!(near(growth.pss_per_pod, 50.0) && near(growth.available_per_pod, 60.0), "{growth:?}");
    }
}
