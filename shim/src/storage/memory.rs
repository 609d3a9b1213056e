//! Volumes in memory: an emptyDir with `medium: Memory`, which the kubelet mounts on the node as a tmpfs. The guest has
//! one of its own in its place, with the same size, owners and mode: within the limits of who fills it, and to the
//! container what it is to one of runc's. Knows how the kubelet lays volumes out, and nothing of the guest.
//!
//! ```text
//! …/kubernetes.io~empty-dir/<name>                   the tmpfs
//! …/volume-subpaths/<name>/<container>/<number>      a bind mount of a folder in it (`subPath`)
//! ```

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use nix::sys::statvfs::statvfs;

use crate::{
    plan::Bind,
    process::{Mounted, mounts},
};

use super::Facts;

/// The folder in which the kubelet has the emptyDirs of a pod (pkg/volume/emptydir/empty_dir.go).
const EMPTY_DIRS: &str = "kubernetes.io~empty-dir";

/// A bind mount of a volume in memory, or of a folder in one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryVolume {
    /// Its number among the container's binds.
    pub slot: usize,
    /// The volume's name, the same for all that mount something of it.
    pub name: String,
    /// How much there may be in it, in bytes.
    pub size: u64,
    /// The volume's own folder (empty), and each below it on the way to the one that is mounted.
    pub folders: Vec<(PathBuf, Facts)>,
}

impl MemoryVolume {
    /// What `bind` is, if the guest can have it in its own memory: of one with mapped owners the host does the mapping.
    ///
    /// # Errors
    /// The mounts of this host, or the volume, cannot be read.
    pub fn of(bind: &Bind) -> io::Result<Option<Self>> {
        if bind.owners.is_some() || !is_of_a_pod(&bind.source) {
            return Ok(None);
        }
        Self::among(&mounts()?, bind)
    }

    fn among(mounts: &[Mounted], bind: &Bind) -> io::Result<Option<Self>> {
        let source = bind.source.canonicalize()?;
        // The last one at a place is the one that is seen.
        let mounted = mounts.iter().rfind(|mount| mount.point == source);
        let Some(mounted) = mounted.filter(|mount| mount.kind == "tmpfs") else { return Ok(None) };
        let volume = mounts.iter().find(|mount| {
            mount.device == mounted.device && mount.root == Path::new("/") && is_empty_dir(&mount.point)
        });
        let Some(volume) = volume else { return Ok(None) };
        let facts = statvfs(&volume.point)?;
        let mut folders = vec![(PathBuf::new(), facts_of(&volume.point)?)];
        let mut below = PathBuf::new();
        for part in mounted.root.components().filter(|part| matches!(part, Component::Normal(_))) {
            below.push(part);
            folders.push((below.clone(), facts_of(&volume.point.join(&below))?));
        }
        // A file in it is the node's.
        if !fs::metadata(&source)?.is_dir() {
            return Ok(None);
        }
        let (major, minor) = volume.device;
        let size = facts.blocks().saturating_mul(facts.fragment_size());
        Ok(Some(Self { slot: bind.slot, name: format!("{major}-{minor}"), size, folders }))
    }
}

/// Whether a path may be a volume of a pod or a part of one: of others the mounts need not be read.
fn is_of_a_pod(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == EMPTY_DIRS || part.as_os_str() == "volume-subpaths")
}

fn is_empty_dir(point: &Path) -> bool {
    point.parent().and_then(Path::file_name).is_some_and(|folder| folder == EMPTY_DIRS)
}

fn facts_of(path: &Path) -> io::Result<Facts> {
    let facts = fs::symlink_metadata(path)?;
    Ok(Facts { mode: facts.mode() & 0o7777, uid: facts.uid(), gid: facts.gid() })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::plan::{IdMaps, ReadOnly};

    fn bind(source: PathBuf) -> Bind {
        Bind {
            slot: 3,
            source,
            destination: "/m".into(),
            recursive: true,
            read_only: ReadOnly::No,
            follows_host: false,
            owners: None,
        }
    }

    fn mounted(device: (u32, u32), root: &str, point: PathBuf, kind: &str) -> Mounted {
        Mounted { device, root: root.into(), point, kind: kind.into() }
    }

    #[test]
    fn an_empty_dir_in_memory_is_the_guests_and_so_is_a_folder_of_it() {
        let tmp = tempfile::tempdir().unwrap();
        let pod = tmp.path().canonicalize().unwrap();
        let volume = pod.join("volumes/kubernetes.io~empty-dir/fast");
        let part = pod.join("volume-subpaths/fast/main/0");
        for folder in [&volume.join("a/b"), &part] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o2777)).unwrap();
        fs::set_permissions(volume.join("a/b"), fs::Permissions::from_mode(0o750)).unwrap();
        let table =
            [mounted((0, 7), "/", volume.clone(), "tmpfs"), mounted((0, 7), "/a/b", part.clone(), "tmpfs")];
        let whole = MemoryVolume::among(&table, &bind(volume.clone())).unwrap().unwrap();
        assert_eq!((whole.slot, whole.name.as_str(), whole.folders.len()), (3, "0-7", 1));
        assert_eq!(whole.folders[0].1.mode, 0o2777);
        assert!(whole.size > 0);
        let folder = MemoryVolume::among(&table, &bind(part)).unwrap().unwrap();
        assert_eq!(folder.name, whole.name);
        let names: Vec<_> = folder.folders.iter().map(|(below, _)| below.to_str().unwrap()).collect();
        assert_eq!(names, ["", "a", "a/b"]);
        assert_eq!(folder.folders[2].1.mode, 0o750);
    }

    #[test]
    fn other_folders_are_the_hosts() {
        let tmp = tempfile::tempdir().unwrap();
        let pod = tmp.path().canonicalize().unwrap();
        let (disk, secret) =
            (pod.join("kubernetes.io~empty-dir/slow"), pod.join("kubernetes.io~secret/token"));
        let part = pod.join("volume-subpaths/token/main/0");
        for folder in [&disk, &secret, &part] {
            fs::create_dir_all(folder).unwrap();
        }
        let table = [
            mounted((8, 1), "/", pod.clone(), "ext4"),
            mounted((0, 9), "/", secret.clone(), "tmpfs"),
            mounted((0, 9), "/x", part.clone(), "tmpfs"),
        ];
        let covered =
            [mounted((0, 7), "/", disk.clone(), "tmpfs"), mounted((8, 2), "/", disk.clone(), "ext4")];
        assert_eq!(MemoryVolume::among(&covered, &bind(disk.clone())).unwrap(), None, "it is mounted over");
        for source in [&disk, &secret, &part, &pod] {
            assert_eq!(MemoryVolume::among(&table, &bind(source.clone())).unwrap(), None, "{source:?}");
        }
        let mapped = Bind { owners: Some((IdMaps::default(), false)), ..bind(disk) };
        assert_eq!(MemoryVolume::of(&mapped).unwrap(), None);
    }
}
