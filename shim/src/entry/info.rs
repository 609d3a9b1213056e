//! `-info`: what this runtime is and can do.
//! Knows the OCI features document; asks nothing of the host.

use std::io::Write;

use containerd_shim_protos::{
    protobuf::{Message, MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};

use super::{RUNTIME_NAME, bootstrap};

/// Type under which containerd looks for the features (contract, I2).
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

pub(super) fn info() -> Result<(), String> {
    // containerd writes the runtime's options and may be surprised by a closed pipe.
    bootstrap::read_input()?;
    let features = serde_json::to_vec(&features()).map_err(|e| format!("encode the features: {e}"))?;
    let info = RuntimeInfo {
        name: RUNTIME_NAME.into(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES_TYPE.into(),
            value: features,
            ..Default::default()
        }),
        ..Default::default()
    };
    let bytes = info.write_to_bytes().map_err(|e| format!("encode the answer: {e}"))?;
    let mut stdout = std::io::stdout();
    stdout.write_all(&bytes).and_then(|()| stdout.flush()).map_err(|e| format!("answer: {e}"))
}

/// What a container may ask for (OCI runtime specification, features.md). Only what is tested is named:
/// containerd validates pods against it.
fn features() -> serde_json::Value {
    serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": ["prestart", "createRuntime", "startContainer", "poststart", "poststop"],
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "noatime", "nodev",
            "nodiratime", "noexec", "nosuid", "private", "rbind", "relatime", "ro", "rprivate", "rro", "rslave", "rw",
            "slave", "strictatime", "suid", "sync", "idmap", "ridmap"
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false},
            "seccomp": {"enabled": true},
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}}
        }
    })
}
