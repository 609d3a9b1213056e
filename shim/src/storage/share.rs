//! The directory of a sandbox that its guest sees: one folder a container, with the root and the binds.
//! Writes every mount and folder into the ledger before making it.
//!
//! ```text
//! share/<container>/rootfs        the container's root, a bind of <bundle>/rootfs
//! share/<container>/mounts/<n>    its n-th bind mount
//! ```
//!
//! A read-only bind is read-only on the host too: the guest's kernel is not trusted to keep it so.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{
    idmap::Owners,
    mount::{MountError, mount, mount_owned},
};
use crate::{
    ids::ContainerId,
    ledger::{Entry, Ledger, LedgerError},
    plan::{Bind, IdMaps},
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

    fn container_dir(&self, id: &ContainerId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    /// Mounts the container's root at `root`, and shows it to the guest. Without mounts `root` is a folder
    /// that the user prepared, and must be there.
    pub fn add_root(
        &self,
        ledger: &mut Ledger,
        id: &ContainerId,
        root: &Path,
        mounts: &[RootMount],
        read_only: bool,
    ) -> Result<(), ShareError> {
        if !mounts.is_empty() {
            make_dir(root)?;
        }
        for part in mounts {
            let target = if part.target.is_empty() { root.to_owned() } else { inside(root, &part.target) };
            ledger.record(mount_entry(&target, id))?;
            let (owners, options) =
                IdMaps::take(&part.options).map_err(|fault| ShareError::Words(fault.message))?;
            match owners {
                None => mount(&part.kind, &part.source, &options, &target)?,
                Some(owners) => self.mount_owned(ledger, id, part, &options, &owners, &target)?,
            }
        }
        let folder = self.container_dir(id);
        ledger.record(Entry::Directory { path: folder.clone(), container: Some(id.to_string()) })?;
        make_dir(&folder.join("mounts"))?;
        let target = folder.join("rootfs");
        make_dir(&target)?;
        self.bind(ledger, id, root, &target, true, read_only)
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

    /// Shows one bind mount to the guest.
    pub fn add_bind(&self, ledger: &mut Ledger, id: &ContainerId, bind: &Bind) -> Result<(), ShareError> {
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
        let Some((owners, below)) = &bind.owners else {
            return self.bind(ledger, id, &bind.source, &target, bind.recursive, bind.read_only);
        };
        let owners = users(owners, &bind.source)?;
        ledger.record(mount_entry(&target, id))?;
        owners
            .bind(&bind.source, &target, bind.recursive, *below, bind.read_only)
            .map_err(|source| MountError::Owners { path: bind.source.clone(), source })?;
        Ok(())
    }

    fn bind(
        &self,
        ledger: &mut Ledger,
        id: &ContainerId,
        source: &Path,
        target: &Path,
        recursive: bool,
        read_only: bool,
    ) -> Result<(), ShareError> {
        ledger.record(mount_entry(target, id))?;
        let mut options = vec![if recursive { "rbind".to_owned() } else { "bind".to_owned() }];
        if read_only {
            options.push("ro".to_owned());
        }
        mount("bind", &source.to_string_lossy(), &options, target)?;
        Ok(())
    }
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
