//! One request, done with libcontainer in a process of its own, which may change directory, fork and block.
//! Knows libcontainer and where its files lie; must not know who asks.

use std::{
    error::Error as StdError,
    fs::{self, File, Permissions},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process,
};

use libcgroups::common::{CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager};
use libcontainer::{
    container::{Container, builder::ContainerBuilder},
    syscall::syscall::SyscallType,
};
use nix::{errno::Errno, fcntl::OFlag, unistd::pipe2};
use oci_spec::runtime::{LinuxResources, Spec};

use super::{
    Create, LastMile, Reply, Request, debug, join,
    last_mile::{LastMileExecutor, why},
    mapped, wire,
};
use crate::{boot::RUN_DIR, cgroup, users::Users};

/// Longest report of a failure that is read, in bytes; a pipe holds as much.
const REPORT_MAX: u64 = 16 << 10;

/// Reads the request, does it, answers it.
pub(super) fn serve(mut agent: UnixStream, stdio: Vec<OwnedFd>) {
    let (reply, terminal) = match wire::read_frame(&mut agent) {
        Ok(request) => handle(request, stdio),
        Err(e) => (Reply::Refused { text: format!("read the request: {e}") }, None),
    };
    let fds: Vec<_> = terminal.iter().map(AsRawFd::as_raw_fd).collect();
    let sent = wire::send_fds(agent.as_fd(), &fds).and_then(|()| wire::write_frame(&mut agent, &reply));
    if let Err(e) = sent {
        tracing::error!("launcher: answer: {e}");
    }
}

fn handle(request: Request, stdio: Vec<OwnedFd>) -> (Reply, Option<OwnedFd>) {
    let launched = match request {
        Request::Create(create) => create_container(*create, stdio),
        Request::Exec(exec) => join::run(*exec, stdio),
        Request::Debug(debug) => debug::run(&debug, stdio),
        Request::Start { id } => return (done(start(&id)), None),
        Request::MakePod { users, sysctls } => return (done(make_pod(&users, &sysctls)), None),
        Request::SharePids => return (done(share_pids()), None),
        Request::Update { id, resources } => return (done(update(&id, &resources)), None),
        Request::Delete { id } => return (done(delete(&id)), None),
    };
    match launched {
        Ok((pid, terminal)) => (Reply::Launched { pid }, terminal),
        Err(text) => (Reply::Refused { text }, None),
    }
}

fn done(result: Result<(), String>) -> Reply {
    match result {
        Ok(()) => Reply::Done,
        Err(text) => Reply::Refused { text },
    }
}

/// libcontainer's state directories.
fn state_root() -> PathBuf {
    Path::new(RUN_DIR).join("containers")
}

/// Our directory of a container: its specification as libcontainer reads it.
fn bundle(id: &str) -> PathBuf {
    Path::new(RUN_DIR).join("bundles").join(id)
}

fn create_container(mut create: Create, stdio: Vec<OwnedFd>) -> Result<(i32, Option<OwnedFd>), String> {
    let id = create.id.clone();
    check_files(&create.spec)?;
    let bundle = bundle(&id);
    let cgroup = cgroup::path(&id);
    let result = (|| {
        fs::create_dir_all(state_root()).map_err(doing("create", &state_root()))?;
        fs::create_dir_all(&bundle).map_err(doing("create", &bundle))?;
        make_cwd_below_read_only_root(&create)?;
        if let Some(users) = create.users.clone() {
            mapped::prepare(&mut create, &users, &stdio)?;
        }
        let spec = bundle.join("config.json");
        create.spec.save(&spec).map_err(|e| format!("write {}: {}", spec.display(), chain(&e)))?;
        fs::create_dir(&cgroup).map_err(doing("create", &cgroup))?;
        super::devices::restrict(&cgroup, &create.devices)?;
        launch(&id, &bundle, create.last_mile, stdio)
    })();
    if result.is_err() {
        // What libcontainer has not taken back itself; none of it may be there.
        let _ = fs::remove_dir_all(state_root().join(&id));
        let _ = fs::remove_dir_all(&bundle);
        let _ = fs::remove_dir_all(mapped::devices(&id));
        let _ = fs::remove_dir(&cgroup);
    }
    result
}

/// Has libcontainer make the container, and turns each failure into one text.
fn launch(
    id: &str,
    bundle: &Path,
    last_mile: LastMile,
    stdio: Vec<OwnedFd>,
) -> Result<(i32, Option<OwnedFd>), String> {
    let io = |e: io::Error| format!("launcher: {}", why(&e));
    let (report_from, report_to) = report_pipe().map_err(io)?;
    let (log_from, log_to) = report_pipe().map_err(io)?;
    crate::log::capture_into(log_to.as_raw_fd());
    let console = match last_mile.terminal {
        Some(_) => Some(Console::listen().map_err(io)?),
        None => None,
    };
    let mut builder = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_executor(LastMileExecutor::new(last_mile, report_to.as_raw_fd()))
        .with_root_path(state_root())
        .and_then(ContainerBuilder::validate_id)
        .map_err(|e| chain(&e))?;
    if let Some(console) = &console {
        builder = builder.with_console_socket(Some(&console.path));
    } else {
        let mut streams = stdio.into_iter();
        builder.stdin = streams.next();
        builder.stdout = streams.next();
        builder.stderr = streams.next();
    }
    let built = builder.as_init(bundle).with_systemd(false).with_detach(true).build();
    crate::log::capture_into(-1);
    match built.map(|container| container.pid().map(|pid| pid.as_raw())) {
        Ok(Some(pid)) => {
            let terminal = console.map(Console::terminal).transpose().map_err(io)?;
            Ok((pid, terminal))
        }
        Ok(None) => Err("libcontainer made a container without a process".into()),
        Err(e) => Err(reason(read_report(report_from), &chain(&e), &read_report(log_from))),
    }
}

/// Our own words where we have some, else libcontainer's, with the first thing it complained of and what the
/// kernel said: it passes errors from one process to the next without their causes.
fn reason(ours: String, chain: &str, log: &str) -> String {
    if !ours.is_empty() {
        return ours;
    }
    let mut chain = chain;
    while let Some(rest) = PREFIXES.iter().find_map(|prefix| chain.strip_prefix(prefix)) {
        chain = rest.trim_start();
    }
    let first = log.lines().next().filter(|first| !chain.contains(first));
    let cause =
        kernel_said(log).filter(|cause| !chain.contains(cause) && !first.unwrap_or("").contains(cause));
    [Some(chain.to_owned()), first.map(str::to_owned), cause]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(": ")
}

/// What libcontainer puts before an error for the way it took, which helps nobody.
const PREFIXES: &[&str] = &[
    "failed to create container:",
    "exec process failed with error",
    "error in executing process :",
    "intermediate process error",
];

/// The first error number in a log of `{:?}`, in words.
fn kernel_said(log: &str) -> Option<String> {
    let name = log.split("Nix(").nth(1).and_then(|rest| rest.split(')').next());
    let code = log.split("Os { code: ").nth(1).and_then(|rest| rest.split(',').next()?.parse().ok());
    let by_name = || (1..134).find(|code| name == Some(format!("{:?}", Errno::from_raw(*code)).as_str()));
    code.or_else(by_name).map(|code| why(&io::Error::from_raw_os_error(code)))
}

/// A pipe that never makes its writer wait, and is closed on exec.
fn report_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?)
}

/// What is in the pipe by now. The writers have ended or failed, so nothing more is to come.
fn read_report(from: OwnedFd) -> String {
    let mut text = Vec::new();
    // Ends with WouldBlock where a forked process still has the other end.
    let _ = File::from(from).take(REPORT_MAX).read_to_end(&mut text);
    String::from_utf8_lossy(&text).trim_end().to_owned()
}

/// The socket by which libcontainer hands over the terminal that it opens inside of the container.
struct Console {
    path: PathBuf,
    socket: UnixListener,
}

impl Console {
    fn listen() -> io::Result<Self> {
        let path = Path::new(RUN_DIR).join(format!("console-{}", process::id()));
        Ok(Self { socket: UnixListener::bind(&path)?, path })
    }

    /// libcontainer has connected and sent before the process was ready, so this does not wait.
    fn terminal(self) -> io::Result<OwnedFd> {
        use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
        let (peer, _) = self.socket.accept()?;
        let mut name = [0; 64];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut iov = [io::IoSliceMut::new(&mut name)];
        let message = recvmsg::<UnixAddr>(
            peer.as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
        )?;
        message
            .cmsgs()?
            .find_map(|control| match control {
                ControlMessageOwned::ScmRights(fds) => fds.into_iter().next().map(wire::own),
                _ => None,
            })
            .ok_or_else(|| io::Error::other("no terminal was handed over"))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn start(id: &str) -> Result<(), String> {
    load(id)?.start().map_err(|e| chain(&e))
}

fn make_pod(users: &Users, sysctls: &[(String, String)]) -> Result<(), String> {
    crate::podns::create_with_users(users, sysctls)
        .map_err(|e| format!("make the namespaces of the pod: {}", why(&e)))
}

fn share_pids() -> Result<(), String> {
    crate::podns::create_pid().map_err(|e| format!("make the pod's namespace of processes: {}", why(&e)))
}

fn update(id: &str, resources: &LinuxResources) -> Result<(), String> {
    let manager = create_cgroup_manager(CgroupConfig {
        cgroup_path: cgroup::oci_path(id),
        systemd_cgroup: false,
        container_name: id.to_owned(),
    })
    .map_err(|e| chain(&e))?;
    let options =
        ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
    manager.apply(&options).map_err(|e| chain(&e))
}

fn delete(id: &str) -> Result<(), String> {
    // A container may have made cgroups below its own, which libcontainer does not expect.
    let cgroup = cgroup::path(id);
    cgroup::remove(&cgroup).map_err(doing("remove", &cgroup))?;
    let state = state_root().join(id);
    if state.exists() {
        load(id)?.delete(true).map_err(|e| chain(&e))?;
    }
    for dir in [bundle(id), state, mapped::devices(id)] {
        match fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(doing("remove", &dir)(e)),
            _ => {}
        }
    }
    Ok(())
}

fn load(id: &str) -> Result<Container, String> {
    Container::load(state_root().join(id)).map_err(|e| chain(&e))
}

/// Names what is missing, before libcontainer says ENOENT of something.
fn check_files(spec: &Spec) -> Result<(), String> {
    if let Some(root) = spec.root() {
        fs::metadata(root.path()).map_err(|e| format!("root {}: {}", root.path().display(), why(&e)))?;
    }
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    for mount in spec.mounts().iter().flatten() {
        if let Some(source) = mount.source()
            && is_bind(mount)
        {
            fs::metadata(source).map_err(|e| {
                format!(
                    "mount at {}: source {}: {}",
                    mount.destination().display(),
                    source.display(),
                    why(&e)
                )
            })?;
        } else if let Some(kind) = mount.typ()
            && !known.lines().any(|line| line.split('\t').nth(1) == Some(kind))
            && kind != "cgroup"
        {
            let at = mount.destination().display();
            return Err(format!("mount at {at}: the guest has no file system of type {kind:?}"));
        }
    }
    Ok(())
}

fn is_bind(mount: &oci_spec::runtime::Mount) -> bool {
    let bind = |option: &String| option == "bind" || option == "rbind";
    mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(bind)
}

/// A missing cwd is created in the container, but below a read-only root that is too late.
fn make_cwd_below_read_only_root(create: &Create) -> Result<(), String> {
    let (cwd, spec) = (&create.last_mile.cwd, &create.spec);
    let Some(root) = spec.root().as_ref().filter(|root| root.readonly() == Some(true)) else { return Ok(()) };
    let covers = |mount: &oci_spec::runtime::Mount| cwd.starts_with(mount.destination());
    if spec.mounts().iter().flatten().any(covers) {
        return Ok(());
    }
    let made = mapped::as_root_of(create.users.as_ref(), || {
        pathrs::Root::open(root.path())
            .and_then(|root| root.mkdir_all(cwd, &Permissions::from_mode(0o755)).map(|_| ()))
    });
    // A root that cannot be written at all: whether that matters, the container finds out.
    if let Err(e) = made {
        tracing::debug!("create {} below {}: {e}", cwd.display(), root.path().display());
    }
    Ok(())
}

/// Puts what was tried, and on what, before what the kernel said.
fn doing<'a>(verb: &'a str, path: &'a Path) -> impl Fn(io::Error) -> String + 'a {
    move |e| format!("{verb} {}: {}", path.display(), why(&e))
}

/// An error with all its causes, each said once.
pub(super) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Layer>>,
    }

    fn layers(texts: &[&'static str]) -> Layer {
        let (text, rest) = texts.split_first().unwrap();
        let source = (!rest.is_empty()).then(|| Box::new(layers(rest)));
        Layer { text, source }
    }

    #[test]
    fn a_chain_says_each_cause_once() {
        assert_eq!(
            chain(&layers(&["create: mount", "mount", "no such device"])),
            "create: mount: no such device"
        );
    }

    #[test]
    fn our_own_words_come_first_then_the_deepest_complaint() {
        assert_eq!(reason("exec: nope".into(), "chain", "log"), "exec: nope");
        assert_eq!(
            reason(String::new(), "prepare", "mount x\nerr=Mount(Nix(ENODEV))"),
            "prepare: mount x: no such device"
        );
        let prefixed =
            "failed to create container: exec process failed with error error in executing process : why";
        assert_eq!(reason(String::new(), prefixed, ""), "why");
        assert_eq!(reason(String::new(), "all ENOENT", "ENOENT"), "all ENOENT");
        assert_eq!(reason(String::new(), "chain", ""), "chain");
    }

    #[test]
    fn a_missing_mount_source_is_named() {
        let spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.2.0",
            "root": {"path": "/"},
            "mounts": [{"destination": "/data", "type": "bind", "source": "/not/there", "options": ["rbind"]}],
        }))
        .unwrap();
        assert_eq!(
            check_files(&spec).unwrap_err(),
            "mount at /data: source /not/there: no such file or directory"
        );
    }
}
