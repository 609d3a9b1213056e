//! Changes of files that are all kept or all taken back.
//! Does not know what the files are for.
//!
//! A file is written beside its place and renamed into it; what was there keeps a second name until everything is
//! done. So no reader sees half a file, a program that runs keeps its own, and a change that is dropped before
//! [`Changes::keep`] leaves what was there before.

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};

/// What a file is to hold.
#[derive(Clone, Copy, Debug)]
pub(super) enum Content<'a> {
    Text(&'a str),
    /// As another file has it.
    Of(&'a Path),
}

impl Content<'_> {
    fn open(self) -> anyhow::Result<Box<dyn Read>> {
        Ok(match self {
            Content::Text(text) => Box::new(io::Cursor::new(text.to_owned())),
            Content::Of(path) => {
                Box::new(File::open(path).with_context(|| format!("cannot read {}", path.display()))?)
            }
        })
    }

    /// The sum of it, as [`sum`] has it of a file.
    pub(super) fn sum(self) -> anyhow::Result<String> {
        let (mut sum, mut from) = (Sha256::new(), self.open()?);
        let mut block = vec![0; 1 << 16];
        loop {
            match from.read(&mut block)? {
                0 => return Ok(hex(&sum.finalize())),
                read => sum.update(&block[..read]),
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The SHA-256 of a file, or nothing if there is none.
pub(super) fn sum(path: &Path) -> anyhow::Result<Option<String>> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot look at {}", path.display())),
        Ok(_) => Content::Of(path).sum().map(Some),
    }
}

#[derive(Debug)]
enum Undo {
    RemoveDirectory(PathBuf),
    Remove(PathBuf),
    /// It was there, and has this second name.
    Restore {
        path: PathBuf,
        kept: PathBuf,
    },
}

/// What was changed so far, the newest last.
#[derive(Debug, Default)]
pub(super) struct Changes(Vec<Undo>);

impl Changes {
    /// Makes the directory and those above it, where they are missing.
    pub(super) fn directory(&mut self, path: &Path) -> anyhow::Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        if let Some(above) = path.parent() {
            self.directory(above)?;
        }
        fs::create_dir(path).with_context(|| format!("cannot make the directory {}", path.display()))?;
        self.0.push(Undo::RemoveDirectory(path.to_owned()));
        Ok(())
    }

    /// Gives the file this content and mode; answers whether it had another one.
    pub(super) fn file(&mut self, path: &Path, content: Content<'_>, mode: u32) -> anyhow::Result<bool> {
        if let Ok(there) = fs::symlink_metadata(path) {
            if !there.is_file() {
                bail!("{} is there and is no file; move it away", path.display());
            }
            if there.permissions().mode() & 0o7777 == mode && sum(path)? == Some(content.sum()?) {
                return Ok(false);
            }
        }
        let fresh = beside(path, "new");
        let put = || -> anyhow::Result<()> {
            forget(&fresh)?;
            let mut file = File::options().write(true).create_new(true).open(&fresh)?;
            io::copy(&mut content.open()?, &mut file)?;
            file.flush()?;
            file.set_permissions(Permissions::from_mode(mode))?;
            Ok(file.sync_all()?)
        };
        self.put(path, &fresh, put())
    }

    /// Makes the symbolic link; answers whether there was another one or none.
    pub(super) fn link(&mut self, path: &Path, target: &Path) -> anyhow::Result<bool> {
        if let Ok(there) = fs::symlink_metadata(path) {
            if !there.is_symlink() {
                bail!("{} is there and was not made by `bulkhead install`; move it away", path.display());
            }
            if fs::read_link(path).is_ok_and(|there| there == target) {
                return Ok(false);
            }
        }
        let fresh = beside(path, "new");
        let made = forget(&fresh).and_then(|()| symlink(target, &fresh)).map_err(anyhow::Error::from);
        self.put(path, &fresh, made)
    }

    /// Renames what was made beside the place into it.
    fn put(&mut self, path: &Path, fresh: &Path, made: anyhow::Result<()>) -> anyhow::Result<bool> {
        let put = made.and_then(|()| {
            // What was there before the first change is what comes back.
            if !self.knows(path) {
                let undo = second_name(path)?;
                self.0.push(undo.unwrap_or_else(|| Undo::Remove(path.to_owned())));
            }
            Ok(fs::rename(fresh, path)?)
        });
        if put.is_err() {
            let _ = forget(fresh);
        }
        put.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(true)
    }

    /// Removes a file or a link, if it is there.
    pub(super) fn remove(&mut self, path: &Path) -> anyhow::Result<()> {
        let mut remove = || -> io::Result<()> {
            if !self.knows(path) {
                let Some(undo) = second_name(path)? else { return Ok(()) };
                self.0.push(undo);
            }
            forget(path)
        };
        remove().with_context(|| format!("cannot remove {}", path.display()))
    }

    fn knows(&self, path: &Path) -> bool {
        self.0.iter().any(|undo| match undo {
            Undo::Remove(known) | Undo::Restore { path: known, .. } => known == path,
            Undo::RemoveDirectory(_) => false,
        })
    }

    /// Nothing is taken back any more.
    pub(super) fn keep(mut self) {
        for undo in self.0.drain(..) {
            if let Undo::Restore { kept, .. } = undo {
                let _ = forget(&kept);
            }
        }
    }

    /// Takes everything back, the newest first; answers what could not be.
    pub(super) fn take_back(&mut self) -> Vec<String> {
        let mut failed = Vec::new();
        while let Some(undo) = self.0.pop() {
            let (path, done) = match &undo {
                Undo::RemoveDirectory(path) => (path, fs::remove_dir(path)),
                Undo::Remove(path) => (path, forget(path)),
                // Two names of one file are left as they are by rename(2), so the second is removed besides.
                Undo::Restore { path, kept } => (path, fs::rename(kept, path).and_then(|()| forget(kept))),
            };
            if let Err(error) = done {
                failed.push(format!("{}: {error}", path.display()));
            }
        }
        failed
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        for failure in self.take_back() {
            eprintln!("bulkhead: not taken back: {failure}");
        }
    }
}

/// Removes what a run that was killed has left beside this path.
pub(super) fn sweep(path: &Path) -> anyhow::Result<()> {
    for what in ["new", "old"] {
        let path = beside(path, what);
        forget(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// Gives what is at the path a second name, if something is.
fn second_name(path: &Path) -> io::Result<Option<Undo>> {
    let kept = beside(path, "old");
    // Of a run that was killed.
    forget(&kept)?;
    // A symbolic link gets a second name itself, not what it leads to (link(2)).
    match fs::hard_link(path, &kept) {
        Ok(()) => Ok(Some(Undo::Restore { path: path.to_owned(), kept })),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A name beside the file's own, which a run that was killed leaves and the next one takes.
fn beside(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.bulkhead-{what}"))
}

/// Removes a file that may not be there.
fn forget(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_not_kept_is_as_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("old"), "a").unwrap();
        fs::write(path("gone"), "b").unwrap();
        symlink("old", path("link")).unwrap();
        {
            let mut changes = Changes::default();
            assert!(changes.file(&path("old"), Content::Text("x"), 0o600).unwrap());
            assert!(changes.file(&path("new"), Content::Of(&path("gone")), 0o755).unwrap());
            changes.remove(&path("gone")).unwrap();
            changes.remove(&path("never")).unwrap();
            assert!(changes.link(&path("link"), Path::new("new")).unwrap());
            changes.directory(&path("d/e")).unwrap();
            changes.file(&path("d/e/f"), Content::Text("y"), 0o644).unwrap();
            changes.file(&path("old"), Content::Text("z"), 0o600).unwrap();
            changes.remove(&path("new")).unwrap();
            assert_eq!(fs::read_to_string(path("old")).unwrap(), "z");
        }
        assert_eq!(names(dir.path()), ["gone", "link", "old"]);
        assert_eq!(fs::read_to_string(path("old")).unwrap(), "a");
        assert_eq!(fs::read_to_string(path("gone")).unwrap(), "b");
        assert_eq!(fs::read_link(path("link")).unwrap(), Path::new("old"));
    }

    #[test]
    fn what_is_kept_stays_and_nothing_lies_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a"), "1").unwrap();
        // What a run that was killed has left.
        fs::write(path(".a.bulkhead-new"), "half").unwrap();
        fs::write(path(".a.bulkhead-old"), "0").unwrap();
        let mut changes = Changes::default();
        assert!(changes.file(&path("a"), Content::Text("2"), 0o755).unwrap());
        assert!(changes.link(&path("b"), Path::new("a")).unwrap());
        changes.keep();
        assert_eq!(names(dir.path()), ["a", "b"]);
        assert_eq!(fs::read_to_string(path("b")).unwrap(), "2");
        assert_eq!(fs::metadata(path("a")).unwrap().permissions().mode() & 0o7777, 0o755);
        let mut again = Changes::default();
        assert!(!again.file(&path("a"), Content::Text("2"), 0o755).unwrap());
        assert!(!again.link(&path("b"), Path::new("a")).unwrap());
        assert!(again.0.is_empty());
    }

    #[test]
    fn what_somebody_else_put_there_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        fs::write(&path, "theirs").unwrap();
        let error = Changes::default().link(&path, Path::new("/x")).unwrap_err();
        assert!(error.to_string().ends_with("move it away"), "{error}");
        let error = Changes::default().file(dir.path(), Content::Text(""), 0o644).unwrap_err();
        assert!(error.to_string().contains("is no file"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "theirs");
        assert_eq!(names(dir.path()), ["program"]);
    }
}
