//! The limits of a container as its cgroup v2 files state them: read before a change, and written back after one that
//! failed. Knows file names; must not know what they mean.

use std::{collections::HashMap, fs, io, path::Path};

/// Files that set something and say the same back (Documentation/admin-guide/cgroup-v2.rst). Of lists of devices
/// (`io.max`) a line can only be set anew, so they are not here.
const FILES: &[&str] = &[
    "cpu.idle",
    "cpu.max",
    "cpu.max.burst",
    "cpu.weight",
    "cpuset.cpus",
    "cpuset.mems",
    // Up before down: a limit below what is used has the kernel kill.
    "memory.max",
    "memory.high",
    "memory.low",
    "memory.min",
    "memory.swap.max",
    "pids.max",
];

/// What the files say; what the kernel has not is left out.
pub(crate) fn read(cgroup: &Path) -> io::Result<HashMap<String, Vec<u8>>> {
    let mut files = HashMap::new();
    for name in FILES {
        match fs::read(cgroup.join(name)) {
            Ok(content) => drop(files.insert((*name).to_owned(), content)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(files)
}

/// Those of `before` that say something else now.
pub(crate) fn changed(
    mut before: HashMap<String, Vec<u8>>,
    after: &HashMap<String, Vec<u8>>,
) -> HashMap<String, Vec<u8>> {
    before.retain(|name, content| after.get(name) != Some(content));
    before
}

/// Has the files say this; of those named here, no other is written.
pub(crate) fn write(cgroup: &Path, files: &HashMap<String, Vec<u8>>) -> io::Result<()> {
    for name in FILES {
        if let Some(content) = files.get(*name) {
            fs::write(cgroup.join(name), content)
                .map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_known_and_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        put("memory.max", "max\n");
        put("cpu.max", "max 100000\n");
        put("memory.current", "4096\n");
        let before = read(dir.path()).unwrap();
        assert_eq!(before.len(), 2, "what is measured is no limit");
        put("memory.max", "1048576\n");
        let changed = changed(before, &read(dir.path()).unwrap());
        assert_eq!(changed, HashMap::from([("memory.max".into(), b"max\n".to_vec())]));
        let mut asked = changed.clone();
        asked.insert("../escape".into(), b"x".to_vec());
        write(dir.path(), &asked).unwrap();
        assert_eq!(fs::read(dir.path().join("memory.max")).unwrap(), b"max\n");
        assert!(!dir.path().parent().unwrap().join("escape").exists());
    }
}
