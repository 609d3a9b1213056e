//! The files in /etc that tell a pod its name: made here for a pod of the sandbox API, whose CRI leaves them to
//! the sandbox (contract, C4). In the classic way containerd makes them.
//! Knows their formats; where they are mounted is the plan's affair.

use std::{
    fs, io,
    os::unix::fs::chown,
    path::{Path, PathBuf},
};

use crate::{
    error::Fault,
    ids::ContainerId,
    plan::{ContainerPlan, Dns},
};

/// Each file with the place where containers see it.
const FILES: [(&str, &str); 3] =
    [("hostname", "/etc/hostname"), ("hosts", "/etc/hosts"), ("resolv.conf", "/etc/resolv.conf")];

/// The files of one pod.
pub struct PodFiles {
    dir: PathBuf,
}

impl PodFiles {
    /// Those of the sandbox whose directory is `sandbox`; the ledger has that directory.
    pub fn new(sandbox: &Path) -> Self {
        Self { dir: sandbox.join("etc") }
    }

    /// Makes them as containerd's CRI does: the host's own hosts, and its resolv.conf where the pod names no
    /// servers.
    /// They are files of the pod's root, whose ids in the machine are `root`.
    pub fn write(&self, hostname: &str, dns: &Dns, root: (u32, u32)) -> Result<(), Fault> {
        let host = |path: &str| match fs::read_to_string(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            text => text,
        };
        let write = || -> io::Result<()> {
            fs::create_dir_all(&self.dir)?;
            let resolv = if *dns == Dns::default() { host("/etc/resolv.conf")? } else { resolv_conf(dns) };
            for (name, text) in [
                ("hostname", format!("{hostname}\n")),
                ("hosts", host("/etc/hosts")?),
                ("resolv.conf", resolv),
            ] {
                let path = self.dir.join(name);
                fs::write(&path, text)?;
                chown(&path, Some(root.0), Some(root.1))?;
            }
            Ok(())
        };
        write().map_err(|e| Fault::internal(&format!("make the pod's files in {}", self.dir.display()), &e))
    }

    /// Shows them to a container that has nothing else in their places.
    pub fn add_to(&self, id: &ContainerId, plan: &mut ContainerPlan) {
        for (name, destination) in FILES {
            plan.add_file(id, self.dir.join(name), destination);
        }
    }
}

fn resolv_conf(dns: &Dns) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_says_what_the_pod_asks_for() {
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
        let dns = Dns {
            servers: words(&["10.0.0.1", "10.0.0.2"]),
            searches: words(&["a.example", "b.example"]),
            options: words(&["ndots:5"]),
        };
        assert_eq!(
            resolv_conf(&dns),
            "search a.example b.example\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
    }

    #[test]
    fn files_are_made_with_the_pods_name() {
        let tmp = tempfile::tempdir().unwrap();
        let own = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        PodFiles::new(tmp.path()).write("web", &Dns::default(), own).unwrap();
        let read = |name: &str| fs::read_to_string(tmp.path().join("etc").join(name)).unwrap();
        assert_eq!(read("hostname"), "web\n");
        assert_eq!(read("hosts"), fs::read_to_string("/etc/hosts").unwrap_or_default());
    }
}
