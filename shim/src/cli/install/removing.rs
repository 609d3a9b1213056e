//! Taking an installation back, as far as nobody has changed it since.
//! Restarts nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, bail};

use super::super::pods::{self, Status};
use super::changes::{self, Changes, Content};
use super::record::{Added, Main, Record};
use super::registration;
use crate::config::Config;

/// Pods lose with their shim what ends them. Where it cannot be known whether any runs, nothing is removed either.
pub(super) fn refuse_pods(config: Option<&Path>) -> anyhow::Result<()> {
    // One that is gone names no other state directory than the default.
    let config = Config::load(config.filter(|path| path.exists()))
        .context("nothing is removed, for it is not known where pods would be")?;
    let (pods, unread) = pods::find(&config.state_dir)?;
    let alive = pods.iter().filter(|pod| pod.status() != Status::Dead).map(pods::Found::name);
    let alive: Vec<String> = alive.chain(unread).collect();
    if !alive.is_empty() {
        bail!(
            "nothing is removed: pods run here, and would have nobody to end them: {}; remove them first",
            alive.join(", ")
        );
    }
    Ok(())
}

/// Takes our part out of containerd's configuration; answers whether there was any.
pub(super) fn unregister(
    changes: &mut Changes,
    record: &Record,
    said: &mut Vec<[String; 2]>,
) -> anyhow::Result<bool> {
    let mut changed = false;
    if let Some(drop_in) = &record.drop_in
        && drop_in.path.exists()
    {
        if !drop_in.untouched()? {
            // Where no pattern of imports finds it.
            let aside = drop_in.path.with_extension("toml.changed");
            changes.file(&aside, Content::Of(&drop_in.path), 0o644)?;
            said.push(["kept".into(), format!("{}, which was changed", aside.display())]);
        }
        changes.remove(&drop_in.path)?;
        said.push(["removed".into(), drop_in.path.display().to_string()]);
        changed = true;
    }
    let Some(Main { file, before, added }) = &record.main else { return Ok(changed) };
    if !file.path.exists() || matches!(added, Added::Import(glob) if others_import(Path::new(glob))) {
        return Ok(changed);
    }
    match before {
        Some(before) if file.untouched()? => put_main(changes, &file.path, before)?,
        None if file.untouched()? => changes.remove(&file.path)?,
        _ => {
            let text = fs::read_to_string(&file.path)
                .with_context(|| format!("cannot read {}", file.path.display()))?;
            let text = match added {
                Added::Import(glob) => registration::without_import(&text, glob),
                Added::Runtime => registration::without_runtime(&text),
            };
            put_main(
                changes,
                &file.path,
                &text.with_context(|| format!("cannot edit {}", file.path.display()))?,
            )?;
        }
    }
    said.push(["restored".into(), file.path.display().to_string()]);
    Ok(true)
}

/// Whether the import serves files of others by now.
fn others_import(glob: &Path) -> bool {
    let files = glob.parent().and_then(|dir| fs::read_dir(dir).ok()).into_iter().flatten().flatten();
    files.map(|file| file.path()).any(|file| file.extension().is_some_and(|end| end == "toml"))
}

fn put_main(changes: &mut Changes, main: &Path, text: &str) -> anyhow::Result<()> {
    let mode = fs::metadata(main).map_or(0o644, |main| main.permissions().mode() & 0o7777);
    changes.file(main, Content::Text(text), mode).map(drop)
}

/// Removes the directories that are empty now, from within.
fn remove_empty(record: &Record, prefix: &Path) {
    let files = record.files.iter().chain(&record.drop_in).map(|written| written.path.as_path());
    let mut dirs: Vec<&Path> = files.filter_map(Path::parent).chain([prefix]).collect();
    // A directory that the system itself has is not ours, empty or not.
    dirs.retain(|dir| dir.starts_with(prefix) || dir.ends_with("bulkhead") || dir.ends_with("conf.d"));
    dirs.sort_by_key(|dir| std::cmp::Reverse(dir.components().count()));
    for dir in dirs {
        // Fails where something is left, which is how it is meant.
        let _ = fs::remove_dir(dir);
    }
}

/// Removes what was installed and is as it was.
pub(super) fn remove_files(
    changes: &mut Changes,
    record: &Record,
    said: &mut Vec<[String; 2]>,
) -> anyhow::Result<()> {
    for written in &record.files {
        if written.untouched()? {
            changes.remove(&written.path)?;
        } else if written.path.exists() {
            said.push(["kept".into(), format!("{}, which was changed", written.path.display())]);
        }
    }
    for link in &record.links {
        if fs::read_link(&link.path).is_ok_and(|target| target == link.target) {
            changes.remove(&link.path)?;
        }
    }
    Ok(())
}

/// Removes what a killed run has left, the record, and the directories that are empty now.
pub(super) fn forget(record: &Record, prefix: &Path) -> anyhow::Result<()> {
    let links = record.links.iter().map(|link| &link.path);
    let record_path = Record::path(prefix);
    for path in record.all_files().map(|written| &written.path).chain(links).chain([&record_path]) {
        changes::sweep(path)?;
    }
    // Last: until then a second try knows what is left to do.
    fs::remove_file(&record_path).with_context(|| format!("cannot remove {}", record_path.display()))?;
    remove_empty(record, prefix);
    Ok(())
}
