//! The configuration of the shim and of the operator's command: keys, defaults, and where values come from.
//! Knows nothing of sandboxes and machines; it only yields checked values.
//!
//! A value comes from the file, is overridden by containerd's runtime options ([`Config::with_runtime_options`])
//! and then by the pod's annotations ([`Config::with_annotations`]), which the administrator must have allowed.

mod error;
mod files;
mod overlay;
mod pattern;
mod schema;
#[cfg(test)]
mod tests;
mod text;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use error::{ConfigError, Place};
pub use files::GuestFiles;
pub use overlay::ANNOTATION_PREFIX;
pub use pattern::{Pattern, name_fits};
pub(crate) use schema::nearest;
pub use schema::{KEYS, Key, Kind};

/// Environment variable that names the configuration file.
pub const PATH_VARIABLE: &str = "BULKHEAD_CONFIG";

/// The file that is read, if it exists, where nothing names another.
pub const DEFAULT_PATH: &str = "/etc/bulkhead/config.toml";

/// The least memory, in MiB, with which the guest boots: workload and reserve together.
pub const MINIMUM_GUEST_MEMORY_MIB: u64 = bulkhead_hypervisor::qemu::MINIMUM_MEMORY.0;

/// Every value that an operator can set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Directory that holds one directory for each sandbox.
    pub state_dir: PathBuf,
    /// Least severity of messages that are logged.
    pub log_level: String,
    /// File to which spans are appended as JSON lines, one per stage of a start.
    pub trace_file: Option<PathBuf>,
    /// Which machine runs a pod, and from what.
    pub hypervisor: Hypervisor,
    /// The size of a pod's machine.
    pub sandbox: Sandbox,
    /// The network of a pod.
    pub network: Network,
    /// The disks of a pod.
    pub storage: Storage,
    /// How the shim speaks with the agent in the guest.
    pub agent: Agent,
    /// What of the host's volumes containers can use beside their files.
    pub volumes: Volumes,
    /// What a pod may change by annotation.
    pub annotations: Annotations,
}

/// Which machine runs a pod, and from what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hypervisor {
    /// What executes the guest.
    pub backend: Backend,
    /// Uncompressed ELF kernel of the guest.
    pub kernel: PathBuf,
    /// Root file system of the guest: an uncompressed cpio archive.
    pub image: PathBuf,
    /// Appended to the kernel's command line.
    pub kernel_params: String,
    /// Our machine monitor for KVM.
    pub vmm: PathBuf,
    /// QEMU's system emulator.
    pub qemu: PathBuf,
    /// The daemon behind the directory that host and guest share.
    pub virtiofsd: PathBuf,
    /// The daemon behind the guest's vsock device.
    pub vhost_device_vsock: PathBuf,
    /// How long a guest may take from launch until its agent reports.
    pub boot_timeout_seconds: u64,
}

/// What executes the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// KVM where the processor really virtualises, emulation elsewhere.
    #[default]
    Auto,
    /// Hardware virtualisation, or a refusal.
    Kvm,
    /// Software emulation.
    Emulation,
}

impl Backend {
    /// The word used in the configuration and in `bulkhead ps`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Emulation => "emulation",
        }
    }
}

/// The size of a pod's machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sandbox {
    /// Memory in MiB for a workload that states no limit. The host gives it only when it is touched.
    pub memory_mib: u64,
    /// Memory in MiB for the guest's own kernel and agent, on top of the workload's.
    pub memory_reserve_mib: u64,
    /// Processors for a workload that states no limit.
    pub vcpus: u32,
    /// The most processors that a pod may have; 0 stands for as many as the host has.
    pub max_vcpus: u32,
    /// The most memory in MiB that a running pod can be given; 0 stands for as much as the host has.
    pub max_memory_mib: u64,
}

/// The network of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// Network cards that a machine has for links that come after it was launched.
    pub spare_cards: u32,
}

/// The disks of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Storage {
    /// Block devices that a machine can be given after it was launched.
    pub spare_disks: u32,
}

/// How the shim speaks with the agent in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Agent {
    /// How long one request to the agent may take.
    pub request_timeout_seconds: u64,
    /// Whether `bulkhead exec` may run programs in the guest itself.
    pub debug_exec: bool,
}

/// What of the host's volumes containers can use beside their files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Volumes {
    /// Unix sockets of the host to which a container may connect that has them in a volume.
    pub host_sockets: Vec<Pattern>,
}

/// What a pod may change by annotation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Annotations {
    /// Keys such as `sandbox.memory_mib`, each settable as `io.bulkhead.sandbox.memory_mib`.
    pub allowed: Vec<String>,
}

// The defaults, all of them, in one place.

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/run/bulkhead".into(),
            log_level: "info".into(),
            trace_file: None,
            hypervisor: Hypervisor::default(),
            sandbox: Sandbox::default(),
            network: Network::default(),
            storage: Storage::default(),
            agent: Agent::default(),
            volumes: Volumes::default(),
            annotations: Annotations::default(),
        }
    }
}

impl Default for Hypervisor {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
            kernel: "/usr/share/bulkhead/vmlinux".into(),
            image: "/usr/share/bulkhead/guest.cpio".into(),
            kernel_params: String::new(),
            vmm: "bulkhead-vmm".into(),
            qemu: "qemu-system-x86_64".into(),
            virtiofsd: "virtiofsd".into(),
            vhost_device_vsock: "vhost-device-vsock".into(),
            boot_timeout_seconds: 60,
        }
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self { memory_mib: 1024, memory_reserve_mib: 128, vcpus: 1, max_vcpus: 0, max_memory_mib: 0 }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self { spare_cards: 1 }
    }
}

impl Default for Storage {
    fn default() -> Self {
        Self { spare_disks: 2 }
    }
}

impl Default for Agent {
    fn default() -> Self {
        Self { request_timeout_seconds: 60, debug_exec: false }
    }
}

/// Where the configuration was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file named by the caller.
    Explicit(PathBuf),
    /// A file named by the environment variable [`PATH_VARIABLE`].
    Environment(PathBuf),
    /// The file at [`DEFAULT_PATH`].
    Default(PathBuf),
    /// No file: the built-in defaults.
    BuiltIn,
}

impl Source {
    /// Finds what is to be read, without reading it.
    pub fn find(explicit: Option<&Path>) -> Self {
        if let Some(path) = explicit {
            return Self::Explicit(path.to_owned());
        }
        match std::env::var_os(PATH_VARIABLE) {
            Some(path) if !path.is_empty() => Self::Environment(path.into()),
            _ if Path::new(DEFAULT_PATH).exists() => Self::Default(DEFAULT_PATH.into()),
            _ => Self::BuiltIn,
        }
    }

    /// The file, where it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Explicit(path) | Self::Environment(path) | Self::Default(path) => Some(path),
            Self::BuiltIn => None,
        }
    }

    fn named_by(&self) -> String {
        match self {
            Self::Explicit(_) => "named by the caller".into(),
            Self::Environment(_) => format!("named by the environment variable {PATH_VARIABLE}"),
            Self::Default(_) | Self::BuiltIn => "the default".into(),
        }
    }
}

impl Config {
    /// Reads the file named by `explicit`, else by the environment variable [`PATH_VARIABLE`], else the file at
    /// [`DEFAULT_PATH`] if there is one, else takes the built-in defaults.
    ///
    /// # Errors
    /// A file that cannot be read, or holds what [`Config::parse`] refuses.
    pub fn load(explicit: Option<&Path>) -> Result<Self, ConfigError> {
        Self::load_from(&Source::find(explicit))
    }

    /// Reads the configuration from where it was found.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load_from(source: &Source) -> Result<Self, ConfigError> {
        match source {
            Source::Explicit(path) | Source::Environment(path) | Source::Default(path) => {
                let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read {
                    path: path.clone(),
                    named_by: source.named_by(),
                    source: error,
                })?;
                Self::parse(&text, &path.display().to_string())
            }
            Source::BuiltIn => Ok(Self::default()),
        }
    }

    /// Parses the text of a configuration file; `origin` is what messages call it.
    ///
    /// # Errors
    /// Text that is not TOML, an unknown key, a value of the wrong type or out of its range: each with its place.
    pub fn parse(text: &str, origin: &str) -> Result<Self, ConfigError> {
        Self::default().overlaid(text::parse(text, origin, text::Extra::Refuse)?, origin)
    }
}
