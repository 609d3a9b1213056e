//! What `bulkhead install` has put where, written down before it does it, so that `bulkhead uninstall` takes back
//! that and nothing else.
//! Changes nothing.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::changes;

/// The record's name in the directory of the installation.
const NAME: &str = "installed.json";

/// What is installed.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(super) struct Record {
    /// The version of bulkhead.
    pub(super) version: String,
    pub(super) files: Vec<Written>,
    pub(super) links: Vec<Link>,
    /// The file beside containerd's main one.
    pub(super) drop_in: Option<Written>,
    pub(super) main: Option<Main>,
}

/// A file that was written.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Written {
    pub(super) path: PathBuf,
    pub(super) sha256: String,
}

impl Written {
    /// Whether nobody has changed it since.
    pub(super) fn untouched(&self) -> anyhow::Result<bool> {
        Ok(changes::sum(&self.path)?.as_ref() == Some(&self.sha256))
    }
}

/// A symbolic link that was made.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Link {
    pub(super) path: PathBuf,
    pub(super) target: PathBuf,
}

/// What was changed in containerd's main file.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Main {
    pub(super) file: Written,
    /// What it said before; nothing if it was not there.
    pub(super) before: Option<String>,
    pub(super) added: Added,
}

/// The addition.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Added {
    /// This pattern among the `imports`.
    Import(String),
    /// The table of the runtime itself.
    Runtime,
}

impl Record {
    /// Where the record of an installation lies.
    pub(super) fn path(prefix: &Path) -> PathBuf {
        prefix.join(NAME)
    }

    /// The record of what is installed there, if anything is.
    pub(super) fn read(prefix: &Path) -> anyhow::Result<Option<Self>> {
        let path = Self::path(prefix);
        let text = match std::fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.with_context(|| format!("cannot read {}", path.display()))?,
        };
        serde_json::from_slice(&text)
            .map(Some)
            .with_context(|| format!("{} is not what `bulkhead install` writes", path.display()))
    }

    /// As it is written.
    pub(super) fn text(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// Every file of it.
    pub(super) fn all_files(&self) -> impl Iterator<Item = &Written> {
        self.files.iter().chain(&self.drop_in).chain(self.main.iter().map(|main| &main.file))
    }

    /// What was written to this path.
    pub(super) fn written(&self, path: &Path) -> Option<&Written> {
        self.files.iter().find(|written| written.path == path)
    }
}
