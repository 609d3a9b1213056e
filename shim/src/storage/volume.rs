//! Volumes that the host exchanges as a whole, as Kubernetes does with ConfigMaps and their like: which ones are, and
//! when a new version is there. Knows files of the host, nothing of the guest.

use std::{
    collections::HashMap,
    fs, io,
    os::fd::AsFd,
    path::{Component, Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use bulkhead_proto::VOLUME_LINK;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::net::unix::pipe;

use crate::{
    ids::ContainerId,
    plan::{Bind, ReadOnly},
};

/// The most that a copy may be, in bytes: of the guest's memory, for each container. A ConfigMap has at most 1 MiB.
const MOST_BYTES: u64 = 4 << 20;
/// The most files and folders of one, for the time that they take.
const MOST_ENTRIES: usize = 10_000;

/// A bind mount whose source is exchanged as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// On the host.
    pub source: PathBuf,
    /// Its number among the container's binds.
    pub slot: usize,
    /// The version that there was when it was looked at.
    pub version: String,
}

impl Volume {
    /// What `bind` is, if it is one that a copy can stand for: nobody writes to it, and it is small.
    pub fn of(bind: &Bind) -> Option<Self> {
        if bind.read_only == ReadOnly::No || bind.owners.is_some() {
            return None;
        }
        let version = version(&bind.source)?;
        let mut left = (MOST_BYTES, MOST_ENTRIES);
        (is_all_exchanged(&bind.source) && fits(&bind.source, &mut left)).then(|| Self {
            source: bind.source.clone(),
            slot: bind.slot,
            version,
        })
    }
}

/// Whether there is nothing but what an exchange makes: versions, and links to what is in the present one.
fn is_all_exchanged(source: &Path) -> bool {
    let Ok(mut entries) = fs::read_dir(source) else { return false };
    entries.all(|entry| {
        entry.is_ok_and(|entry| {
            entry.file_name().as_encoded_bytes().starts_with(b"..")
                || fs::read_link(entry.path()).is_ok_and(|to| to.starts_with(VOLUME_LINK))
        })
    })
}

/// The present version of the volume: the name of the folder that its link names.
pub fn version(source: &Path) -> Option<String> {
    let target = fs::read_link(source.join(VOLUME_LINK)).ok()?;
    let mut parts = target.components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(name)), None) => Some(name.to_str()?.to_owned()),
        _ => None,
    }
}

/// Whether what is in the folder is no more than what is left, which becomes less by it.
fn fits(folder: &Path, left: &mut (u64, usize)) -> bool {
    let Ok(entries) = fs::read_dir(folder) else { return false };
    for entry in entries {
        let found = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)));
        let Ok((path, what)) = found else { return false };
        let (Some(bytes), Some(count)) = (left.0.checked_sub(what.len()), left.1.checked_sub(1)) else {
            return false;
        };
        *left = (bytes, count);
        if what.is_dir() && !fits(&path, left) {
            return false;
        }
    }
    true
}

/// Tells of new versions of the volumes of containers. One for all of them: a host has few of these to give to each
/// user (`fs.inotify.max_user_instances`).
pub struct Follower {
    inotify: Inotify,
    events: pipe::Receiver,
    watched: Mutex<Watched>,
}

type Watched = HashMap<WatchDescriptor, Vec<(ContainerId, Volume)>>;

impl Follower {
    /// One that watches nothing yet.
    ///
    /// # Errors
    /// The host has no more of them to give.
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // Read as a pipe is.
        let events = pipe::Receiver::from_owned_fd_unchecked(inotify.as_fd().try_clone_to_owned()?)?;
        Ok(Self { inotify, events, watched: Mutex::default() })
    }

    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches a volume for a container.
    ///
    /// # Errors
    /// The host does not let it be watched.
    pub fn add(&self, id: &ContainerId, volume: Volume) -> io::Result<()> {
        // A link put into another's place, or, by whoever does it in two steps, made.
        let events = AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ONLYDIR;
        let mut watched = self.watched();
        let descriptor = self.inotify.add_watch(&volume.source, events)?;
        // The same folder has the same descriptor.
        watched.entry(descriptor).or_default().push((id.clone(), volume));
        Ok(())
    }

    /// Watches nothing more for a container.
    pub fn remove(&self, id: &ContainerId) {
        self.watched().retain(|descriptor, volumes| {
            volumes.retain(|(of, _)| of != id);
            if volumes.is_empty() {
                // One whose folder has gone is no longer there.
                let _ = self.inotify.rm_watch(*descriptor);
            }
            !volumes.is_empty()
        });
    }

    /// Waits until something has happened to volumes, and answers those that have another version now.
    ///
    /// # Errors
    /// The events cannot be read.
    pub async fn changed(&self) -> io::Result<Vec<(ContainerId, Volume)>> {
        let mut events = [0; 4096];
        loop {
            self.events.readable().await?;
            // Which they are is no matter: there are few volumes, and a look at each costs little.
            match self.events.try_read(&mut events) {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        let mut changed = Vec::new();
        for (id, volume) in self.watched().values_mut().flatten() {
            if let Some(version) = version(&volume.source)
                && version != volume.version
            {
                volume.version = version;
                changed.push((id.clone(), volume.clone()));
            }
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, time::Duration};

    use super::*;

    fn exchange(source: &Path, version: &str) {
        fs::create_dir_all(source.join(version)).unwrap();
        fs::write(source.join(version).join("page"), version).unwrap();
        symlink(version, source.join("..data_tmp")).unwrap();
        fs::rename(source.join("..data_tmp"), source.join(VOLUME_LINK)).unwrap();
    }

    fn bind(source: &Path, read_only: ReadOnly) -> Bind {
        let (source, destination) = (source.to_owned(), "/settings".into());
        Bind { slot: 3, source, destination, recursive: true, read_only, follows_host: false, owners: None }
    }

    #[test]
    fn a_volume_is_one_by_its_link_its_size_and_that_nobody_writes_to_it() {
        let tmp = tempfile::tempdir().unwrap();
        let read_only = bind(tmp.path(), ReadOnly::Itself);
        assert_eq!(Volume::of(&read_only), None, "any folder");
        exchange(tmp.path(), "..1");
        let volume = Volume::of(&read_only).unwrap();
        assert_eq!((volume.slot, volume.version.as_str()), (3, "..1"));
        assert_eq!(Volume::of(&bind(tmp.path(), ReadOnly::No)), None);
        assert_eq!(Volume::of(&bind(&tmp.path().join("..1/page"), ReadOnly::Itself)), None, "a file");
        symlink("..data/page", tmp.path().join("page")).unwrap();
        assert!(Volume::of(&read_only).is_some());
        fs::write(tmp.path().join("other"), "beside it").unwrap();
        assert_eq!(Volume::of(&read_only), None, "something else");
        fs::remove_file(tmp.path().join("other")).unwrap();
        fs::write(tmp.path().join("..1/large"), vec![0; MOST_BYTES as usize]).unwrap();
        assert_eq!(Volume::of(&read_only), None, "too large");
        fs::remove_file(tmp.path().join(VOLUME_LINK)).unwrap();
        symlink("/etc", tmp.path().join(VOLUME_LINK)).unwrap();
        assert_eq!(version(tmp.path()), None, "it leads elsewhere");
    }

    #[tokio::test]
    async fn each_container_of_a_volume_is_told_until_it_has_gone() {
        let tmp = tempfile::tempdir().unwrap();
        exchange(tmp.path(), "..1");
        let follower = Follower::new().unwrap();
        let volume = Volume::of(&bind(tmp.path(), ReadOnly::Itself)).unwrap();
        let [a, b]: [ContainerId; 2] = ["a", "b"].map(|id| ContainerId::parse(id).unwrap());
        for id in [&a, &b] {
            follower.add(id, volume.clone()).unwrap();
        }
        let told = async || {
            let mut told = Vec::new();
            while told.is_empty() {
                let changed = tokio::time::timeout(Duration::from_secs(10), follower.changed());
                told = changed.await.expect("nobody is told").unwrap();
            }
            told.into_iter().map(|(id, volume)| (id.to_string(), volume.version)).collect::<Vec<_>>()
        };
        exchange(tmp.path(), "..2");
        assert_eq!(told().await, [("a".into(), "..2".into()), ("b".into(), "..2".into())]);
        follower.remove(&a);
        exchange(tmp.path(), "..3");
        assert_eq!(told().await, [("b".into(), "..3".into())]);
        follower.remove(&b);
        assert!(follower.watched().is_empty());
    }
}
