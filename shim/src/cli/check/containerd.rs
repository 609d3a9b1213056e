//! Facts about containerd: the running daemon, whether it finds the shim, whether its configuration knows it.
//! The daemon is asked for by its socket, so that a private one is looked at and not the system's.

use std::ffi::OsString;
use std::path::Path;

use super::super::containerd::{self, Daemon, RUNTIME, SHIM, listening, number, on_path, plain};
use super::Fact;

/// The oldest containerd whose contract the shim is tested against.
const OLDEST: (u32, u32) = (1, 7);

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

fn version(daemon: &Daemon, address: &Path) -> Fact {
    let Daemon { pid, program, .. } = daemon;
    match containerd::version(program) {
        Err(reason) => Fact::warning(
            "containerd",
            format!("{} (pid {pid}) {reason}", program.display()),
            "restart containerd if its program was replaced",
        ),
        Ok(version) => {
            let detail = format!("{version} at {} (pid {pid})", address.display());
            if number(&version).is_some_and(|number| number < OLDEST) {
                return Fact::warning("containerd", detail, "use 1.7 or later; older ones are untested");
            }
            Fact::ok("containerd", detail)
        }
    }
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

fn runtime(daemon: &Daemon) -> Fact {
    match containerd::dump(&daemon.program, &daemon.config) {
        Err(reason) => Fact::warning(
            "runtime",
            format!("{} {reason}", daemon.program.display()),
            "correct containerd's configuration",
        ),
        Ok(dump) => registered(&dump, &daemon.config.display().to_string()),
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
    let handlers = containerd::handlers(&table);
    if handlers.is_empty() {
        return Fact::warning(
            NAME,
            format!("{file} registers no runtime of type {RUNTIME} with CRI; ctr and nerdctl need none"),
            "for Kubernetes: `bulkhead install`, or the drop-in from configs/containerd/ and a restart of containerd",
        );
    }
    Fact::ok(NAME, format!("{file} registers {RUNTIME} with CRI as `{}`", handlers.join("`, `")))
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

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
