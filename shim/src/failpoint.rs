//! Places where a step can be made to fail, or the shim be killed: for tests of what the user sees then and of what
//! is left on the host. Without the feature `failpoints`, which no shipped program has, this is nothing.
//! Knows names and where each is passed; does not know what is done there.

/// Passes a place. `fail_point!(Name)` makes the function around it fail, by `?`; `fail_point!(Name, step)` is the
/// result of the step, or a failure instead of it.
macro_rules! fail_point {
    ($name:ident) => {
        #[cfg(feature = "failpoints")]
        $crate::failpoint::pass($crate::failpoint::Point::$name)?
    };
    ($name:ident, $step:expr) => {{
        #[cfg(feature = "failpoints")]
        {
            match $crate::failpoint::pass($crate::failpoint::Point::$name) {
                Ok(()) => $step,
                Err(failed) => Err(failed.into()),
            }
        }
        #[cfg(not(feature = "failpoints"))]
        {
            $step
        }
    }};
}

/// Passes a place that cannot fail, but at which the shim can be killed.
macro_rules! kill_point {
    ($name:ident) => {
        #[cfg(feature = "failpoints")]
        {
            let _ = $crate::failpoint::pass($crate::failpoint::Point::$name);
        }
    };
}

#[cfg(feature = "failpoints")]
pub(crate) use armed::*;

#[cfg(feature = "failpoints")]
mod armed {
    use std::{io, path::PathBuf, sync::OnceLock};

    use nix::{
        sys::signal::{Signal, kill},
        unistd::getpid,
    };
    use tracing::warn;

    use crate::error::{Fault, Kind};

    /// A file with one line: the name of a place, a space and `error` or `kill`. Beside it, with `.reached` at the
    /// end of its name, is told that the place was passed.
    const FILE_ENV: &str = "BULKHEAD_FAILPOINT";

    /// The ways of making a pod, as the tests name them, and which of them pass a place.
    const EVERY: &[&str] = &["ctr", "bulkhead", "bulkhead-podsandbox"];
    /// By the sandbox API.
    const API: &[&str] = &["bulkhead"];
    /// By a container, whose deletion is the end.
    const TASK: &[&str] = &["ctr", "bulkhead-podsandbox"];
    /// Where the namespace has links.
    const CRI: &[&str] = &["bulkhead", "bulkhead-podsandbox"];

    const BOTH: &[&str] = &["error", "kill"];
    const KILL: &[&str] = &["kill"];
    const ERROR: &[&str] = &["error"];

    macro_rules! points {
        ($($(#[$doc:meta])* $point:ident $name:literal $actions:ident $ways:ident,)*) => {
            /// A place.
            #[derive(Clone, Copy, Debug, PartialEq, Eq)]
            pub(crate) enum Point { $($(#[$doc])* $point,)* }

            const POINTS: &[(&str, &[&str], &[&str])] = &[$(($name, $actions, $ways),)*];
        };
    }

    // In the order in which a pod passes them.
    points! {
        /// `start` listens at the socket, and nobody serves it. Killed there it leaves the socket's file, which the
        /// next `start` of this name replaces: containerd calls nobody who could remove it.
        StartBound "start.bound" ERROR EVERY,
        /// The serving process runs, and `start` has not answered.
        StartLaunched "start.launched" BOTH EVERY,
        /// The sandbox has a directory and no ledger.
        SandboxDirectory "sandbox.directory" BOTH EVERY,
        /// It has a ledger.
        SandboxLedger "sandbox.ledger" BOTH EVERY,
        /// Its services are there and nobody answers for them.
        SandboxServing "sandbox.serving" BOTH EVERY,
        /// `state.json` is to be written.
        SandboxState "sandbox.state" BOTH EVERY,
        /// A pod's files are made.
        PodFiles "pod.files" BOTH API,
        /// The ledger has a control group that is not there.
        CgroupRecorded "acquire.cgroup.recorded" KILL EVERY,
        /// The control group is to be made.
        CgroupMake "acquire.cgroup.make" BOTH EVERY,
        /// It is there.
        CgroupMade "acquire.cgroup.made" KILL EVERY,
        /// The shared directory is there.
        AcquireShare "acquire.share" BOTH EVERY,
        /// One of two sockets for the guest is there.
        AcquireListen "acquire.listen" BOTH EVERY,
        /// The network namespace is held.
        AcquireNetwork "acquire.network" BOTH EVERY,
        /// A process of the machine runs that the ledger does not have.
        LaunchSpawned "launch.spawned" BOTH EVERY,
        /// The ledger has it.
        LaunchRecorded "launch.recorded" BOTH EVERY,
        /// All processes of the machine run and nobody watches them.
        LaunchDone "launch.done" BOTH EVERY,
        /// The guest boots.
        HelloAwaited "hello.awaited" BOTH EVERY,
        /// Its agent has reported.
        HelloSaid "hello.said" BOTH EVERY,
        /// The ledger has the redirection of a link that is not redirected.
        JoinRecorded "join.recorded" BOTH CRI,
        /// It is.
        JoinMade "join.made" BOTH CRI,
        /// The guest is to be told what it is.
        Configure "configure" BOTH EVERY,
        /// It was, and the pod is not ready.
        Configured "configured" BOTH EVERY,
        /// The ledger has a mount that is not there.
        RootRecorded "prepare.root.recorded" BOTH EVERY,
        /// The root is mounted and not shared.
        RootMounted "prepare.root.mounted" BOTH EVERY,
        /// The root is shared.
        RootShared "prepare.root.shared" BOTH EVERY,
        /// There is a place for a bind that the ledger does not have.
        BindPlaced "prepare.bind.placed" BOTH EVERY,
        /// The ledger has a bind that is not there.
        BindRecorded "prepare.bind.recorded" BOTH EVERY,
        /// It is.
        BindMounted "prepare.bind.mounted" BOTH EVERY,
        /// Hooks of the host are to be run.
        CreateHooks "create.hooks" BOTH EVERY,
        /// Some streams of a process are open.
        StreamsHalf "streams.half" BOTH EVERY,
        /// All streams of an init are open.
        CreateStreams "create.streams" BOTH EVERY,
        /// The container is in the guest, and nobody was told.
        CreateGuest "create.guest" BOTH EVERY,
        /// The network is to be looked at again.
        StartNetwork "start.network" BOTH EVERY,
        /// The command is to run.
        StartGuest "start.guest" BOTH EVERY,
        /// It runs, and nobody was told.
        StartDone "start.done" BOTH EVERY,
        /// All streams of an exec are open.
        ExecStreams "exec.streams" BOTH EVERY,
        /// The exec runs, and nobody was told.
        ExecDone "exec.done" BOTH EVERY,
        /// The machine is to become as large as new limits ask for.
        ResizeGrow "resize.grow" BOTH CRI,
        /// It is; the limits are the old ones.
        ResizeLimits "resize.limits" BOTH CRI,
        /// The limits are new; the machine is to give back what it has too much.
        ResizeShrink "resize.shrink" BOTH CRI,
        /// It has, and nobody was told.
        ResizeDone "resize.done" KILL CRI,
        /// A signal is to be sent.
        Signal "signal" BOTH EVERY,
        /// It was sent, and nobody was told.
        Signalled "signal.sent" BOTH EVERY,
        /// An exit is known and not told.
        ExitKnown "exit.known" KILL EVERY,
        /// The guest is to take a container apart.
        ReleaseGuest "release.guest" BOTH EVERY,
        /// What the host has of a container is to be taken back.
        ReleaseHost "release.host" BOTH EVERY,
        /// It was, and the ledger still has it.
        ReleaseForget "release.forget" BOTH EVERY,
        /// All of it is gone, and nobody was told.
        ReleaseDone "release.done" KILL EVERY,
        /// The guest of a pod is to end.
        HaltGuest "halt.guest" BOTH API,
        /// It has, and its machine has not.
        HaltMachine "halt.machine" KILL API,
        /// The guest of a sandbox is to end.
        TeardownGuest "teardown.guest" KILL TASK,
        /// The machine has ended; the rest is to be taken back.
        TeardownHost "teardown.host" BOTH EVERY,
        /// The processes are gone, and not all else.
        TeardownHalf "teardown.half" BOTH EVERY,
        /// Nothing is left but the socket.
        TeardownDone "teardown.done" KILL EVERY,
    }

    /// What happens at a place.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Action {
        Error,
        Kill,
    }

    struct Armed {
        point: &'static str,
        action: Action,
        reached: PathBuf,
    }

    static ARMED: OnceLock<Armed> = OnceLock::new();

    /// A step that was made to fail.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
    #[error("failpoint {0}")]
    pub struct Failed(&'static str);

    impl From<Failed> for Fault {
        fn from(failed: Failed) -> Self {
            Self::of(Kind::Internal, &failed)
        }
    }

    impl From<Failed> for io::Error {
        fn from(failed: Failed) -> Self {
            Self::other(failed)
        }
    }

    impl From<Failed> for String {
        fn from(failed: Failed) -> Self {
            failed.to_string()
        }
    }

    /// Reads which place is meant in this process, if any; to be called once, before any is passed.
    pub(crate) fn read() -> Result<(), String> {
        let Some(file) = std::env::var_os(FILE_ENV).map(PathBuf::from) else { return Ok(()) };
        let text = match std::fs::read_to_string(&file) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(format!("{FILE_ENV}: {}: {e}", file.display())),
        };
        let broken = || format!("{FILE_ENV}: {}: {text:?} is no place and action", file.display());
        let (name, action) = text.trim().split_once(' ').ok_or_else(broken)?;
        let (point, actions, _) = POINTS.iter().find(|(known, ..)| *known == name).ok_or_else(broken)?;
        let action = match actions.iter().find(|known| **known == action) {
            Some(&"kill") => Action::Kill,
            Some(_) => Action::Error,
            None => return Err(broken()),
        };
        let mut reached = file.into_os_string();
        reached.push(".reached");
        let _ = ARMED.set(Armed { point, action, reached: reached.into() });
        Ok(())
    }

    /// What happens at `point`: nothing, or a failure, or the end.
    pub(crate) fn pass(point: Point) -> Result<(), Failed> {
        let name = POINTS[point as usize].0;
        let Some(armed) = ARMED.get().filter(|armed| armed.point == name) else { return Ok(()) };
        if let Err(error) = std::fs::write(&armed.reached, name) {
            warn!(%error, "cannot tell that {name} was reached");
        }
        warn!("failpoint {name}: {:?}", armed.action);
        match armed.action {
            Action::Error => Err(Failed(name)),
            Action::Kill => {
                let _ = kill(getpid(), Signal::SIGKILL);
                // The signal is there before kill(2) returns, and this thread need not be who takes it.
                loop {
                    std::thread::park();
                }
            }
        }
    }

    /// Every place: its name, what can happen there, and the ways of making a pod that pass it.
    pub(crate) fn list() -> String {
        let line = |(name, actions, ways): &(&str, &[&str], &[&str])| {
            format!("{name} {} {}\n", actions.join(","), ways.join(","))
        };
        POINTS.iter().map(line).collect()
    }
}
