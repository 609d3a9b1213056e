//! The process that serves one sandbox: from the socket that `start` made until Shutdown.
//! Puts the rooms together; decides nothing.

use std::{
    io::{PipeWriter, Write},
    os::{fd::OwnedFd, unix::net::UnixListener as StdListener},
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use containerd_shim::Flags;
use containerd_shim_protos::{
    sandbox_async::create_sandbox, shim_async::create_task, ttrpc::r#async::Server,
};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tracing::{error, info, warn};

use super::{abandoned, bootstrap, connections::Connections};
use crate::{
    config::Config,
    error::{Fault, chain},
    events::Publisher,
    kept::{Kept, SHIM_LOG},
    metrics::counters::Counters,
    sandbox::{
        driver::{Driver, Handle},
        host::{Host, Identity},
        model::Request,
    },
    sandbox_api::SandboxService,
    task::TaskService,
    tasks, trace,
};

/// Where `start` puts the listening socket.
pub(super) const LISTENER_FD: i32 = 3;
/// Where `start` waits to be told that the socket is served, or why it is not.
pub(super) const READY_FD: i32 = 4;
/// What says that it is served.
pub(super) const READY: &[u8] = b"ready";
/// When `start` began, in nanoseconds since the epoch: for timelines.
pub(super) const STARTED_ENV: &str = "BULKHEAD_STARTED_UNIX_NANOS";

/// The runtime options that came with `start`, as [`bootstrap::options_to_env`] writes them.
pub(super) const OPTIONS_ENV: &str = "BULKHEAD_RUNTIME_OPTIONS";

/// Task service names; their messages are the same (contract, T1).
const SERVICE_V3: &str = "containerd.task.v3.Task";
const SERVICE_V2: &str = "containerd.task.v2.Task";
/// How long the last events may take to reach containerd.
const LAST_EVENTS: Duration = Duration::from_secs(5);
/// How long containerd may take to hang up at the end, and open calls to be answered.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

pub(super) fn serve(flags: &Flags) -> Result<(), String> {
    let mut start = take_pipe().map_err(|e| format!("take over the pipe to start: {e}"))?;
    let result = serve_told(flags, &mut start);
    if let (Err(reason), Some(mut start)) = (&result, start) {
        // Nobody else would read it: `start` answers containerd with it.
        let _ = start.write_all(reason.as_bytes());
    }
    result
}

/// Tells `start` when the socket is served, and lets it go then.
fn serve_told(flags: &Flags, start: &mut Option<PipeWriter>) -> Result<(), String> {
    #[cfg(feature = "failpoints")]
    crate::failpoint::read()?;
    // Bad configuration is told by Create, where somebody reads it; until then the defaults must do.
    let loaded = Config::load(None);
    let config = loaded.as_ref().map_or_else(|_| Config::default(), Clone::clone);
    let level = if flags.debug { "debug" } else { config.log_level.as_str() };
    let began = began();
    let traced =
        config.trace_file.as_deref().map(|path| trace::begin(path, &flags.namespace, &flags.id, began));
    let kept = crate::log::init(Path::new("log"), level, matches!(traced, Some(Ok(()))));
    if let (Some(Err(error)), Some(path)) = (traced, &config.trace_file) {
        warn!(%error, "no trace is written to {}", path.display());
    }
    become_subreaper();
    // One thread: children die with the thread that made them (PR_SET_PDEATHSIG), and this is the one that
    // lives as long as the process.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| format!("start the runtime: {e}"))?;
    let result = runtime.block_on(run(flags, loaded.map_err(|e| chain(&e)), config, &kept, start));
    if let Err(reason) = &result {
        error!("{reason}");
    }
    let _ = std::fs::remove_file(&flags.socket);
    trace::end();
    // Blocking jobs that hang must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// When containerd called `start`, which has told it; else now.
fn began() -> SystemTime {
    let told = std::env::var(STARTED_ENV).ok().and_then(|nanos| nanos.parse().ok());
    told.map_or_else(SystemTime::now, |nanos| SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos))
}

async fn run(
    flags: &Flags,
    loaded: Result<Config, String>,
    config: Config,
    kept: &Kept,
    start: &mut Option<PipeWriter>,
) -> Result<(), String> {
    let listener = take_listener().map_err(|e| format!("take over the socket: {e}"))?;
    let address = std::env::var("TTRPC_ADDRESS").map_err(|_| "TTRPC_ADDRESS is not set".to_owned())?;
    let counters = Arc::new(Counters::default());
    let (publisher, drained) = Publisher::new(&address, &flags.namespace, counters.clone());
    let bundle = std::env::current_dir().map_err(|e| format!("find the bundle: {e}"))?;
    tasks::spawn(abandoned::take_back_when_abandoned(flags, &bundle));
    let identity =
        Identity { namespace: flags.namespace.clone(), id: flags.id.clone(), bundle: bundle.clone() };
    let (own, inputs) = mpsc::unbounded_channel();
    trace::append("start", began(), SystemTime::now());
    let host =
        Host::new(identity, config, loaded.err(), own.clone(), counters).map_err(|e: Fault| e.to_string())?;
    let log = host.dir().join(SHIM_LOG);
    if let Err(error) = kept.begin(&log) {
        warn!(%error, "this log is not kept in {}", log.display());
    }
    let options = bootstrap::options_from_env(std::env::var(OPTIONS_ENV).ok())?;
    let host = Arc::new(host.with_options(options));
    host.tell_figures();
    let (driver, handle) = Driver::new(host, publisher, inputs, own);

    let mut services = create_task(Arc::new(TaskService::new(handle.clone())));
    let v2 = create_task(Arc::new(TaskService::new(handle.clone()))).remove(SERVICE_V3);
    services.extend(v2.map(|service| (SERVICE_V2.to_owned(), service)));
    services.extend(create_sandbox(Arc::new(SandboxService::new(handle.clone()))));
    let connections = Connections::default();
    let mut server = Server::new().register_service(services).add_listener(connections.of(listener));
    server.start().await.map_err(|e| format!("serve: {e}"))?;
    info!(id = flags.id, namespace = flags.namespace, "serving");
    fail_point!(SandboxServing);
    if let Some(mut start) = start.take()
        && start.write_all(READY).is_err()
    {
        // Its bundle may have gone before it was watched.
        abandoned::take_back_untold(flags, &bundle);
    }

    tasks::spawn(end_on_signal(handle));
    let all_taken_back = driver.run().await;
    kill_point!(TeardownDone);
    // At once: what is left to do is to tell containerd, and whoever ends this process meanwhile would leave
    // the socket.
    let _ = std::fs::remove_file(&flags.socket);

    let _ = tokio::time::timeout(LAST_EVENTS, drained).await;
    // containerd hangs up when it has read the answer to its Shutdown. If we did, it would now and then see the end
    // of the connection before the answer, which is there as well, and tell its user of a failure. Where something is
    // left it does not hang up: it calls `delete` when we do.
    if all_taken_back {
        let _ = tokio::time::timeout(LAST_ANSWERS, connections.gone()).await;
    }
    let _ = tokio::time::timeout(LAST_ANSWERS, server.shutdown()).await;
    info!("sandbox ended");
    Ok(())
}

fn take_pipe() -> std::io::Result<Option<PipeWriter>> {
    take_over(READY_FD).map(|fd| Some(PipeWriter::from(fd)))
}

/// Descriptors 3 and 4 are ours by agreement with `start`.
#[allow(unsafe_code)]
fn take_over(number: i32) -> std::io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: `start` mapped its end to this number and this process has opened nothing under it: it is
    // taken once, before anything else could close it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    // Children must not inherit what serves containerd, nor what `start` waits at.
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    Ok(fd)
}

fn take_listener() -> std::io::Result<UnixListener> {
    let listener = StdListener::from(take_over(LISTENER_FD)?);
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Children of children that are left behind come to us, not to init (contract, S9).
fn become_subreaper() {
    if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
        warn!(%error, "subreaper");
    }
}

/// SIGTERM asks politely: the sandbox ends if no container is left, as with Shutdown.
async fn end_on_signal(handle: Handle) {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    loop {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        if let Err(fault) = handle.ask(Request::Shutdown).await {
            warn!("shut down on a signal: {fault}");
        }
    }
}
