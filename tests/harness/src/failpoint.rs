//! Tells a shim that was built with places where it can fail at which of them it is to.
//! Knows the file that such a shim reads; not what the places are.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use crate::context::Context;
use crate::node::Node;

impl Node {
    /// What the shim reads when it starts, if it is there.
    pub(crate) fn failpoint(&self) -> PathBuf {
        self.dir().join("failpoint")
    }

    /// What a shim makes when it has come to its place.
    fn failpoint_reached(&self) -> PathBuf {
        self.dir().join("failpoint.reached")
    }

    /// Shims that start from now on have no place to fail at.
    pub(crate) fn disarm(&self) {
        fs::remove_file(self.failpoint()).ok();
        fs::remove_file(self.failpoint_reached()).ok();
    }
}

impl Context<'_> {
    /// Shims that this test starts from now on fail at `place`, or are killed there.
    pub fn arm(&mut self, place: &str, action: &str) -> Result<()> {
        let file = self.node().failpoint();
        fs::write(&file, format!("{place} {action}\n")).with_context(|| format!("write {}", file.display()))
    }

    /// Fails unless a shim has come to its place.
    pub fn reached(&mut self, place: &str) -> Result<()> {
        match fs::read_to_string(self.node().failpoint_reached()) {
            Ok(reached) if reached == place => Ok(()),
            Ok(reached) => bail!("the shim came to {reached} instead of {place}"),
            Err(_) => bail!("the shim never came to {place}"),
        }
    }
}
