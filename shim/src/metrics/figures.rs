//! Puts figures of machines, processes and control groups onto a page.
//! Knows the kernel's text formats and the families; asks nobody.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use super::{families, text::Exposition};

/// Files of a control group by name.
pub type Files = HashMap<String, Vec<u8>>;

/// The most devices and counters of one that a machine monitor is believed.
const MOST: usize = 64;

/// Clock ticks a second in /proc (USER_HZ, the same on every x86 kernel; proc(5)).
const TICKS: u64 = 100;
/// Bytes of a page (x86-64).
const PAGE: u64 = 4096;

fn text<'a>(files: &'a Files, name: &str) -> &'a str {
    files.get(name).and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or_default()
}

/// A file with one number; none for "max".
fn number(files: &Files, name: &str) -> Option<u64> {
    text(files, name).trim().parse().ok()
}

/// The number behind a key in a file with a key and a number on each line.
fn keyed(files: &Files, name: &str, key: &str) -> Option<u64> {
    text(files, name).lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

fn seconds(files: &Files, key: &str) -> Option<Duration> {
    keyed(files, "cpu.stat", key).map(Duration::from_micros)
}

/// What a container uses in the guest. The files come from there and are not trusted: what cannot be read is
/// left out.
pub fn container(page: &mut Exposition, id: &str, files: &Files) {
    let labels = [("container", id)];
    for (meta, key) in [
        (families::CPU, "usage_usec"),
        (families::CPU_USER, "user_usec"),
        (families::CPU_SYSTEM, "system_usec"),
        (families::CPU_THROTTLED, "throttled_usec"),
    ] {
        if let Some(time) = seconds(files, key) {
            page.put(meta, &labels, time);
        }
    }
    for (meta, value) in [
        (families::MEMORY, number(files, "memory.current")),
        (families::MEMORY_LIMIT, number(files, "memory.max")),
        (families::MEMORY_PEAK, number(files, "memory.peak")),
        (families::OOM_KILLS, keyed(files, "memory.events", "oom_kill")),
        (families::PIDS, number(files, "pids.current")),
        (families::PIDS_LIMIT, number(files, "pids.max")),
    ] {
        if let Some(value) = value {
            page.put(meta, &labels, value);
        }
    }
    let mut seen = HashSet::new();
    for line in text(files, "io.stat").lines().take(MOST) {
        let mut words = line.split(' ');
        let Some(device) = words.next() else { continue };
        // Told twice it would spoil the page.
        if !is_device(device) || !seen.insert(device) {
            continue;
        }
        let values: HashMap<&str, &str> = words.filter_map(|word| word.split_once('=')).collect();
        for (meta, key) in [
            (families::IO_READ, "rbytes"),
            (families::IO_WRITTEN, "wbytes"),
            (families::IO_READS, "rios"),
            (families::IO_WRITES, "wios"),
        ] {
            if let Some(value) = values.get(key).and_then(|value| value.parse::<u64>().ok()) {
                page.put(meta, &[("container", id), ("device", device)], value);
            }
        }
    }
}

/// Two numbers of a device, as the kernel prints them.
fn is_device(text: &str) -> bool {
    let number = |text: &str| text.parse::<u32>().is_ok_and(|n| n.to_string() == text);
    text.split_once(':').is_some_and(|(major, minor)| number(major) && number(minor))
}

/// What the host counts to a pod.
pub fn pod(page: &mut Exposition, files: &Files, oom_kills: u64) {
    if let Some(time) = seconds(files, "usage_usec") {
        page.put(families::POD_CPU, &[], time);
    }
    for (meta, name) in [(families::POD_MEMORY, "memory.current"), (families::POD_PIDS, "pids.current")] {
        if let Some(value) = number(files, name) {
            page.put(meta, &[], value);
        }
    }
    if !files.is_empty() {
        page.put(families::POD_OOM_KILLS, &[], oom_kills);
    }
}

/// What a process uses: `stat` is its /proc/<pid>/stat.
pub fn process(page: &mut Exposition, name: &str, stat: &str) {
    // The name in field 2 may hold blanks and brackets; the last ')' ends it. Numbers are those of proc(5).
    let after_name = stat.rfind(')').map(|at| &stat[at + 1..]).unwrap_or_default();
    let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).and_then(|field| field.parse::<u64>().ok());
    let labels = [("process", name)];
    if let (Some(user), Some(system)) = (field(14), field(15)) {
        let time = Duration::from_millis((user + system) * (1000 / TICKS));
        page.put(families::PROCESS_CPU, &labels, time);
    }
    if let Some(pages) = field(24) {
        page.put(families::PROCESS_MEMORY, &labels, pages * PAGE);
    }
}

/// The counters of a machine monitor, by device and name. It is jailed and not trusted: odd names are left out.
pub fn monitor<'a>(
    page: &mut Exposition,
    counters: impl IntoIterator<Item = (&'a String, &'a BTreeMap<String, u64>)>,
) {
    for (part, counts) in counters.into_iter().take(MOST) {
        for (name, count) in counts.iter().take(MOST) {
            if let Some(meta) = families::of_monitor(part, name) {
                page.put(&meta, &[("device", part)], *count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn files(list: &[(&str, &str)]) -> Files {
        list.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect()
    }

    #[test]
    fn a_container_is_told_and_what_is_not_limited_has_no_limit() {
        let mut page = Exposition::default();
        let files = files(&[
            ("cpu.stat", "usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.events", "oom 9\noom_kill 2\n"),
            ("pids.current", "3\n"),
            ("pids.max", "100\n"),
            (
                "io.stat",
                "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:0\n254:0 rbytes=9\nx:0 rios=1\n",
            ),
        ]);
        container(&mut page, "web", &files);
        let text = page.to_string();
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            lines,
            [
                "bulkhead_container_cpu_seconds_total{container=\"web\"} 1.5",
                "bulkhead_container_cpu_user_seconds_total{container=\"web\"} 1",
                "bulkhead_container_cpu_system_seconds_total{container=\"web\"} 0.5",
                "bulkhead_container_memory_bytes{container=\"web\"} 4096",
                "bulkhead_container_oom_kills_total{container=\"web\"} 2",
                "bulkhead_container_pids{container=\"web\"} 3",
                "bulkhead_container_pids_limit{container=\"web\"} 100",
                "bulkhead_container_io_read_bytes_total{container=\"web\",device=\"254:0\"} 1",
                "bulkhead_container_io_written_bytes_total{container=\"web\",device=\"254:0\"} 2",
                "bulkhead_container_io_reads_total{container=\"web\",device=\"254:0\"} 3",
                "bulkhead_container_io_writes_total{container=\"web\",device=\"254:0\"} 4",
            ]
        );
    }

    #[test]
    fn we_are_a_process_with_time_and_memory() {
        let stat =
            "7 (a) b) S 1 7 7 0 -1 4194304 1 0 0 0 150 50 0 0 20 0 1 0 42 1000 10 18446744073709551615";
        let mut page = Exposition::default();
        process(&mut page, "vmm", stat);
        let text = page.to_string();
        assert!(text.contains("cpu_seconds_total{process=\"vmm\"} 2\n"), "{text}");
        assert!(text.contains("resident_memory_bytes{process=\"vmm\"} 40960\n"), "{text}");
        let mut page = Exposition::default();
        process(&mut page, "we", &std::fs::read_to_string("/proc/self/stat").unwrap());
        assert_eq!(page.names().count(), 2);
    }

    #[test]
    fn a_group_that_is_not_there_is_no_zero() {
        let mut page = Exposition::default();
        pod(&mut page, &Files::new(), 0);
        assert_eq!(page, Exposition::default());
    }

    #[test]
    fn counters_of_equal_devices_are_one_family() {
        let counts = |n| BTreeMap::from([("rx_frames".to_owned(), n), ("<odd>".to_owned(), 7)]);
        let all = BTreeMap::from([("net0".to_owned(), counts(1)), ("net1".to_owned(), counts(2))]);
        let mut page = Exposition::default();
        monitor(&mut page, &all);
        let text = page.to_string();
        assert!(
            text.ends_with(
                "# TYPE bulkhead_vmm_net_rx_frames_total counter\n\
                 bulkhead_vmm_net_rx_frames_total{device=\"net0\"} 1\n\
                 bulkhead_vmm_net_rx_frames_total{device=\"net1\"} 2\n"
            ),
            "{text}"
        );
        assert_eq!(page.names().count(), 1);
    }

    proptest! {
        #[test]
        fn whatever_a_guest_says_the_page_is_one(
            name in "(cpu.stat|io.stat|memory.max|memory.events|pids.current)",
            bytes: Vec<u8>,
            line in "[0-9:a-z= \"\\\\{}\n]{0,60}",
        ) {
            for content in [bytes, line.into_bytes()] {
                let mut page = Exposition::default();
                container(&mut page, "c", &Files::from([(name.clone(), content)]));
                let text = page.to_string();
                prop_assert_eq!(Exposition::parse(&text).unwrap().to_string(), text);
            }
        }
    }
}
