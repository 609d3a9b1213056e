//! `start`: makes the socket, starts the process that serves it, answers containerd and ends.
//! Knows sockets and groups; the served process does the rest.

use std::{
    fs::{DirBuilder, File},
    io::{self, PipeReader, Read, Write},
    os::{
        fd::AsFd,
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use command_fds::{CommandFdExt, FdMapping};
use containerd_shim::Flags;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{bootstrap, check_flags, delete, serve};

/// Annotations that name the group of a container, the first that is there wins (contract, S7).
const GROUP_ANNOTATIONS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

pub(super) fn start(flags: &Flags) -> Result<(), String> {
    let started = SystemTime::now();
    #[cfg(feature = "failpoints")]
    crate::failpoint::read()?;
    check_flags(flags)?;
    let input = bootstrap::read_input()?;
    let params = bootstrap::parse(&input, flags, std::env::var("TTRPC_ADDRESS").ok())?;
    let group = group_of(Path::new("config.json"), &flags.id)?;
    let version = bootstrap::version(&params, Path::new("config.json").exists());
    let address = match &params.socket_dir {
        Some(dir) => format!("unix://{}/{}", dir.trim_end_matches('/'), socket_name(flags, &group)),
        None => containerd_shim::socket_address(&flags.address, &flags.namespace, &group),
    };
    let path = PathBuf::from(address.trim_start_matches("unix://"));
    if let Some(listener) = bind(&path)? {
        let launched = fail_point!(StartBound, launch(flags, &group, &params, &path, listener, started));
        // containerd calls no `delete` for a shim that did not start.
        let pid = launched.inspect_err(|_| delete::after_start(flags, &group, &path))?;
        raise_oom_score(pid);
        fail_point!(StartLaunched);
    }
    write_address(&address)?;
    let mut stdout = io::stdout();
    let answer = bootstrap::answer(&address, version);
    stdout.write_all(answer.as_bytes()).and_then(|()| stdout.flush()).map_err(|e| format!("answer: {e}"))
}

fn socket_name(flags: &Flags, group: &str) -> String {
    let default = containerd_shim::socket_address(&flags.address, &flags.namespace, group);
    default.rsplit('/').next().unwrap_or_default().to_owned()
}

/// The sandbox that the container in this bundle belongs to; itself if it says nothing. With the sandbox
/// API there is no config.json yet.
fn group_of(config: &Path, id: &str) -> Result<String, String> {
    #[derive(serde::Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: std::collections::HashMap<String, String>,
    }
    let text = match std::fs::read(config) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(id.to_owned()),
        Err(e) => return Err(format!("read config.json of the bundle: {e}")),
    };
    let spec: Annotated =
        serde_json::from_slice(&text).map_err(|e| format!("read config.json of the bundle: {e}"))?;
    let group = GROUP_ANNOTATIONS.iter().find_map(|name| spec.annotations.get(*name));
    Ok(group.filter(|g| !g.is_empty()).cloned().unwrap_or_else(|| id.to_owned()))
}

/// Binds the socket, or answers None if somebody serves it already. Two that start at once are told apart
/// by a lock on the directory.
fn bind(path: &Path) -> Result<Option<UnixListener>, String> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let fault = |what: &str, e: io::Error| format!("{what} {}: {e}", path.display());
    if !dir.exists() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| fault("create the directory of", e))?;
    }
    let lock = File::open(dir).map_err(|e| fault("open the directory of", e))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, e)| fault("lock the directory of", e.into()))?;
    match UnixListener::bind(path) {
        Ok(listener) => restrict(path, listener).map(Some),
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            // Left by a shim that was killed.
            std::fs::remove_file(path).map_err(|e| fault("remove the stale socket", e))?;
            let listener = UnixListener::bind(path).map_err(|e| fault("listen at", e))?;
            restrict(path, listener).map(Some)
        }
        Err(e) => Err(fault("listen at", e)),
    }
}

fn restrict(path: &Path, listener: UnixListener) -> Result<UnixListener, String> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .map_err(|e| format!("restrict {}: {e}", path.display()))?;
    Ok(listener)
}

/// How long the serving process may take until it serves. It makes a directory and reads a file before that.
const SERVES: Duration = Duration::from_secs(10);

/// Starts this program again to serve the socket, and waits until it does: of one that dies before containerd is
/// connected to it, containerd would learn nothing but that, and leave what it had made.
fn launch(
    flags: &Flags,
    group: &str,
    params: &bootstrap::Params,
    socket: &Path,
    listener: UnixListener,
    started: SystemTime,
) -> Result<u32, String> {
    let program = std::env::current_exe().map_err(|e| format!("find our own program: {e}"))?;
    let mut command = Command::new(program);
    command
        .args(["-namespace", &flags.namespace, "-id", group, "-address", &flags.address])
        .arg("-socket")
        .arg(socket)
        .env("TTRPC_ADDRESS", &params.ttrpc_address)
        .env(serve::STARTED_ENV, unix_nanos(started).to_string())
        .envs(params.options.as_ref().map(|any| (serve::OPTIONS_ENV, bootstrap::options_to_env(any))))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // A group of its own: a signal to containerd's group must not reach it.
        .process_group(0);
    if params.debug {
        command.arg("-debug");
    }
    let (ours, theirs) = io::pipe().map_err(|e| format!("a pipe to the serving process: {e}"))?;
    let mappings = vec![
        FdMapping { parent_fd: listener.into(), child_fd: serve::LISTENER_FD },
        FdMapping { parent_fd: theirs.into(), child_fd: serve::READY_FD },
    ];
    command.fd_mappings(mappings).map_err(|e| format!("hand over the socket: {e}"))?;
    let mut child = command.spawn().map_err(|e| format!("start the serving process: {e}"))?;
    // The command still holds the child's ends.
    drop(command);
    if let Err(reason) = wait_until_served(ours) {
        let _ = child.kill();
        let _ = child.wait();
        return Err(reason);
    }
    Ok(child.id())
}

fn wait_until_served(pipe: PipeReader) -> Result<(), String> {
    let until = Instant::now() + SERVES;
    let mut told = Vec::new();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(format!("wait for the serving process: {error}")),
            Ok(0) => {
                return Err(format!("the serving process does not serve after {} s", SERVES.as_secs()));
            }
            Ok(_) => {}
        }
        let mut part = [0; 4096];
        let read = (&pipe).read(&mut part).map_err(|e| format!("listen to the serving process: {e}"))?;
        told.extend_from_slice(&part[..read]);
        if told == serve::READY {
            return Ok(());
        }
        if read == 0 {
            let told = String::from_utf8_lossy(&told).into_owned();
            return Err(if told.is_empty() {
                "the serving process ended before it served".into()
            } else {
                told
            });
        }
    }
}

fn unix_nanos(at: SystemTime) -> u128 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos()
}

/// The serving process is to go before containerd (contract, S9). Some hosts refuse even root; that is no
/// reason not to run.
fn raise_oom_score(pid: u32) {
    if let Err(error) = containerd_shim::cgroup::adjust_oom_score(pid) {
        tracing::warn!(%error, "oom_score_adj");
    }
}

/// containerd's clean-up reads it (contract, S10).
fn write_address(address: &str) -> Result<(), String> {
    std::fs::write("address", address).map_err(|e| format!("write the file address in the bundle: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s7_the_group_is_the_sandbox_and_runcs_annotation_comes_first() {
        let tmp = tempfile::tempdir().unwrap();
        let config = tmp.path().join("config.json");
        assert_eq!(group_of(&config, "c").unwrap(), "c");
        let write = |annotations: &str| {
            std::fs::write(&config, format!(r#"{{"annotations":{annotations}}}"#)).unwrap()
        };
        write("{}");
        assert_eq!(group_of(&config, "c").unwrap(), "c");
        write(r#"{"io.kubernetes.cri.sandbox-id":"pod"}"#);
        assert_eq!(group_of(&config, "c").unwrap(), "pod");
        write(r#"{"io.kubernetes.cri.sandbox-id":"pod","io.containerd.runc.v2.group":"g"}"#);
        assert_eq!(group_of(&config, "c").unwrap(), "g");
        std::fs::write(&config, "{").unwrap();
        assert!(group_of(&config, "c").unwrap_err().contains("config.json"));
    }

    #[test]
    fn s6_a_socket_is_bound_once_and_a_stale_one_is_replaced() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("s/sock");
        let first = bind(&path).unwrap().expect("nobody serves it");
        assert!(bind(&path).unwrap().is_none(), "somebody serves it");
        drop(first);
        assert!(bind(&path).unwrap().is_some(), "it is stale");
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
    }
}
