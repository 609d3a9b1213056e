//! Starts, changes and removes containers. libcontainer lives behind this door and nowhere else.
//! Knows OCI specifications as they are to be applied; must not know the host's requests.
//!
//! libcontainer forks, changes directory and blocks, so it runs in workers of a process (the zygote) that is
//! forked before the agent starts its runtime:
//! ```text
//! agent ──(socket, stdio fds)──▶ zygote ──fork──▶ worker ──libcontainer──▶ init of the container
//!   ▲                                               │                          │
//!   └──────────── answer, terminal fd ──────────────┘ exits, hence PID 1 ──────┘ is its parent
//! ```

mod client;
mod debug;
mod devices;
mod join;
mod last_mile;
mod mapped;
mod schedule;
mod wire;
mod worker;
mod zygote;

use std::{os::fd::OwnedFd, path::PathBuf};

use async_trait::async_trait;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources, Process, Spec};
use serde::{Deserialize, Serialize};

pub(crate) use client::Zygote;
pub(crate) use devices::{allows_everything as allows_every_device, defaults as default_devices};
pub(crate) use last_mile::{LastMile, Size};

use crate::users::Users;

/// What is done to containers.
#[async_trait]
pub(crate) trait Launcher: Send + Sync {
    /// Everything up to the point where only the exec of the command is missing.
    async fn create(&self, create: Create, stdio: Option<[OwnedFd; 3]>) -> Result<Launched, LaunchError>;
    /// Lets the command of a created container run.
    async fn start(&self, id: &str) -> Result<(), LaunchError>;
    /// Runs a further process in a started container.
    async fn exec(&self, exec: Exec, stdio: Option<[OwnedFd; 3]>) -> Result<Launched, LaunchError>;
    /// Runs a program in the namespaces of the guest itself.
    async fn debug(&self, debug: Debug, stdio: Option<[OwnedFd; 3]>) -> Result<Launched, LaunchError>;
    /// Makes the namespaces of a pod that has users of its own, with `sysctls` written there.
    async fn make_pod(&self, users: Users, sysctls: Vec<(String, String)>) -> Result<(), LaunchError>;
    /// Makes the namespace of processes that containers of the pod share; nothing where it is there.
    async fn share_pids(&self) -> Result<(), LaunchError>;
    /// Changes the limits of a container.
    async fn update(&self, id: &str, resources: LinuxResources) -> Result<(), LaunchError>;
    /// Removes what libcontainer keeps of a container, and its cgroup. Kills what still runs.
    async fn delete(&self, id: &str) -> Result<(), LaunchError>;
}

/// A container to be made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Create {
    pub(crate) id: String,
    /// Adapted to the guest; what `last_mile` and `devices` take care of is no longer in it.
    pub(crate) spec: Spec,
    pub(crate) last_mile: LastMile,
    /// Access to devices by number, later rules winning.
    pub(crate) devices: Vec<LinuxDeviceCgroup>,
    /// Set if it is in the pod's user namespace.
    pub(crate) users: Option<Users>,
}

/// A process to be added to a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Exec {
    /// Pid of the container's init, whose cgroup and namespaces it gets.
    pub(crate) init: i32,
    pub(crate) process: Process,
    pub(crate) last_mile: LastMile,
    /// Set if it is in the pod's user namespace.
    pub(crate) users: Option<Users>,
}

/// A program to be run in the namespaces of the guest itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Debug {
    /// Root file system in which the program and its files are.
    pub(crate) root: PathBuf,
    /// Its cgroup, which is there.
    pub(crate) cgroup: PathBuf,
    /// The program. It has all capabilities and no filter, whatever is said here.
    pub(crate) last_mile: LastMile,
}

/// A process that was made.
#[derive(Debug)]
pub(crate) struct Launched {
    /// In the guest's root pid namespace.
    pub(crate) pid: i32,
    /// Controlling end of its terminal, if it was to have one.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Why a launcher did not do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    /// Refused; the text is complete and for users.
    #[error("{0}")]
    Refused(String),
    /// The launcher itself is in trouble.
    #[error("launcher: {0}")]
    Broken(#[from] std::io::Error),
}

/// What a worker is asked.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    Create(Box<Create>),
    Start { id: String },
    MakePod { users: Users, sysctls: Vec<(String, String)> },
    SharePids,
    Exec(Box<Exec>),
    Debug(Box<Debug>),
    Update { id: String, resources: Box<LinuxResources> },
    Delete { id: String },
}

/// What a worker answers.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Reply {
    Launched { pid: i32 },
    Done,
    Refused { text: String },
}
