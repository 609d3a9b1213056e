//! All that shim and agent share: the ttrpc service, the vsock ports and the preface of a stream.
//! Knows nothing of containerd, of hypervisors, or of how either side does its work.

pub mod agent;
pub mod stream;

/// Version of the conversation. Shim and guest image refuse each other when it differs: both come from
/// one build, so a mismatch means that an old image lies beside a new shim.
pub const PROTOCOL_VERSION: u32 = 4;

/// Vsock port at which the host waits for the agent's control connection.
pub const CONTROL_PORT: u32 = 1024;

/// Vsock port at which the host waits for stdio streams.
pub const STREAM_PORT: u32 = 1025;

/// Context id of the host on every vsock (`VMADDR_CID_HOST`, linux/vm_sockets.h).
pub const HOST_CID: u32 = 2;

/// Where the agent mounts the share of the sandbox in the guest.
pub const SHARE_DIR: &str = "/run/bulkhead/share";

/// Tag of the virtio-fs device that carries the share.
pub const SHARE_TAG: &str = "share";

/// Where the agent keeps the pod's namespaces in the guest: `net`, `ipc`, `uts`, `pid` and `user`, by which
/// containers of a pod share them. A spec names them as `path`.
pub const NAMESPACE_DIR: &str = "/run/bulkhead/ns";

/// The pod's /dev/shm in the guest, which containers of a pod share.
pub const SHM_DIR: &str = "/run/bulkhead/shm";

/// The link by which a volume names the folder of its present files, and which is replaced when they change: Kubernetes
/// does so with ConfigMaps, Secrets, the downward API and projected volumes (pkg/volume/util/atomic_writer.go).
pub const VOLUME_LINK: &str = "..data";

/// The most connections that the containers of a pod have to sockets of the host at one time. Each takes four
/// descriptors of the agent, and as many of the shim.
pub const MOST_CONNECTIONS: usize = 128;

/// Prefix of an error message for a command that is not in the container, after which the reason follows
/// in the words that users know from runc.
pub const EXEC_ERROR_PREFIX: &str = "exec: ";
