//! Where in the share a pod's bind mounts are that several of its containers may have: what is the same on the host is
//! one mount, so that it is one file system to the guest, in which locks, pipes, sockets and watches of one container
//! meet those of another (virtiofsd tells files apart by their mounts too).
//!
//! ```text
//! share/.volumes/<n>     a file or folder of the host, for all containers that mount it so
//! ```
//! A place is read-only on the host for as long as every container only reads it; the guest's kernel keeps the ones that
//! may only read from writing when another one writes.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use crate::{
    ids::ContainerId,
    plan::{Bind, IdMaps, ReadOnly},
    process::mount_points,
};

/// What makes two bind mounts one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Same {
    /// Device and number of the file: another one may have taken the name.
    file: (u64, u64),
    /// The number of the mount that it is in: another one may be read-only, or have other mounts below it.
    mount: u64,
    recursive: bool,
    follows_host: bool,
    owners: Option<(IdMaps, bool)>,
    /// What was mounted below it when it was looked at; nothing that matters where later mounts are seen.
    below: Vec<PathBuf>,
}

/// A place, and who has it.
#[derive(Debug)]
struct Place {
    number: usize,
    same: Same,
    /// Each with whether it may write.
    users: BTreeMap<ContainerId, bool>,
    /// On the host, now.
    read_only: bool,
    /// The host's own mount could be written.
    writable: bool,
    /// It was made.
    usable: bool,
}

impl Place {
    fn is_written(&self) -> bool {
        self.users.values().any(|writes| *writes)
    }
}

/// The places of one sandbox.
#[derive(Debug, Default)]
pub struct Places {
    last: usize,
    places: Vec<Place>,
}

/// What has to be done for a bind mount to be in its place.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// It is there.
    Nothing,
    /// It is there, and must be made writable.
    Open,
    /// It has to be made.
    Make,
}

/// What has to be done with a place when a container has gone.
#[derive(Debug, PartialEq, Eq)]
pub enum Farewell {
    /// Nobody has it any more: it is forgotten, and has to be unmounted.
    Unmount(usize),
    /// Nobody writes to it any more: it has to be made read-only.
    Close(usize),
}

/// A bind mount that can share its place.
#[derive(Debug)]
pub struct Candidate {
    same: Same,
    writes: bool,
}

impl Candidate {
    /// What `bind` is, if containers can have one of it together. What is mounted below one that may only be read has a
    /// say of its own on that, which is not for others.
    ///
    /// # Errors
    /// The source, or the mounts of the host, cannot be looked at.
    pub fn of(bind: &Bind) -> io::Result<Option<Self>> {
        let file = File::options().read(true).custom_flags(libc::O_PATH).open(&bind.source)?;
        let facts = file.metadata()?;
        let real = bind.source.canonicalize()?;
        let mut below = mount_points()?;
        below.retain(|point| *point != real && point.starts_with(&real));
        below.sort();
        below.dedup();
        match bind.read_only {
            ReadOnly::WithAllBelow => return Ok(None),
            ReadOnly::Itself if !below.is_empty() => return Ok(None),
            _ => {}
        }
        if bind.follows_host || !bind.recursive {
            below.clear();
        }
        let same = Same {
            file: (facts.dev(), facts.ino()),
            mount: mount_of(&file)?,
            recursive: bind.recursive,
            follows_host: bind.follows_host,
            owners: bind.owners.clone(),
            below,
        };
        Ok(Some(Self { same, writes: bind.read_only == ReadOnly::No }))
    }
}

impl Places {
    /// The place for a container's bind mount, and what is to be done there; the container has it from now on.
    pub fn take(&mut self, id: &ContainerId, candidate: Candidate) -> (usize, Step) {
        let Candidate { same, writes } = candidate;
        if let Some(place) = self.places.iter_mut().find(|place| place.usable && place.same == same) {
            *place.users.entry(id.clone()).or_default() |= writes;
            let open = writes && place.read_only && place.writable;
            return (place.number, if open { Step::Open } else { Step::Nothing });
        }
        self.last += 1;
        let users = [(id.clone(), writes)].into();
        let (read_only, writable, usable) = (false, true, true);
        self.places.push(Place { number: self.last, same, users, read_only, writable, usable });
        (self.last, Step::Make)
    }

    /// Whether somebody may write to a place.
    pub fn is_written(&self, number: usize) -> bool {
        let mut places = self.places.iter();
        places.any(|place| place.number == number && place.is_written())
    }

    /// What has been done to a place.
    pub fn set_read_only(&mut self, number: usize, read_only: bool) {
        if let Some(place) = self.find_mut(number) {
            place.read_only = read_only;
        }
    }

    /// Nobody can write to the host's own mount, whatever is done here.
    pub fn set_never_writable(&mut self, number: usize) {
        if let Some(place) = self.find_mut(number) {
            place.writable = false;
        }
    }

    /// A place could not be made: it is for nobody else, and goes with the container that wanted it.
    pub fn spoil(&mut self, number: usize) {
        if let Some(place) = self.find_mut(number) {
            place.usable = false;
        }
    }

    /// A container has gone, or never came to be.
    pub fn left_by(&mut self, id: &ContainerId) -> Vec<Farewell> {
        let mut farewells = Vec::new();
        self.places.retain_mut(|place| {
            let Some(wrote) = place.users.remove(id) else { return true };
            if place.users.is_empty() {
                farewells.push(Farewell::Unmount(place.number));
            } else if wrote && !place.read_only && !place.is_written() {
                farewells.push(Farewell::Close(place.number));
            }
            !place.users.is_empty()
        });
        farewells
    }

    fn find_mut(&mut self, number: usize) -> Option<&mut Place> {
        self.places.iter_mut().find(|place| place.number == number)
    }
}

/// The number of the mount that an open file is in (proc_pid_fdinfo(5)).
fn mount_of(file: &File) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let number = text.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    number.ok_or_else(|| io::Error::other("the kernel does not tell the mount of an open file"))
}

/// The folder of all places in a share.
pub(super) fn folder(share: &Path) -> PathBuf {
    share.join(NAME)
}

/// No container has this name: ids begin with a letter or a digit.
const NAME: &str = ".volumes";

/// Where the guest finds a place.
pub(super) fn in_guest(number: usize) -> PathBuf {
    Path::new(bulkhead_proto::SHARE_DIR).join(NAME).join(number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> ContainerId {
        ContainerId::parse(name).unwrap()
    }

    fn bind(source: &Path, read_only: ReadOnly) -> Bind {
        let destination = "/m".into();
        let (recursive, follows_host) = (true, false);
        Bind { slot: 0, source: source.into(), destination, recursive, read_only, follows_host, owners: None }
    }

    fn candidate(bind: &Bind) -> Candidate {
        Candidate::of(bind).unwrap().unwrap()
    }

    #[test]
    fn containers_share_what_is_the_same_and_the_last_takes_it_along() {
        let dir = tempfile::tempdir().unwrap();
        let (both, other) = (dir.path().join("both"), dir.path().join("other"));
        fs::create_dir(&both).unwrap();
        fs::create_dir(&other).unwrap();
        let mut places = Places::default();
        let writing = bind(&both, ReadOnly::No);
        assert_eq!(places.take(&id("a"), candidate(&writing)), (1, Step::Make));
        assert_eq!(places.take(&id("b"), candidate(&writing)), (1, Step::Nothing));
        assert_eq!(
            places.take(&id("a"), candidate(&writing)),
            (1, Step::Nothing),
            "at another point of its own"
        );
        assert_eq!(places.take(&id("b"), candidate(&bind(&other, ReadOnly::No))), (2, Step::Make));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("both", &link).unwrap();
        assert_eq!(
            places.take(&id("b"), candidate(&bind(&link, ReadOnly::No))),
            (1, Step::Nothing),
            "by a link"
        );
        let following = Bind { follows_host: true, ..writing.clone() };
        assert_eq!(places.take(&id("b"), candidate(&following)), (3, Step::Make), "shows other mounts");
        assert_eq!(places.left_by(&id("a")), []);
        assert_eq!(places.left_by(&id("b")), [1, 2, 3].map(Farewell::Unmount));
        assert_eq!(places.take(&id("c"), candidate(&writing)), (4, Step::Make), "no number comes twice");
        places.spoil(4);
        assert_eq!(
            places.take(&id("d"), candidate(&writing)),
            (5, Step::Make),
            "half a place is nobody else's"
        );
        assert_eq!(places.left_by(&id("c")), [Farewell::Unmount(4)]);
    }

    #[test]
    fn another_file_of_the_same_name_is_another_place() {
        let dir = tempfile::tempdir().unwrap();
        let (file, kept) = (dir.path().join("file"), dir.path().join("kept"));
        fs::write(&file, "").unwrap();
        let mut places = Places::default();
        assert_eq!(places.take(&id("a"), candidate(&bind(&file, ReadOnly::No))).0, 1);
        fs::rename(&file, kept).unwrap();
        fs::write(&file, "").unwrap();
        assert_eq!(places.take(&id("b"), candidate(&bind(&file, ReadOnly::No))).0, 2);
    }

    #[test]
    fn a_place_can_be_written_for_as_long_as_somebody_may() {
        let dir = tempfile::tempdir().unwrap();
        let (reading, writing) = (bind(dir.path(), ReadOnly::Itself), bind(dir.path(), ReadOnly::No));
        let mut places = Places::default();
        assert_eq!(places.take(&id("reader"), candidate(&reading)), (1, Step::Make));
        assert!(!places.is_written(1));
        places.set_read_only(1, true);
        assert_eq!(places.take(&id("writer"), candidate(&writing)), (1, Step::Open));
        places.set_read_only(1, false);
        assert!(places.is_written(1));
        assert_eq!(places.left_by(&id("writer")), [Farewell::Close(1)]);
        places.set_read_only(1, true);
        places.set_never_writable(1);
        assert_eq!(places.take(&id("writer"), candidate(&writing)), (1, Step::Nothing));
        assert_eq!(places.left_by(&id("writer")), []);
        assert_eq!(places.left_by(&id("reader")), [Farewell::Unmount(1)]);
    }

    #[test]
    fn what_is_read_only_with_all_below_is_nobody_elses() {
        let below = bind(Path::new("/proc"), ReadOnly::WithAllBelow);
        assert!(Candidate::of(&below).unwrap().is_none());
        // /proc, /dev and others are mounted below it.
        let root = bind(Path::new("/"), ReadOnly::Itself);
        assert!(Candidate::of(&root).unwrap().is_none());
    }
}
