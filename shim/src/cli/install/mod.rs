//! `bulkhead install` and `bulkhead uninstall`: a node gets what it needs to run pods in machines, and loses it again.
//! Makes no pod and asks no shim.
//!
//! ```text
//! bundle ──> files ──> links ──> config.toml ──> containerd's configuration ──> restart, if it has to
//!               each is taken back if a later one fails, until containerd serves again
//! ```

mod changes;
mod putting;
mod record;
mod registration;
mod removing;
mod service;
mod told;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Uid;

use self::changes::Changes;
use self::putting::Installing;
use self::record::Record;
use self::told::Told;
use super::check;
use crate::config::DEFAULT_PATH;

/// Where an installation is, and which containerd is told of it.
#[derive(Debug, Args)]
struct Place {
    /// Directory of the installation
    #[arg(long, value_name = "DIR", default_value = "/opt/bulkhead")]
    prefix: PathBuf,
    /// Configuration file of containerd [default: that of the running daemon, else /etc/containerd/config.toml]
    #[arg(long, value_name = "FILE")]
    containerd_config: Option<PathBuf>,
    #[command(flatten)]
    containerd: check::Containerd,
    /// Leave the restart of containerd to you, where one is needed
    #[arg(long)]
    no_restart: bool,
}

/// The arguments of `bulkhead install`.
#[derive(Debug, Args)]
pub(super) struct Install {
    /// Bundle to install, as `make bundle` makes it [default: the one that this program is in]
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    /// Directory on the PATH of containerd and of people, which gets links to the shim and to this command
    #[arg(long, value_name = "DIR", default_value = "/usr/local/bin")]
    bin_dir: PathBuf,
    #[command(flatten)]
    place: Place,
}

/// The arguments of `bulkhead uninstall`.
#[derive(Debug, Args)]
pub(super) struct Uninstall {
    #[command(flatten)]
    place: Place,
}

/// Puts everything into place.
pub(super) fn install(arguments: &Install, config: Option<&Path>, out: &mut dyn Write) -> anyhow::Result<()> {
    ensure!(Uid::effective().is_root(), "only root can install on a node: use sudo");
    let place = &arguments.place;
    let _alone = alone(&place.prefix)?;
    let bundle = putting::bundle(arguments.from.as_deref())?;
    let told = Told::find(place)?;
    let version = told.version()?;
    let before = told.configuration().with_context(|| {
        format!("containerd's configuration, {}, is not good as it is", told.main.display())
    })?;
    let config = config.unwrap_or(Path::new(DEFAULT_PATH));
    let mut work = Installing::begin(arguments, &bundle, config)?;
    work.put_files(arguments, &bundle)?;
    work.put_config(config)?;
    work.remove_obsolete()?;
    let registered = work.register(&told, version, &before).context("nothing is installed")?;
    work.note()?;
    let Installing { mut changes, mut said, record, .. } = work;

    let files = record.drop_in.iter().chain(record.main.iter().map(|main| &main.file));
    if registered || files.into_iter().any(|file| told.older_than(&file.path)) {
        said.push(told::restart(&told, &mut changes, !place.no_restart).context("nothing is installed")?);
    }
    changes.keep();
    print(out, &said)?;
    Ok(writeln!(out, "`bulkhead check` says whether this node can run pods.")?)
}

/// Takes everything back.
pub(super) fn uninstall(
    arguments: &Uninstall,
    config: Option<&Path>,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    ensure!(Uid::effective().is_root(), "only root can uninstall from a node: use sudo");
    let place = &arguments.place;
    let _alone = alone(&place.prefix)?;
    let Some(record) = Record::read(&place.prefix)? else {
        return Ok(writeln!(out, "nothing is installed in {}", place.prefix.display())?);
    };
    removing::refuse_pods(config)?;
    let told = Told::find(place);
    let mut changes = Changes::default();
    let mut said = Vec::new();
    let unregistered = removing::unregister(&mut changes, &record, &mut said)?;
    // A containerd that is gone has no configuration to spoil.
    if let Ok(told) = &told
        && unregistered
    {
        told.configuration()
            .with_context(|| format!("nothing is removed: {} would be broken", told.main.display()))?;
        said.push(told::restart(told, &mut changes, !place.no_restart).context("nothing is removed")?);
    }
    removing::remove_files(&mut changes, &record, &mut said)?;
    changes.keep();
    removing::forget(&record, &place.prefix)?;
    said.insert(0, ["removed".into(), format!("{}: bulkhead {}", place.prefix.display(), record.version)]);
    print(out, &said)
}

/// Holds off whoever else installs or uninstalls here, until it is dropped or the process ends. What is locked is the
/// directory above the installation, which is there before and after it.
fn alone(prefix: &Path) -> anyhow::Result<Flock<File>> {
    let above = std::path::absolute(prefix)?;
    let above = above.ancestors().skip(1).find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
    let dir = File::open(above).with_context(|| format!("cannot open {}", above.display()))?;
    Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EAGAIN => anyhow::anyhow!(
            "another `bulkhead install` or `bulkhead uninstall` is at work in {}; try again when it has ended",
            prefix.display()
        ),
        other => anyhow::Error::new(other).context(format!("cannot lock {}", above.display())),
    })
}

fn print(out: &mut dyn Write, said: &[[String; 2]]) -> anyhow::Result<()> {
    for [did, what] in said {
        writeln!(out, "{did:<10} {what}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_works_on_an_installation() {
        let dir = tempfile::tempdir().unwrap();
        let prefix = dir.path().join("opt/bulkhead");
        let first = alone(&prefix).unwrap();
        let error = alone(&prefix).unwrap_err().to_string();
        assert!(error.ends_with("try again when it has ended"), "{error}");
        drop(first);
        std::fs::create_dir_all(&prefix).unwrap();
        alone(&prefix).unwrap();
    }
}
