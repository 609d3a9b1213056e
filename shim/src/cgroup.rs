//! The control group of the host in which a sandbox's processes are counted.
//! Knows cgroup v1 and v2 through cgroups-rs; sets no limits: those hold inside the guest.

use std::{collections::HashMap, path::PathBuf};

use cgroups_rs::{
    CgroupPid,
    fs::{Cgroup, hierarchies},
};

/// The controllers that count. Others (cpuset, devices) would need values of their own in version 1 and
/// tell nothing about a machine's processes.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuacct", "memory", "pids", "freezer"];

/// Why a control group could not be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// It could not be made.
    #[error("control group {path} cannot be created")]
    Create {
        /// Relative to the root of the hierarchy.
        path: String,
        /// Why.
        #[source]
        source: cgroups_rs::fs::error::Error,
    },
    /// A process could not be moved into it.
    #[error("process {pid} cannot be moved into control group {path}")]
    Join {
        /// Relative to the root of the hierarchy.
        path: String,
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: cgroups_rs::fs::error::Error,
    },
    /// It could not be removed.
    #[error("control group {path} cannot be removed")]
    Remove {
        /// Relative to the root of the hierarchy.
        path: String,
        /// Why.
        #[source]
        source: cgroups_rs::fs::error::Error,
    },
}

/// The path under which a sandbox is counted, relative to the root of a hierarchy: what the OCI spec asks
/// for, in either of its two spellings, else a path of our own.
///
/// The systemd spelling `slice:prefix:name` becomes the directory that systemd would use, e.g.
/// `a-b.slice:cri:x` is `a.slice/a-b.slice/cri-x.scope` (systemd.slice(5)).
pub fn path_for(spec: Option<&str>, namespace: &str, id: &str) -> String {
    let spec = spec.unwrap_or_default().trim_matches('/');
    if spec.is_empty() {
        return format!("bulkhead/{namespace}/{id}");
    }
    let parts: Vec<&str> = spec.split(':').collect();
    let [slice, prefix, name] = parts[..] else { return spec.to_owned() };
    let mut path = String::new();
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut so_far = String::new();
    for part in stem.split('-').filter(|p| !p.is_empty()) {
        if !so_far.is_empty() {
            so_far.push('-');
        }
        so_far.push_str(part);
        path.push_str(&format!("{so_far}.slice/"));
    }
    path + &format!("{prefix}-{name}.scope")
}

/// The group of `id` below the parent of its pod, in the spelling of an OCI spec: systemd's for a slice.
pub fn below(parent: &str, id: &str) -> String {
    match parent.trim_end_matches('/').rsplit('/').next() {
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        _ => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

/// `path` and those of its parents that do not exist yet, the outermost first: what creating it will make.
pub fn missing(path: &str) -> Vec<String> {
    let mut wanted = Vec::new();
    let mut at = path.trim_matches('/');
    while !at.is_empty() {
        if !load(at).exists() {
            wanted.push(at.to_owned());
        }
        at = at.rsplit_once('/').map_or("", |(parent, _)| parent);
    }
    wanted.reverse();
    wanted
}

/// Makes the group.
pub fn create(path: &str) -> Result<(), CgroupError> {
    load(path).create().map_err(|source| CgroupError::Create { path: path.to_owned(), source })
}

/// Moves a process with all its threads into the group.
pub fn join(path: &str, pid: i32) -> Result<(), CgroupError> {
    load(path).add_task_by_tgid(CgroupPid::from(pid as u64)).map_err(|source| CgroupError::Join {
        path: path.to_owned(),
        pid,
        source,
    })
}

/// Removes the group if it is there and nobody is in it. One with processes or children that are not ours
/// stays, without error: it is shared.
pub fn remove(path: &str) -> Result<(), CgroupError> {
    let group = load(path);
    if !group.exists() {
        return Ok(());
    }
    match group.delete() {
        Ok(()) => Ok(()),
        Err(_) if !group.procs().is_empty() || has_children(path) => Ok(()),
        Err(source) => Err(CgroupError::Remove { path: path.to_owned(), source }),
    }
}

/// How many processes of the group the kernel has killed for want of memory; 0 where it cannot be told.
pub fn oom_kills(path: &str) -> u64 {
    let hierarchy = hierarchies::auto();
    // cgroup-v2.rst, memory.events; cgroup-v1/memory.rst, memory.oom_control.
    let file = if hierarchy.v2() {
        hierarchy.root().join(path).join("memory.events")
    } else {
        hierarchy.root().join("memory").join(path).join("memory.oom_control")
    };
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
}

/// What the kernel counts in the group, as files of cgroup v2 whatever the host has; empty where it cannot be
/// told (cgroup-v2.rst; cgroup-v1/memory.rst, cpuacct.rst).
pub fn figures(path: &str) -> HashMap<String, Vec<u8>> {
    let hierarchy = hierarchies::auto();
    let read = |file: PathBuf| std::fs::read_to_string(file).ok();
    let mut files = HashMap::new();
    let mut put = |name: &str, text: Option<String>| {
        files.extend(text.map(|text| (name.to_owned(), text.into_bytes())));
    };
    if hierarchy.v2() {
        let names = ["cpu.stat", "memory.current", "memory.stat", "memory.events", "pids.current", "io.stat"];
        for name in names {
            put(name, read(hierarchy.root().join(path).join(name)));
        }
        return files;
    }
    let of = |controller: &str, name: &str| read(hierarchy.root().join(controller).join(path).join(name));
    put("memory.current", of("memory", "memory.usage_in_bytes"));
    put("memory.stat", of("memory", "memory.stat").map(|text| modern_stat(&text)));
    put("pids.current", of("pids", "pids.current"));
    // In nanoseconds there, in microseconds here.
    let nanoseconds = of("cpuacct", "cpuacct.usage").and_then(|text| text.trim().parse::<u64>().ok());
    put("cpu.stat", nanoseconds.map(|n| format!("usage_usec {}\n", n / 1000)));
    files
}

/// The lines of version 1 whose meaning version 2 has too, under the names that they have there.
fn modern_stat(text: &str) -> String {
    let renamed = [
        ("total_rss ", "anon "),
        ("total_cache ", "file "),
        ("total_inactive_file ", "inactive_file "),
        ("total_active_file ", "active_file "),
        ("total_inactive_anon ", "inactive_anon "),
        ("total_active_anon ", "active_anon "),
        ("total_shmem ", "shmem "),
        ("total_pgfault ", "pgfault "),
        ("total_pgmajfault ", "pgmajfault "),
    ];
    let line = |line: &str| {
        let (old, new) = renamed.iter().find(|(old, _)| line.starts_with(old))?;
        Some(format!("{new}{}\n", &line[old.len()..]))
    };
    text.lines().filter_map(line).collect()
}

fn has_children(path: &str) -> bool {
    let hierarchy = hierarchies::auto();
    let roots = if hierarchy.v2() {
        vec![hierarchy.root()]
    } else {
        CONTROLLERS.iter().map(|c| hierarchy.root().join(c)).collect()
    };
    roots.iter().any(|root| {
        std::fs::read_dir(root.join(path)).is_ok_and(|mut entries| {
            entries.any(|e| e.is_ok_and(|e| e.file_type().is_ok_and(|t| t.is_dir())))
        })
    })
}

fn load(path: &str) -> Cgroup {
    let hierarchy = hierarchies::auto();
    if hierarchy.v2() {
        return Cgroup::load(hierarchy, path);
    }
    let controllers = CONTROLLERS.iter().map(|c| (*c).to_owned()).collect();
    Cgroup::load_with_specified_controllers(hierarchy, path, controllers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_version_1_get_the_names_of_version_2() {
        let text = "cache 1\nrss 2\ntotal_cache 3\ntotal_rss 4\ntotal_rss_huge 5\ntotal_inactive_file 6\n";
        assert_eq!(modern_stat(text), "file 3\nanon 4\ninactive_file 6\n");
    }

    #[test]
    fn a_pods_group_lies_below_its_parent() {
        assert_eq!(below("/kubepods/pod1/", "x"), "/kubepods/pod1/x");
        assert_eq!(below("/kubepods.slice/kubepods-podA.slice", "x"), "kubepods-podA.slice:cri-containerd:x");
    }

    #[test]
    fn the_path_follows_the_spec() {
        assert_eq!(path_for(None, "default", "x"), "bulkhead/default/x");
        assert_eq!(path_for(Some("/default/x"), "default", "x"), "default/x");
        assert_eq!(
            path_for(Some("kubepods-burstable-podA.slice:cri-containerd:x"), "k8s.io", "x"),
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podA.slice/cri-containerd-x.scope"
        );
    }
}
