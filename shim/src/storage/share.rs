//! The directory of a sandbox that its guest sees: one folder a container, with the root and the binds.
//! Writes every mount and folder into the ledger before making it.
//!
//! ```text
//! share/<container>/rootfs        the container's root, a bind of <bundle>/rootfs
//! share/<container>/mounts/<n>    its n-th bind mount
//! ```
//!
//! A read-only bind is read-only on the host too: the guest's kernel is not trusted to keep it so. What is mounted
//! below it is read-only only where that was asked for.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{
    idmap::Owners,
    mount::{self, MountError, mount, mount_owned},
    points::make_point,
};
use crate::{
    ids::ContainerId,
    ledger::{Entry, Ledger, LedgerError},
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

    /// Shows one bind mount to the guest. Answers whether parts of a read-only one, which are mounted below it, can
    /// be written all the same.
    pub fn add_bind(&self, ledger: &mut Ledger, id: &ContainerId, bind: &Bind) -> Result<bool, ShareError> {
        let target = self.container_dir(id).join("mounts").join(bind.slot.to_string());
        let facts = std::fs::metadata(&bind.source).map_err(|source| ShareError::Source {
            source_path: bind.source.clone(),
            destination: bind.destination.clone(),
            source: plain(source),
        })?;
        if facts.is_dir() {
            make_dir(&target)?;
        } else {
            std::fs::File::create(&target)
                .map_err(|source| ShareError::Make { path: target.clone(), source })?;
        }
        fail_point!(BindPlaced);
        ledger.record(mount_entry(&target, id))?;
        fail_point!(BindRecorded);
        match &bind.owners {
            None => mount::bind(&bind.source, &target, bind.recursive, bind.follows_host)?,
            Some((owners, below)) => users(owners, &bind.source)?
                .bind(&bind.source, &target, bind.recursive, *below, bind.follows_host)
                .map_err(|source| MountError::Owners { path: bind.source.clone(), source })?,
        }
        fail_point!(BindMounted);
        if bind.read_only == ReadOnly::No {
            return Ok(false);
        }
        let below = points_below(&target)?;
        if bind.read_only == ReadOnly::WithAllBelow {
            for point in &below {
                mount::make_read_only(point)?;
            }
        }
        mount::make_read_only(&target)?;
        Ok(bind.read_only == ReadOnly::Itself && !below.is_empty())
    }
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
