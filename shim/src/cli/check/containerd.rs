//! Facts about containerd: the running daemon, whether it finds the shim, whether its configuration knows it.
//! The daemon is asked for by its socket, so that a private one is looked at and not the system's.

use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::super::process;
use super::Fact;

const RUNTIME: &str = "io.containerd.bulkhead.v2";
const SHIM: &str = "containerd-shim-bulkhead-v2";
const DEFAULT_CONFIG: &str = "/etc/containerd/config.toml";

/// The oldest containerd whose contract the shim is tested against.
const OLDEST: (u32, u32) = (1, 7);

/// A daemon that listens.
struct Daemon {
    pid: u32,
    program: PathBuf,
    config: PathBuf,
    path: OsString,
}

pub(super) fn facts(address: &Path) -> Vec<Fact> {
    let address = &plain(address);
    match listening(address) {
        Ok(daemon) => vec![version(&daemon, address), shim(&daemon), runtime(&daemon)],
        Err(reason) => {
            let detail = format!("no daemon at {}: {reason}", address.display());
            let search = std::env::var_os("PATH").unwrap_or_default();
            let remedy = match on_path("containerd", &search) {
                Some(program) => format!("start {}, or name another socket by --address", program.display()),
                None => "install containerd 1.7 or later, or name its socket by --address".to_owned(),
            };
            vec![
                Fact::failure("containerd", detail, remedy),
                shim_on(&search, None, "the PATH of this command"),
            ]
        }
    }
}

/// Clients of containerd take the address with a scheme as well.
fn plain(address: &Path) -> PathBuf {
    address.to_str().and_then(|text| text.strip_prefix("unix://")).map_or(address.to_owned(), PathBuf::from)
}

/// The daemon behind the socket.
fn listening(address: &Path) -> Result<Daemon, String> {
    let stream = UnixStream::connect(address).map_err(|error| error.to_string())?;
    // Who listens, not who accepts (unix(7), SO_PEERCRED).
    let peer = getsockopt(&stream, PeerCredentials).map_err(|error| error.desc().to_owned())?;
    let pid = u32::try_from(peer.pid()).ok().filter(|pid| *pid > 0);
    let pid = pid.ok_or("it runs in a process namespace that is hidden from this one")?;
    let program =
        process::link(pid, "exe").ok_or_else(|| format!("its process {pid} cannot be looked at"))?;
    let cwd = process::link(pid, "cwd").unwrap_or_else(|| "/".into());
    let config = config_argument(&process::arguments(pid)).unwrap_or(DEFAULT_CONFIG.into());
    let path = process::variable(pid, "PATH").unwrap_or_default().into();
    Ok(Daemon { pid, program, config: cwd.join(config), path })
}

/// The configuration file in the arguments of a containerd.
fn config_argument(arguments: &[String]) -> Option<PathBuf> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let (name, value) = match argument.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (argument.as_str(), None),
        };
        if ["--config", "-config", "-c"].contains(&name) {
            return value.or_else(|| arguments.next().cloned()).map(PathBuf::from);
        }
    }
    None
}

fn version(daemon: &Daemon, address: &Path) -> Fact {
    let Daemon { pid, program, .. } = daemon;
    match process::answer(program, &["--version"]) {
        Err(reason) => Fact::warning(
            "containerd",
            format!("{} (pid {pid}) {reason}", program.display()),
            "restart containerd if its program was replaced",
        ),
        Ok(said) => {
            // "containerd <module> <version> <commit>"
            let version = said.split_whitespace().nth(2).unwrap_or("of unknown version");
            let detail = format!("{version} at {} (pid {pid})", address.display());
            if number(version).is_some_and(|number| number < OLDEST) {
                return Fact::warning("containerd", detail, "use 1.7 or later; older ones are untested");
            }
            Fact::ok("containerd", detail)
        }
    }
}

/// The first two numbers of a version such as `v2.4.2` or `1.7.24~ds1`.
fn number(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn shim(daemon: &Daemon) -> Fact {
    shim_on(&daemon.path, daemon.program.parent(), "the PATH of containerd")
}

/// containerd looks on its PATH, then beside its own program.
fn shim_on(search: &OsString, beside: Option<&Path>, whose: &str) -> Fact {
    let beside = beside.map(|folder| folder.join(SHIM)).filter(|path| path.is_file());
    match on_path(SHIM, search).or(beside) {
        Some(path) => Fact::ok("shim", path.display().to_string()),
        None => Fact::failure(
            "shim",
            format!("{SHIM} is not on {whose}"),
            "install it there (/usr/local/bin), and restart containerd if its PATH changes",
        ),
    }
}

fn on_path(program: &str, search: &OsString) -> Option<PathBuf> {
    std::env::split_paths(search).map(|folder| folder.join(program)).find(|path| path.is_file())
}

fn runtime(daemon: &Daemon) -> Fact {
    const NAME: &str = "runtime";
    let config = daemon.config.display().to_string();
    let mut arguments = vec!["--config", &config];
    // A file that is named and missing is an error; without any, containerd has defaults.
    if !daemon.config.exists() {
        arguments.clear();
    }
    arguments.extend(["config", "dump"]);
    match process::answer(&daemon.program, &arguments) {
        Err(reason) => Fact::warning(
            NAME,
            format!("{} {reason}", daemon.program.display()),
            "correct containerd's configuration",
        ),
        Ok(dump) => registered(&dump, &config),
    }
}

/// Whether the CRI service knows a runtime of ours, from the whole configuration of containerd.
fn registered(dump: &str, file: &str) -> Fact {
    const NAME: &str = "runtime";
    let table: toml::Table = match toml::from_str(dump) {
        Ok(table) => table,
        Err(error) => {
            let detail = format!("`containerd config dump` is not TOML: {}", error.message());
            return Fact::warning(NAME, detail, "report it, with the version of containerd");
        }
    };
    let ours = |runtime: &toml::Value| {
        let kind = runtime.get("runtime_type").and_then(toml::Value::as_str).unwrap_or_default();
        kind == RUNTIME || Path::new(kind).file_name().is_some_and(|name| name == SHIM)
    };
    let plugins = ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"];
    let handlers: Vec<&str> = plugins
        .iter()
        .filter_map(|plugin| {
            table.get("plugins")?.get(plugin)?.get("containerd")?.get("runtimes")?.as_table()
        })
        .flatten()
        .filter(|(_, runtime)| ours(runtime))
        .map(|(name, _)| name.as_str())
        .collect();
    if handlers.is_empty() {
        return Fact::warning(
            NAME,
            format!("{file} registers no runtime of type {RUNTIME} with CRI; ctr and nerdctl need none"),
            "for Kubernetes, add the drop-in from configs/containerd/ and restart containerd",
        );
    }
    Fact::ok(NAME, format!("{file} registers {RUNTIME} with CRI as `{}`", handlers.join("`, `")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::super::Status;
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn the_configuration_of_a_daemon_is_in_its_arguments() {
        for text in ["containerd --config /a", "containerd -c /a --log-level debug", "containerd --config=/a"]
        {
            assert_eq!(config_argument(&words(text)), Some("/a".into()), "{text}");
        }
        assert_eq!(config_argument(&words("containerd --log-level debug")), None);
    }

    #[test]
    fn versions_compare_by_number() {
        assert_eq!(number("v2.4.2"), Some((2, 4)));
        assert_eq!(number("1.7.24~ds1"), Some((1, 7)));
        assert!(number("1.6.20").unwrap() < OLDEST && number("v1.10.0").unwrap() > OLDEST);
    }

    #[test]
    fn our_drop_ins_count_as_registered() {
        let drop_ins = [
            include_str!("../../../../configs/containerd/bulkhead-1.7.toml"),
            include_str!("../../../../configs/containerd/bulkhead-2.toml"),
        ];
        for drop_in in drop_ins {
            let fact = registered(drop_in, "/f");
            assert_eq!(
                (fact.status, fact.detail.contains("CRI as `bulkhead`")),
                (Status::Ok, true),
                "{}",
                fact.detail
            );
        }
        assert_eq!(registered("version = 3", "/f").status, Status::Warning);
        assert!(registered("a = ", "/f").detail.contains("is not TOML"));
    }

    #[test]
    fn a_shim_may_lie_beside_containerd() {
        let folder = tempfile::tempdir().unwrap();
        let missing = shim_on(&"/nonexistent".into(), Some(folder.path()), "the PATH of containerd");
        assert_eq!(missing.status, Status::Failure);
        std::fs::write(folder.path().join(SHIM), "").unwrap();
        assert_eq!(shim_on(&"/nonexistent".into(), Some(folder.path()), "x").status, Status::Ok);
        assert_eq!(shim_on(&folder.path().into(), None, "x").status, Status::Ok);
    }

    #[test]
    fn an_address_may_have_its_scheme() {
        assert_eq!(plain(Path::new("unix:///run/c.sock")), Path::new("/run/c.sock"));
        assert_eq!(plain(Path::new("/run/c.sock")), Path::new("/run/c.sock"));
    }

    #[test]
    fn the_listener_behind_a_socket_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let address = folder.path().join("s");
        assert!(listening(&address).is_err());
        let _listener = UnixListener::bind(&address).unwrap();
        let daemon = listening(&address).unwrap_or_else(|reason| panic!("{reason}"));
        assert_eq!(daemon.pid, std::process::id());
        assert_eq!(daemon.program, std::env::current_exe().unwrap());
    }

    #[test]
    fn no_daemon_is_a_failure_that_says_where_it_was_sought() {
        let facts = facts(Path::new("/nonexistent/c.sock"));
        assert_eq!((facts[0].name, facts[0].status), ("containerd", Status::Failure));
        assert!(
            facts[0].detail.starts_with("no daemon at /nonexistent/c.sock: No such file"),
            "{}",
            facts[0].detail
        );
    }
}
