//! Runs the hooks of an OCI spec that belong on the host.
//! Knows the runtime specification's "POSIX-platform hooks"; does not know when each is due.

use std::{path::Path, process::Stdio, time::Duration};

use oci_spec::runtime::Hook;
use tokio::{io::AsyncWriteExt, process::Command};

use crate::{
    error::{Fault, Kind},
    ids::ContainerId,
};

/// Runs `hooks` in order, each with the container's state as JSON on its stdin. The first that fails ends
/// the row.
pub(super) async fn run(
    hooks: &[Hook],
    id: &ContainerId,
    status: &str,
    pid: i32,
    bundle: &Path,
) -> Result<(), Fault> {
    let state = serde_json::json!({
        "ociVersion": "1.2.0",
        "id": id.as_str(),
        "status": status,
        "pid": pid,
        "bundle": bundle,
    });
    for hook in hooks {
        run_one(hook, state.to_string().as_bytes())
            .await
            .map_err(|why| Fault::new(Kind::Internal, format!("hook {}: {why}", hook.path().display())))?;
    }
    Ok(())
}

async fn run_one(hook: &Hook, state: &[u8]) -> Result<(), String> {
    let mut command = Command::new(hook.path());
    // The first argument is the program's own name (execv(3)).
    if let Some((name, args)) = hook.args().as_ref().and_then(|args| args.split_first()) {
        command.arg0(name).args(args);
    }
    command.env_clear();
    for pair in hook.env().iter().flatten() {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        command.env(key, value);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| e.to_string())?;
    let work = async move {
        if let Some(mut stdin) = child.stdin.take() {
            // A hook need not read its state.
            let _ = stdin.write_all(state).await;
        }
        child.wait_with_output().await.map_err(|e| e.to_string())
    };
    let output = match hook.timeout().filter(|&seconds| seconds > 0) {
        Some(seconds) => tokio::time::timeout(Duration::from_secs(seconds.unsigned_abs()), work)
            .await
            .map_err(|_| format!("did not end within {seconds} s"))??,
        None => work.await?,
    };
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim_end()))
}
