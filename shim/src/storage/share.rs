//! The directory of a sandbox that its guest sees: one folder a container, with the root and the binds.
//! Writes every mount and folder into the ledger before making it.
//!
//! ```text
//! share/<container>/rootfs        the container's root, a bind of <bundle>/rootfs
//! share/<container>/mounts/<n>    its n-th bind mount, if that is its own
//! share/.volumes/<n>              a bind mount that containers may have together (`places`)
//! ```
//!
//! A read-only bind is read-only on the host too: the guest's kernel is not trusted to keep it so. What is mounted
//! below it is read-only only where that was asked for.

use std::{
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use super::{
    idmap::Owners,
    memory::MemoryVolume,
    mount::{self, MountError, mount, mount_owned},
    places::{self, Candidate, Farewell, Places, Step},
    points::make_point,
};
use crate::{
    error::chain,
    ids::ContainerId,
    ledger::{self, Entry, Ledger, LedgerError},
    plan::{Bind, IdMaps, ReadOnly},
    process::mount_points,
    sandbox::model::RootMount,
};

/// Why a container's files could not be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// A bind's source is not there, in the words that users know from runc.
    #[error("error mounting {:?} to rootfs at {:?}: stat {}", source_path, destination, source_path.display())]
    Source {
        /// On the host.
        source_path: PathBuf,
        /// In the container.
        destination: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A folder or file of ours could not be made.
    #[error("cannot create {}", path.display())]
    Make {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What is mounted below a bind could not be found out.
    #[error("look at the mounts below {}", path.display())]
    Below {
        /// The bind.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A mount failed.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// What containerd says of a mount cannot be understood.
    #[error("{0}")]
    Words(String),
    /// A user namespace that maps owners could not be made.
    #[error("make a user namespace to map the owners of {}", path.display())]
    Users {
        /// Of which files.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The ledger could not be kept.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A test wants it so.
    #[cfg(feature = "failpoints")]
    #[error(transparent)]
    Failpoint(#[from] crate::failpoint::Failed),
}

/// The share of one sandbox.
#[derive(Clone, Debug)]
pub struct Share {
    dir: PathBuf,
}

impl Share {
    /// The share at `dir`.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Its directory on the host.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The container's root, once it is mounted.
    pub fn root(&self, id: &ContainerId) -> PathBuf {
        self.container_dir(id).join("rootfs")
    }

    fn container_dir(&self, id: &ContainerId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    /// Mounts the container's root at `root`, and shows it to the guest. Without mounts `root` is a folder
    /// that the user prepared, and must be there. A read-only root gets the mount points it lacks, each of
    /// `points` with whether it is a folder.
    pub fn add_root(
        &self,
        ledger: &mut Ledger,
        id: &ContainerId,
        root: &Path,
        mounts: &[RootMount],
        read_only: bool,
        points: &[(PathBuf, bool)],
    ) -> Result<(), ShareError> {
        if !mounts.is_empty() {
            make_dir(root)?;
        }
        for part in mounts {
            let target = if part.target.is_empty() { root.to_owned() } else { inside(root, &part.target) };
            ledger.record(mount_entry(&target, id))?;
            fail_point!(RootRecorded);
            let (owners, options) =
                IdMaps::take(&part.options).map_err(|fault| ShareError::Words(fault.message))?;
            match owners {
                None => mount(&part.kind, &part.source, &options, &target)?,
                Some(owners) => self.mount_owned(ledger, id, part, &options, &owners, &target)?,
            }
            fail_point!(RootMounted);
        }
        // Before any guest sees it. Of a root that is not there the bind below tells.
        let wanted = if read_only && root.is_dir() { points } else { &[] };
        for (destination, folder) in wanted {
            make_point(root, destination, *folder).map_err(|source| ShareError::Make {
                path: inside(root, &destination.to_string_lossy()),
                source,
            })?;
        }
        let folder = self.container_dir(id);
        ledger.record(Entry::Directory { path: folder.clone(), container: Some(id.to_string()) })?;
        make_dir(&folder.join("mounts"))?;
        let target = self.root(id);
        make_dir(&target)?;
        ledger.record(mount_entry(&target, id))?;
        mount::bind(root, &target, true, false)?;
        if read_only {
            mount::make_read_only(&target)?;
        }
        fail_point!(RootShared);
        Ok(())
    }

    /// Mounts a part of a root with files of other owners than on its disk.
    fn mount_owned(
        &self,
        ledger: &mut Ledger,
        id: &ContainerId,
        part: &RootMount,
        options: &[String],
        owners: &IdMaps,
        target: &Path,
    ) -> Result<(), ShareError> {
        let layers = self.dir.with_file_name("layers").join(id.as_str());
        ledger.record(Entry::Directory { path: layers.clone(), container: Some(id.to_string()) })?;
        ledger.record(mount_entry(&layers, id))?;
        make_dir(&layers)?;
        mount_owned(&part.kind, &part.source, options, &users(owners, target)?, &layers, target)?;
        Ok(())
    }

    /// Shows one bind mount to the guest, for this container alone if it is to be its `own`.
    pub fn add_bind(
        &self,
        ledger: &mut Ledger,
        places: &mut Places,
        id: &ContainerId,
        bind: &Bind,
        own: bool,
    ) -> Result<Shown, ShareError> {
        let facts = std::fs::metadata(&bind.source).map_err(|source| ShareError::Source {
            source_path: bind.source.clone(),
            destination: bind.destination.clone(),
            source: plain(source),
        })?;
        if facts.file_type().is_socket() {
            // virtiofsd would have to open it as a file, to know its mount by: the guest has one of its own instead.
            let target = self.container_dir(id).join("mounts").join(bind.slot.to_string());
            place_for(&target, false)?;
            return Ok(Shown::Socket);
        }
        let look = |source: io::Error| ShareError::Below { path: bind.source.clone(), source };
        if let Some(volume) = MemoryVolume::of(bind).map_err(look)? {
            return Ok(Shown::Memory(volume));
        }
        let candidate = if own { None } else { Candidate::of(bind).map_err(look)? };
        if let Some(candidate) = candidate {
            return self.add_to_place(ledger, places, id, bind, facts.is_dir(), candidate);
        }
        let target = self.container_dir(id).join("mounts").join(bind.slot.to_string());
        mount_bind(ledger, bind, &target, facts.is_dir(), Some(id))?;
        if bind.read_only == ReadOnly::No {
            return Ok(Shown::Own);
        }
        let below = points_below(&target)?;
        if bind.read_only == ReadOnly::WithAllBelow {
            for point in &below {
                mount::make_read_only(point)?;
            }
        }
        mount::make_read_only(&target)?;
        Ok(match bind.read_only == ReadOnly::Itself && !below.is_empty() {
            true => Shown::Mixed,
            false => Shown::Own,
        })
    }

    fn add_to_place(
        &self,
        ledger: &mut Ledger,
        places: &mut Places,
        id: &ContainerId,
        bind: &Bind,
        folder: bool,
        candidate: Candidate,
    ) -> Result<Shown, ShareError> {
        let (number, step) = places.take(id, candidate);
        let target = self.place(number);
        match step {
            Step::Nothing => {}
            Step::Open => {
                mount::make_writable(&target)?;
                places.set_read_only(number, false);
            }
            Step::Make => {
                if let Err(error) = self.make_place(ledger, places, number, bind, folder, &target) {
                    places.spoil(number);
                    return Err(error);
                }
            }
        }
        Ok(Shown::At(places::in_guest(number)))
    }

    fn make_place(
        &self,
        ledger: &mut Ledger,
        places: &mut Places,
        number: usize,
        bind: &Bind,
        folder: bool,
        target: &Path,
    ) -> Result<(), ShareError> {
        make_dir(&places::folder(&self.dir))?;
        mount_bind(ledger, bind, target, folder, None)?;
        if mount::is_read_only(target)? {
            places.set_read_only(number, true);
            places.set_never_writable(number);
        } else if !places.is_written(number) {
            mount::make_read_only(target)?;
            places.set_read_only(number, true);
        }
        Ok(())
    }

    fn place(&self, number: usize) -> PathBuf {
        places::folder(&self.dir).join(number.to_string())
    }

    /// Takes back what a container had together with others, as far as it was the last to have it. What cannot be taken
    /// back remains in the ledger, and goes with the sandbox.
    pub fn leave_places(&self, ledger: &mut Ledger, places: &mut Places, id: &ContainerId) {
        for farewell in places.left_by(id) {
            let done = match farewell {
                Farewell::Close(number) => mount::make_read_only(&self.place(number))
                    .map(|()| places.set_read_only(number, true))
                    .map_err(ShareError::from),
                Farewell::Unmount(number) => self.remove_place(ledger, number),
            };
            if let Err(error) = done {
                tracing::error!(%id, "a volume of the pod: {}", chain(&error));
            }
        }
    }

    fn remove_place(&self, ledger: &mut Ledger, number: usize) -> Result<(), ShareError> {
        let place = self.place(number);
        let ours = [Entry::Mount { target: place.clone(), container: None }];
        let left = ledger::release(&ours);
        ledger.forget(&ours, left)?;
        // A folder without files, or a file without content; where it never came to be, nothing.
        let _ = std::fs::remove_dir(&place).or_else(|_| std::fs::remove_file(&place));
        Ok(())
    }
}

/// Where the guest finds a bind mount.
#[derive(Debug, PartialEq, Eq)]
pub enum Shown {
    /// At the container's own place for it.
    Own,
    /// There, and parts of it that are mounted below it can be written although it is read-only.
    Mixed,
    /// Nowhere: it is a socket, for which the guest has one of its own.
    Socket,
    /// In the guest, at a place that other containers may have too.
    At(PathBuf),
    /// Nowhere: it is in memory, and the guest has its own.
    Memory(MemoryVolume),
}

/// Mounts a bind mount at `target`, for a container or for the whole sandbox.
fn mount_bind(
    ledger: &mut Ledger,
    bind: &Bind,
    target: &Path,
    folder: bool,
    id: Option<&ContainerId>,
) -> Result<(), ShareError> {
    place_for(target, folder)?;
    fail_point!(BindPlaced);
    ledger.record(Entry::Mount { target: target.to_owned(), container: id.map(ToString::to_string) })?;
    fail_point!(BindRecorded);
    match &bind.owners {
        None => mount::bind(&bind.source, target, bind.recursive, bind.follows_host)?,
        Some((owners, below)) => users(owners, &bind.source)?
            .bind(&bind.source, target, bind.recursive, *below, bind.follows_host)
            .map_err(|source| MountError::Owners { path: bind.source.clone(), source })?,
    }
    fail_point!(BindMounted);
    Ok(())
}

/// Makes what something can be mounted on.
fn place_for(target: &Path, folder: bool) -> Result<(), ShareError> {
    if folder {
        return make_dir(target);
    }
    let made = std::fs::File::create(target);
    made.map(drop).map_err(|source| ShareError::Make { path: target.to_owned(), source })
}

/// Everything that is mounted below `target`.
fn points_below(target: &Path) -> Result<Vec<PathBuf>, ShareError> {
    let look = |source: io::Error| ShareError::Below { path: target.to_owned(), source };
    let real = target.canonicalize().map_err(look)?;
    let mut points = mount_points().map_err(look)?;
    points.retain(|point| *point != real && point.starts_with(&real));
    // Mounts that lie on each other at one point count once.
    points.sort();
    points.dedup();
    Ok(points)
}

fn users(owners: &IdMaps, path: &Path) -> Result<Owners, ShareError> {
    Owners::new(owners).map_err(|source| ShareError::Users { path: path.to_owned(), source })
}

fn mount_entry(target: &Path, id: &ContainerId) -> Entry {
    Entry::Mount { target: target.to_owned(), container: Some(id.to_string()) }
}

fn make_dir(path: &Path) -> Result<(), ShareError> {
    std::fs::create_dir_all(path).map_err(|source| ShareError::Make { path: path.to_owned(), source })
}

/// `target` below `root`, without leaving it.
fn inside(root: &Path, target: &str) -> PathBuf {
    target
        .split('/')
        .filter(|part| !matches!(*part, "" | "." | ".."))
        .fold(root.to_owned(), |p, part| p.join(part))
}

/// The error without Rust's "(os error 2)", in the words of Go that runc's users know.
fn plain(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::NotFound => io::Error::new(error.kind(), "no such file or directory"),
        io::ErrorKind::PermissionDenied => io::Error::new(error.kind(), "permission denied"),
        _ => error,
    }
}
