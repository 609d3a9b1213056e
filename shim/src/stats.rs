//! Turns a container's cgroup v2 files into the message that containerd's clients read.
//! Knows the kernel's text formats (Documentation/admin-guide/cgroup-v2.rst); asks nobody.

use std::collections::HashMap;

use containerd_shim_protos::{
    cgroups_v2::metrics::{
        CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
    },
    protobuf::MessageField,
};

/// The figures in `files`, which maps names like `cpu.stat` to what the kernel printed. The files come
/// from the guest and are not trusted: what cannot be read counts as zero.
pub fn metrics(files: &HashMap<String, Vec<u8>>) -> Metrics {
    let files = Files(files);
    Metrics {
        pids: MessageField::some(PidsStat {
            current: files.number("pids.current"),
            limit: files.number("pids.max"),
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(&files)),
        memory: MessageField::some(memory(&files)),
        memory_events: MessageField::some(memory_events(&files)),
        io: MessageField::some(io(&files)),
        hugetlb: hugetlb(&files),
        ..Default::default()
    }
}

struct Files<'a>(&'a HashMap<String, Vec<u8>>);

impl Files<'_> {
    fn text(&self, name: &str) -> &str {
        self.0.get(name).and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or_default()
    }

    /// A file with one number; "max" is the largest.
    fn number(&self, name: &str) -> u64 {
        limit(self.text(name).trim())
    }

    /// A file with a key and a number on each line.
    fn keyed(&self, name: &str) -> HashMap<&str, u64> {
        self.text(name)
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(key, value)| (key, limit(value.trim())))
            .collect()
    }
}

fn limit(text: &str) -> u64 {
    if text == "max" { u64::MAX } else { text.parse().unwrap_or(0) }
}

fn cpu(files: &Files<'_>) -> CPUStat {
    let stat = files.keyed("cpu.stat");
    let get = |key| stat.get(key).copied().unwrap_or(0);
    CPUStat {
        usage_usec: get("usage_usec"),
        user_usec: get("user_usec"),
        system_usec: get("system_usec"),
        nr_periods: get("nr_periods"),
        nr_throttled: get("nr_throttled"),
        throttled_usec: get("throttled_usec"),
        nr_bursts: get("nr_bursts"),
        burst_usec: get("burst_usec"),
        ..Default::default()
    }
}

fn memory(files: &Files<'_>) -> MemoryStat {
    let stat = files.keyed("memory.stat");
    let get = |key| stat.get(key).copied().unwrap_or(0);
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        // Split into anon and file since Linux 5.9.
        workingset_refault: get("workingset_refault_anon") + get("workingset_refault_file"),
        workingset_activate: get("workingset_activate_anon") + get("workingset_activate_file"),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: files.number("memory.current"),
        usage_limit: files.number("memory.max"),
        swap_usage: files.number("memory.swap.current"),
        swap_limit: files.number("memory.swap.max"),
        max_usage: files.number("memory.peak"),
        swap_max_usage: files.number("memory.swap.peak"),
        ..Default::default()
    }
}

fn memory_events(files: &Files<'_>) -> MemoryEvents {
    let events = files.keyed("memory.events");
    let get = |key| events.get(key).copied().unwrap_or(0);
    MemoryEvents {
        low: get("low"),
        high: get("high"),
        max: get("max"),
        oom: get("oom"),
        oom_kill: get("oom_kill"),
        oom_group_kill: get("oom_group_kill"),
        ..Default::default()
    }
}

/// Lines like `254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`.
fn io(files: &Files<'_>) -> IOStat {
    let usage = files.text("io.stat").lines().filter_map(|line| {
        let (device, rest) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let values: HashMap<&str, u64> =
            rest.split(' ').filter_map(|p| p.split_once('=')).map(|(k, v)| (k, limit(v))).collect();
        let get = |key| values.get(key).copied().unwrap_or(0);
        Some(IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: get("rbytes"),
            wbytes: get("wbytes"),
            rios: get("rios"),
            wios: get("wios"),
            ..Default::default()
        })
    });
    IOStat { usage: usage.collect(), ..Default::default() }
}

/// Files like `hugetlb.2MB.current`.
fn hugetlb(files: &Files<'_>) -> Vec<HugeTlbStat> {
    let mut sizes: Vec<&str> = files
        .0
        .keys()
        .filter_map(|name| name.strip_prefix("hugetlb.")?.strip_suffix(".current"))
        .filter(|size| !size.ends_with("rsvd"))
        .collect();
    sizes.sort_unstable();
    sizes
        .into_iter()
        .map(|size| HugeTlbStat {
            pagesize: size.to_owned(),
            current: files.number(&format!("hugetlb.{size}.current")),
            max: files.number(&format!("hugetlb.{size}.max")),
            failcnt: files.keyed(&format!("hugetlb.{size}.events")).get("max").copied().unwrap_or(0),
            ..Default::default()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(files: &[(&str, &str)]) -> Metrics {
        metrics(&files.iter().map(|(n, t)| ((*n).to_owned(), t.as_bytes().to_vec())).collect())
    }

    #[test]
    fn figures_are_read_from_the_kernels_files() {
        let m = of(&[
            ("cpu.stat", "usage_usec 12\nuser_usec 7\nsystem_usec 5\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1\nworkingset_refault_anon 2\nworkingset_refault_file 3\n"),
            ("memory.events", "oom_kill 4\n"),
            ("pids.current", "3\n"),
            ("io.stat", "254:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:0\n"),
            ("hugetlb.2MB.current", "0\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
        ]);
        assert_eq!(m.cpu.usage_usec, 12);
        assert_eq!((m.memory.usage, m.memory.usage_limit, m.memory.anon), (4096, u64::MAX, 1));
        assert_eq!(m.memory.workingset_refault, 5);
        assert_eq!(m.memory_events.oom_kill, 4);
        assert_eq!(m.pids.current, 3);
        assert_eq!((m.io.usage[0].major, m.io.usage[0].minor, m.io.usage[0].wbytes), (254, 16, 2));
        assert_eq!(m.hugetlb.len(), 1);
    }

    proptest! {
        #[test]
        fn any_text_from_the_guest_is_survived(name in "(cpu.stat|io.stat|memory.max|hugetlb.x.current)", text: Vec<u8>) {
            let _ = metrics(&HashMap::from([(name, text)]));
        }
    }
}
