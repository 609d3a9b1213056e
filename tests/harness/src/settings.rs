//! What is under test and with which programs: read once from the environment.
//! Knows no process and starts nothing.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::pace;

/// The runtime under test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// `io.containerd.bulkhead.v2`.
    Bulkhead,
    /// `io.containerd.runc.v2`: proves the suite.
    Runc,
}

/// What is under test.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `BULKHEAD_TEST_RUNTIME`: the name of the runtime as ctr takes it.
    pub runtime_name: String,
    /// The same, as a case to decide by.
    pub runtime: Runtime,
    /// `BULKHEAD_TEST_HANDLER`: CRI's name of the runtime, for tests that make pods.
    pub handler: String,
    /// `BULKHEAD_TEST_CONTAINERD`: version of containerd.
    pub version: String,
    /// Directory of `containerd` and `ctr`.
    pub containerd_dir: PathBuf,
    /// What containerd gets as PATH.
    pub path: String,
    /// `BULKHEAD_TEST_CONFIG`: a configuration to start from; its `state_dir` is replaced.
    pub config: Option<PathBuf>,
}

impl Settings {
    /// Reads the environment.
    ///
    /// | variable | meaning | default |
    /// |---|---|---|
    /// | `BULKHEAD_TEST_RUNTIME` | runtime name | `io.containerd.bulkhead.v2` |
    /// | `BULKHEAD_TEST_HANDLER` | CRI's name of the runtime: `bulkhead`, `bulkhead-podsandbox`, `runc` | `bulkhead` |
    /// | `BULKHEAD_TEST_CONTAINERD` | version of containerd | `2.4.2` |
    /// | `BULKHEAD_TEST_PARTS` | directory that holds `containerd-<version>/` and `runc/` | the parts cache |
    /// | `BULKHEAD_TEST_PATH` | directories of bulkhead's programs, as PATH | the debug build |
    /// | `BULKHEAD_TEST_CONFIG` | a config.toml to start from | none |
    /// | `BULKHEAD_TEST_SLOW` | how many times longer every deadline is | `1` |
    ///
    /// Fails where a program that every test needs is missing, and names it. Without `containerd` the suite
    /// plays containerd itself, and the daemon need not be there.
    pub fn from_env(containerd: bool) -> Result<Self> {
        pace::read()?;
        let var = |name: &str| env::var(name).ok().filter(|v| !v.is_empty());
        let handler = var("BULKHEAD_TEST_HANDLER").unwrap_or_else(|| "bulkhead".into());
        let of_handler = match handler.as_str() {
            "runc" => "io.containerd.runc.v2",
            "bulkhead" | "bulkhead-podsandbox" => "io.containerd.bulkhead.v2",
            other => bail!("BULKHEAD_TEST_HANDLER={other}: use bulkhead, bulkhead-podsandbox or runc"),
        };
        let runtime_name = var("BULKHEAD_TEST_RUNTIME").unwrap_or_else(|| of_handler.into());
        let runtime = match runtime_name.as_str() {
            "io.containerd.runc.v2" => Runtime::Runc,
            "io.containerd.bulkhead.v2" => Runtime::Bulkhead,
            other => {
                bail!("BULKHEAD_TEST_RUNTIME={other}: use io.containerd.bulkhead.v2 or io.containerd.runc.v2")
            }
        };
        let version = var("BULKHEAD_TEST_CONTAINERD").unwrap_or_else(|| "2.4.2".into());
        let cache = var("BULKHEAD_CACHE").unwrap_or_else(|| "/var/cache/bulkhead".into());
        let parts =
            var("BULKHEAD_TEST_PARTS").map(PathBuf::from).unwrap_or_else(|| Path::new(&cache).join("parts"));
        let containerd_dir = parts.join(format!("containerd-{version}"));
        for program in ["containerd", "ctr"].iter().filter(|_| containerd) {
            let path = containerd_dir.join(program);
            if !path.exists() {
                bail!("{} is missing: build it with tests/parts, or set BULKHEAD_TEST_PARTS", path.display());
            }
        }
        let programs = var("BULKHEAD_TEST_PATH").unwrap_or_else(default_programs);
        let system = env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".into());
        let path =
            format!("{programs}:{}:{}:{system}", containerd_dir.display(), parts.join("runc").display());
        let shim = match runtime {
            Runtime::Runc => "containerd-shim-runc-v2",
            Runtime::Bulkhead => "containerd-shim-bulkhead-v2",
        };
        find(&path, shim).with_context(|| format!("{shim} is on none of {path}"))?;
        let config = var("BULKHEAD_TEST_CONFIG").map(PathBuf::from);
        Ok(Self { runtime_name, runtime, handler, version, containerd_dir, path, config })
    }

    /// Whether the runtime under test is bulkhead.
    pub fn is_bulkhead(&self) -> bool {
        self.runtime == Runtime::Bulkhead
    }

    /// Whether containerd is of the 1.x line, whose ctr lacks some flags.
    pub fn is_containerd_1(&self) -> bool {
        self.version.starts_with("1.")
    }

    /// Path of the program `name` on containerd's PATH.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        find(&self.path, name).with_context(|| format!("{name} is on none of {}", self.path))
    }
}

fn find(path: &str, name: &str) -> Option<PathBuf> {
    path.split(':').map(|dir| Path::new(dir).join(name)).find(|p| p.is_file())
}

/// Where `cargo build` puts the programs of this checkout.
fn default_programs() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let root = root.canonicalize().unwrap_or(root);
    root.join("target/x86_64-unknown-linux-gnu/debug").display().to_string()
}
