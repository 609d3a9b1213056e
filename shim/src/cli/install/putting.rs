//! Putting a bundle into place, step by step.
//! Restarts nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use super::super::containerd::{self, SHIM};
use super::Install;
use super::changes::{Changes, Content};
use super::record::{Added, Link, Main, Record, Written};
use super::registration;
use super::told::Told;
use crate::config::Config;

/// What a bundle has in `bin/`.
const PROGRAMS: [&str; 5] = [SHIM, "bulkhead", "bulkhead-vmm", "virtiofsd", "vhost-device-vsock"];
/// Those of them that containerd and people look for on their PATH.
const LINKED: [&str; 2] = [SHIM, "bulkhead"];
/// What a bundle has in `share/`.
const SHARED: [&str; 3] = ["vmlinux", "guest.cpio", "config.toml"];
/// The drop-in's name beside containerd's main file.
const DROP_IN: &str = "conf.d/bulkhead.toml";

/// The bundle to install, which has all that belongs to one.
pub(super) fn bundle(from: Option<&Path>) -> anyhow::Result<PathBuf> {
    let own = || Some(std::env::current_exe().ok()?.parent()?.parent()?.to_owned());
    let dir = from.map(Path::to_owned).or_else(own).context("this program does not know where it lies")?;
    for part in parts() {
        ensure!(
            dir.join(&part).is_file(),
            "{} is no bundle: it has no {}; `make bundle` makes one, and --from names it",
            dir.display(),
            part.display()
        );
    }
    Ok(dir)
}

/// The files of a bundle, seen from it.
fn parts() -> impl Iterator<Item = PathBuf> {
    let programs = PROGRAMS.map(|name| Path::new("bin").join(name));
    programs.into_iter().chain(SHARED.map(|name| Path::new("share").join(name)))
}

/// What the configuration of a node says that has none of its own. Programs are found beside the shim.
fn config_text(prefix: &Path) -> String {
    let prefix = prefix.display();
    format!(
        "# Written by `bulkhead install`, which leaves it alone once you change it. {prefix}/share/config.toml\n\
         # explains every key; one that is not here has its default.\n\
         \n\
         [hypervisor]\n\
         kernel = \"{prefix}/share/vmlinux\"\n\
         image = \"{prefix}/share/guest.cpio\"\n"
    )
}

/// A file of configuration may be a link to where it is kept.
fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// An installation that goes on.
pub(super) struct Installing<'a> {
    prefix: &'a Path,
    pub(super) changes: Changes,
    /// What was installed here before.
    former: Record,
    /// What will be.
    pub(super) record: Record,
    /// What was done, and on what.
    pub(super) said: Vec<[String; 2]>,
}

impl<'a> Installing<'a> {
    /// Writes down what will be installed.
    pub(super) fn begin(arguments: &'a Install, bundle: &Path, config: &Path) -> anyhow::Result<Self> {
        let prefix = &arguments.place.prefix;
        let former = Record::read(prefix)?.unwrap_or_default();
        let mut record = Record {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            drop_in: former.drop_in.clone(),
            main: former.main.clone(),
            ..Record::default()
        };
        for part in parts() {
            let sha256 = Content::Of(&bundle.join(&part)).sum()?;
            record.files.push(Written { path: prefix.join(part), sha256 });
        }
        for name in LINKED {
            let (path, target) = (arguments.bin_dir.join(name), prefix.join("bin").join(name));
            record.links.push(Link { path, target });
        }
        let mut work = Self { prefix, changes: Changes::default(), former, record, said: Vec::new() };
        if work.may_write(config)? {
            let sha256 = Content::Text(&config_text(prefix)).sum()?;
            work.record.files.push(Written { path: config.to_owned(), sha256 });
        }
        work.changes.directory(prefix)?;
        work.note()?;
        Ok(work)
    }

    /// Writes the record. Before what it tells of is done, so that a kill in between leaves nothing unknown.
    pub(super) fn note(&mut self) -> anyhow::Result<()> {
        self.changes.file(&Record::path(self.prefix), Content::Text(&self.record.text()?), 0o644).map(drop)
    }

    fn say(&mut self, did: &str, what: String) {
        self.said.push([did.to_owned(), what]);
    }

    /// Copies the files and makes the links.
    pub(super) fn put_files(&mut self, arguments: &Install, bundle: &Path) -> anyhow::Result<()> {
        let (prefix, changes) = (self.prefix, &mut self.changes);
        let mut fresh = false;
        for dir in [&prefix.join("bin"), &prefix.join("share"), &arguments.bin_dir] {
            changes.directory(dir)?;
        }
        for part in parts() {
            let mode = if part.starts_with("bin") { 0o755 } else { 0o644 };
            fresh |= changes.file(&prefix.join(&part), Content::Of(&bundle.join(&part)), mode)?;
        }
        for name in LINKED {
            fresh |= changes.link(&arguments.bin_dir.join(name), &prefix.join("bin").join(name))?;
        }
        let what = format!("{}: bulkhead {}", prefix.display(), env!("CARGO_PKG_VERSION"));
        self.say(if fresh { "installed" } else { "unchanged" }, what);
        Ok(())
    }

    /// Whether a configuration is not there, or as we have written it.
    fn may_write(&self, config: &Path) -> anyhow::Result<bool> {
        Ok(!config.exists() || self.former.written(config).map_or(Ok(false), Written::untouched)?)
    }

    pub(super) fn put_config(&mut self, config: &Path) -> anyhow::Result<()> {
        if !self.may_write(config)? {
            let loaded = Config::load(Some(config))?;
            for part in [loaded.resolve_kernel(), loaded.resolve_image()] {
                part.with_context(|| format!("{} was kept as it is, and is not good", config.display()))?;
            }
            self.say("kept", format!("{}, which is yours", config.display()));
            return Ok(());
        }
        if let Some(dir) = config.parent() {
            self.changes.directory(dir)?;
        }
        if self.changes.file(config, Content::Text(&config_text(self.prefix)), 0o644)? {
            self.say("wrote", config.display().to_string());
        }
        Ok(())
    }

    /// Removes what an older version had installed and this one has no more.
    pub(super) fn remove_obsolete(&mut self) -> anyhow::Result<()> {
        for old in &self.former.files {
            if self.record.written(&old.path).is_none() && old.untouched()? {
                self.changes.remove(&old.path)?;
            }
        }
        for old in &self.former.links {
            let gone = !self.record.links.iter().any(|link| link.path == old.path);
            if gone && fs::read_link(&old.path).is_ok_and(|target| target == old.target) {
                self.changes.remove(&old.path)?;
            }
        }
        Ok(())
    }

    /// Tells containerd's configuration of the runtime; answers whether that changed anything.
    pub(super) fn register(
        &mut self,
        told: &Told,
        version: (u32, u32),
        before: &toml::Table,
    ) -> anyhow::Result<bool> {
        let main = real(&told.main);
        if registered(before) && self.former.drop_in.is_none() && self.former.main.is_none() {
            self.say("unchanged", format!("{}, which registers the runtime already", main.display()));
            return Ok(false);
        }
        let mut changed = false;
        if version >= (2, 0) {
            let path = main.with_file_name(DROP_IN);
            changed |= self.drop_in(&path, &registration::drop_in(version))?;
            // From 2.2 on such files are imported where nothing else is said.
            if !registered(&told.configuration()?) {
                let glob = path.with_file_name("*.toml").display().to_string();
                let edit = |text: &str| registration::with_import(text, &glob);
                self.edit_main(&main, edit, Added::Import(glob.clone()))?;
                changed = true;
                self.say("added", format!("an import of {glob} to {}", main.display()));
            }
        } else if !registered(before) {
            self.edit_main(&main, |text| registration::with_runtime(text, before), Added::Runtime)?;
            changed = true;
            self.say("added", format!("the runtime to {}", main.display()));
        }
        let after = told.configuration()?;
        ensure!(
            registered(&after),
            "with {} and what it imports, CRI still knows no runtime `{}`",
            main.display(),
            registration::HANDLER
        );
        let lost = registration::lost(before, &after);
        ensure!(lost.is_empty(), "containerd would lose or change what it has at: {}", lost.join(", "));
        Ok(changed)
    }

    fn drop_in(&mut self, path: &Path, text: &str) -> anyhow::Result<bool> {
        self.record.drop_in = Some(Written { path: path.to_owned(), sha256: Content::Text(text).sum()? });
        self.note()?;
        if let Some(dir) = path.parent() {
            self.changes.directory(dir)?;
        }
        let changed = self.changes.file(path, Content::Text(text), 0o644)?;
        if changed {
            self.say("added", path.display().to_string());
        }
        Ok(changed)
    }

    fn edit_main(
        &mut self,
        main: &Path,
        edit: impl Fn(&str) -> anyhow::Result<String>,
        added: Added,
    ) -> anyhow::Result<()> {
        let before = main.exists().then(|| fs::read_to_string(main)).transpose();
        let before = before.with_context(|| format!("cannot read {}", main.display()))?;
        let text = edit(before.as_deref().unwrap_or_default())
            .with_context(|| format!("cannot register with {}", main.display()))?;
        let file = Written { path: main.to_owned(), sha256: Content::Text(&text).sum()? };
        self.record.main = Some(Main { file, before, added });
        self.note()?;
        let mode = fs::metadata(main).map_or(0o644, |main| main.permissions().mode() & 0o7777);
        self.changes.file(main, Content::Text(&text), mode).map(drop)
    }
}

/// Whether CRI knows the runtime by the name that a RuntimeClass gives.
fn registered(config: &toml::Table) -> bool {
    containerd::handlers(config).contains(&registration::HANDLER)
}
