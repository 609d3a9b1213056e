//! Runs the hooks of an OCI spec that belong on the host.
//! Knows the runtime specification's "POSIX-platform hooks"; does not know when each is due.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use oci_spec::runtime::Hook;
use tokio::{io::AsyncWriteExt, process::Command};

/// The version of the runtime specification whose state is told.
const OCI_VERSION: &str = "1.2.0";

/// What does not change in the state that the hooks of a container are told.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The container.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Of its specification: by them a client's hook finds what it has noted of the container.
    pub annotations: HashMap<String, String>,
}

impl Subject {
    /// The state in the form of the runtime specification ("State"), as JSON. A pid of 0 stands for none.
    pub fn state(&self, status: &str, pid: i32) -> String {
        let mut state = serde_json::json!({
            "ociVersion": OCI_VERSION,
            "id": self.id,
            "status": status,
            "bundle": self.bundle,
        });
        if pid != 0 {
            state["pid"] = pid.into();
        }
        if !self.annotations.is_empty() {
            state["annotations"] = serde_json::json!(self.annotations);
        }
        state.to_string()
    }
}

/// Runs `hooks` in order, each with `state` on its stdin. The first that fails ends the row; the error names it.
pub async fn run(hooks: &[Hook], state: &str) -> Result<(), String> {
    for hook in hooks {
        run_one(hook, state.as_bytes()).await.map_err(|why| failed(hook.path(), &why))?;
    }
    Ok(())
}

/// Runs all of `hooks` from outside of any runtime, also those after one that fails, as the specification wants
/// it of `poststop`; answers what went wrong.
pub fn run_all(hooks: &[Hook], state: &str) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| format!("start a runtime for hooks: {e}"))?;
    let mut wrong = Vec::new();
    for hook in hooks {
        if let Err(why) = runtime.block_on(run_one(hook, state.as_bytes())) {
            wrong.push(failed(hook.path(), &why));
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
}

fn failed(path: &Path, why: &str) -> String {
    format!("hook {}: {why}", path.display())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Hook {
        let mut hook = Hook::default();
        hook.set_path("/bin/sh".into());
        hook.set_args(Some(["sh", "-c", script].map(str::to_owned).to_vec()));
        hook
    }

    #[test]
    fn the_state_has_the_annotations_of_the_container() {
        let annotations = HashMap::from([("nerdctl/name".to_owned(), "web".to_owned())]);
        let subject = Subject { id: "c".into(), bundle: "/b".into(), annotations };
        let state: serde_json::Value = serde_json::from_str(&subject.state("created", 7)).unwrap();
        assert_eq!(state["annotations"]["nerdctl/name"], "web");
        assert_eq!((state["id"].as_str(), state["pid"].as_i64()), (Some("c"), Some(7)));
        let state: serde_json::Value = serde_json::from_str(&subject.state("stopped", 0)).unwrap();
        assert_eq!(state.get("pid"), None, "it has none any more");
    }

    #[test]
    fn hooks_of_an_end_all_run_and_the_one_that_fails_is_named() {
        let tmp = tempfile::tempdir().unwrap();
        let note = tmp.path().join("note");
        let hooks = [shell("echo so not >&2; exit 3"), shell(&format!("cat > {}", note.display()))];
        let wrong = run_all(&hooks, "{}").unwrap_err();
        assert!(wrong.contains("/bin/sh") && wrong.contains("so not"), "{wrong}");
        assert_eq!(std::fs::read_to_string(note).unwrap(), "{}");
    }
}
