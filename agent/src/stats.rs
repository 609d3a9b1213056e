//! The numbers of a container, as the kernel prints them.
//! Knows file names; must not know what they mean.

use std::{collections::HashMap, fs, io, path::Path};

/// Files that every container has, if the kernel has them.
const FILES: &[&str] = &[
    "cgroup.events",
    "cgroup.stat",
    "cpu.max",
    "cpu.pressure",
    "cpu.stat",
    "cpu.weight",
    "cpuset.cpus.effective",
    "cpuset.mems.effective",
    "io.max",
    "io.pressure",
    "io.stat",
    "memory.current",
    "memory.events",
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.peak",
    "memory.pressure",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.max",
    "pids.current",
    "pids.max",
    "rdma.current",
];

/// Reads them all; what the kernel has not is left out.
pub(crate) fn read(cgroup: &Path) -> io::Result<HashMap<String, Vec<u8>>> {
    let mut files = HashMap::new();
    for entry in fs::read_dir(cgroup)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let huge = name.starts_with("hugetlb.")
            && (name.ends_with(".current") || name.ends_with(".max") || name.ends_with(".events"));
        if huge || FILES.contains(&name.as_str()) {
            // Pressure files exist even where the kernel has pressure accounting switched off.
            if let Ok(content) = fs::read(cgroup.join(&name)) {
                files.insert(name, content);
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_as_they_are_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("memory.current", "42\n"),
            ("hugetlb.2MB.current", "0\n"),
            ("cgroup.kill", ""),
            ("hugetlb.2MB.numa_stat", ""),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let files = read(dir.path()).unwrap();
        assert_eq!(files["memory.current"], b"42\n");
        assert_eq!(files["hugetlb.2MB.current"], b"0\n");
        assert_eq!(files.len(), 2);
    }

    #[test]
    fn a_missing_cgroup_is_an_error() {
        assert!(read(Path::new("/not/there")).is_err());
    }
}
