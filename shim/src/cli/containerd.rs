//! A containerd: the daemon behind a socket, and what the daemon's program says of its version and configuration.
//! Changes nothing and judges nothing.

use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::process;

/// The runtime that clients name, and the program that containerd makes of it.
pub(super) const RUNTIME: &str = "io.containerd.bulkhead.v2";
pub(super) const SHIM: &str = "containerd-shim-bulkhead-v2";
/// What containerd reads where nothing else is named.
pub(super) const DEFAULT_CONFIG: &str = "/etc/containerd/config.toml";

/// A daemon that listens.
#[derive(Debug)]
pub(super) struct Daemon {
    pub(super) pid: u32,
    pub(super) program: PathBuf,
    /// Its configuration file, which may not exist.
    pub(super) config: PathBuf,
    /// Its variable `PATH`.
    pub(super) path: OsString,
}

/// Clients of containerd take the address with a scheme as well.
pub(super) fn plain(address: &Path) -> PathBuf {
    address.to_str().and_then(|text| text.strip_prefix("unix://")).map_or(address.to_owned(), PathBuf::from)
}

/// The daemon behind the socket.
pub(super) fn listening(address: &Path) -> Result<Daemon, String> {
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

/// What a program of containerd says that it is, such as `v2.4.2`.
///
/// # Errors
/// A sentence on why there is no answer, without the program's name.
pub(super) fn version(program: &Path) -> Result<String, String> {
    // "containerd <module> <version> <commit>"
    let said = process::answer(program, &["--version"])?;
    Ok(said.split_whitespace().nth(2).unwrap_or("of unknown version").to_owned())
}

/// The first two numbers of a version such as `v2.4.2` or `1.7.24~ds1`.
pub(super) fn number(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The whole configuration that a containerd with this file has, defaults and imported files included.
///
/// # Errors
/// A sentence on why there is no answer, without the program's name.
pub(super) fn dump(program: &Path, config: &Path) -> Result<String, String> {
    let file = config.to_string_lossy();
    let mut arguments = vec!["--config", &file];
    // A file that is named and missing is an error; without any, containerd has defaults.
    if !config.exists() {
        arguments.clear();
    }
    arguments.extend(["config", "dump"]);
    process::answer(program, &arguments)
}

/// The names under which the CRI service of such a configuration knows a runtime of ours.
pub(super) fn handlers(config: &toml::Table) -> Vec<&str> {
    let ours = |runtime: &toml::Value| {
        let kind = runtime.get("runtime_type").and_then(toml::Value::as_str).unwrap_or_default();
        kind == RUNTIME || Path::new(kind).file_name().is_some_and(|name| name == SHIM)
    };
    let plugins = ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"];
    plugins
        .iter()
        .filter_map(|plugin| {
            config.get("plugins")?.get(plugin)?.get("containerd")?.get("runtimes")?.as_table()
        })
        .flatten()
        .filter(|(_, runtime)| ours(runtime))
        .map(|(name, _)| name.as_str())
        .collect()
}

pub(super) fn on_path(program: &str, search: &OsString) -> Option<PathBuf> {
    std::env::split_paths(search).map(|folder| folder.join(program)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

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
        assert!(number("1.6.20").unwrap() < (1, 7) && number("v1.10.0").unwrap() > (1, 7));
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
}
