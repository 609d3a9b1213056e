//! Which ids of a container are which of the machine and of the host's files: user namespaces, and mounts whose owners
//! are mapped.
//! Knows the OCI specification's lists and the words of containerd's snapshotters; the kernel sees neither here.

use std::fmt::Write as _;

use bulkhead_proto::agent;
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Mount, Spec};

use super::refused;
use crate::error::{Fault, Kind};

/// As many ranges as the kernel takes (user_namespaces(7)).
const RANGES_MAX: usize = 340;

/// Users and groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMaps {
    /// Ranges of users.
    pub uids: Vec<IdRange>,
    /// Ranges of groups.
    pub gids: Vec<IdRange>,
}

/// Ids that follow each other on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first in the container; of a mount, in its file system.
    pub container: u32,
    /// The first in the machine; of a mount, as it is seen.
    pub host: u32,
    /// How many.
    pub size: u32,
}

impl IdMaps {
    /// The ranges of two lists of a specification; `field` names them in refusals.
    fn read(field: &str, uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Result<Self, Fault> {
        let ranges = |list: &[LinuxIdMapping]| {
            let range = |m: &LinuxIdMapping| IdRange {
                container: m.container_id(),
                host: m.host_id(),
                size: m.size(),
            };
            list.iter().map(range).collect()
        };
        let maps = Self { uids: ranges(uids), gids: ranges(gids) };
        maps.check(field)?;
        Ok(maps)
    }

    /// Refuses what the kernel would, with the reason.
    pub(super) fn check(&self, field: &str) -> Result<(), Fault> {
        for (list, ranges) in [("uidMappings", &self.uids), ("gidMappings", &self.gids)] {
            let invalid =
                |why: String| Err(Fault::new(Kind::InvalidArgument, format!("{field}{list}: {why}")));
            if ranges.is_empty() {
                return invalid("no id is mapped".into());
            }
            if ranges.len() > RANGES_MAX {
                return invalid(format!("{} ranges, the kernel takes {RANGES_MAX}", ranges.len()));
            }
            for (at, range) in ranges.iter().enumerate() {
                let IdRange { container, host, size } = *range;
                let text = format!("{container}:{host}:{size}");
                // The last number is no id: it stands for none (-1).
                let fits = |first: u32| first.checked_add(size).is_some();
                if size == 0 || !fits(container) || !fits(host) {
                    return invalid(format!("{text} is no range of ids"));
                }
                let meets = |a: u32, b: u32, other: u32| a < b + other && b < a + size;
                let earlier = ranges[..at].iter();
                for &IdRange { container: c, host: h, size: s } in earlier {
                    if meets(container, c, s) || meets(host, h, s) {
                        return invalid(format!("{text} overlaps {c}:{h}:{s}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Like [`IdMaps::check`], of a user namespace: whoever sets a container up is its root.
    pub(super) fn check_namespace(&self, field: &str) -> Result<(), Fault> {
        self.check(field)?;
        for (list, ranges) in [("uidMappings", &self.uids), ("gidMappings", &self.gids)] {
            if host(ranges, 0).is_none() {
                return Err(refused(
                    format!("{field}{list} without id 0"),
                    "a container is set up by its root",
                ));
            }
        }
        Ok(())
    }

    /// The machine's ids of a container's root.
    pub fn root(&self) -> (u32, u32) {
        (host(&self.uids, 0).unwrap_or_default(), host(&self.gids, 0).unwrap_or_default())
    }

    /// The owners that a file of these owners is seen to have: those of nobody (overflowuid) where they are not mapped.
    pub fn seen(&self, uid: u32, gid: u32) -> (u32, u32) {
        const NOBODY: u32 = 65534;
        (host(&self.uids, uid).unwrap_or(NOBODY), host(&self.gids, gid).unwrap_or(NOBODY))
    }

    /// Reads the words `uidmap=` and `gidmap=` that containerd's snapshotters put among the options of a mount whose
    /// owners are to be mapped, and answers the other options.
    pub fn take(options: &[String]) -> Result<(Option<Self>, Vec<String>), Fault> {
        let mut lists: [Option<Vec<IdRange>>; 2] = [None, None];
        let mut rest = Vec::new();
        for option in options {
            let word = [("uidmap=", 0), ("gidmap=", 1)]
                .iter()
                .find_map(|(word, list)| Some((option.strip_prefix(word)?, *list)));
            match word {
                None => rest.push(option.clone()),
                Some((text, list)) => {
                    let ranges: Option<Vec<_>> = text.split(',').map(range).collect();
                    let invalid = || {
                        Fault::new(Kind::InvalidArgument, format!("mount option {option}: no ranges of ids"))
                    };
                    lists[list] = Some(ranges.ok_or_else(invalid)?);
                }
            }
        }
        match lists {
            [None, None] => Ok((None, rest)),
            [uids, gids] => {
                let maps = Self { uids: uids.unwrap_or_default(), gids: gids.unwrap_or_default() };
                maps.check("the root's ")?;
                Ok((Some(maps), rest))
            }
        }
    }

    /// As the guest is told.
    pub fn message(&self) -> agent::UserNamespace {
        let list = |ranges: &[IdRange]| {
            let mapping = |r: &IdRange| agent::IdMapping {
                container: r.container,
                guest: r.host,
                size: r.size,
                ..Default::default()
            };
            ranges.iter().map(mapping).collect()
        };
        agent::UserNamespace { uids: list(&self.uids), gids: list(&self.gids), ..Default::default() }
    }

    /// As /proc/<pid>/uid_map and gid_map take it (user_namespaces(7)).
    pub fn files(&self) -> [(&'static str, String); 2] {
        let text = |ranges: &[IdRange]| {
            ranges.iter().fold(String::new(), |mut text, r| {
                let _ = writeln!(text, "{} {} {}", r.container, r.host, r.size);
                text
            })
        };
        [("uid_map", text(&self.uids)), ("gid_map", text(&self.gids))]
    }
}

fn host(ranges: &[IdRange], id: u32) -> Option<u32> {
    ranges.iter().find_map(|r| r.host.checked_add(id.checked_sub(r.container).filter(|&at| at < r.size)?))
}

/// `container:host:size`.
fn range(text: &str) -> Option<IdRange> {
    let mut numbers = text.split(':').map(|number| number.parse().ok());
    let range = IdRange { container: numbers.next()??, host: numbers.next()??, size: numbers.next()?? };
    numbers.next().is_none().then_some(range)
}

/// How the user namespace of a spec maps, if it has one.
pub(super) fn of_spec(spec: &Spec) -> Result<Option<IdMaps>, Fault> {
    let Some(linux) = spec.linux() else { return Ok(None) };
    let list = |list: &Option<Vec<LinuxIdMapping>>| list.clone().unwrap_or_default();
    let (uids, gids) = (list(linux.uid_mappings()), list(linux.gid_mappings()));
    if !linux.namespaces().iter().flatten().any(|n| n.typ() == LinuxNamespaceType::User) {
        return match uids.is_empty() && gids.is_empty() {
            true => Ok(None),
            false => Err(Fault::new(
                Kind::InvalidArgument,
                "linux.uidMappings and gidMappings: the specification has no user namespace",
            )),
        };
    }
    let maps = IdMaps::read("linux.", &uids, &gids)?;
    maps.check_namespace("linux.")?;
    Ok(Some(maps))
}

/// How the owners of a bind mount's files are mapped, if they are, and whether of what is mounted below as well. What
/// says so is taken out of `mount`. `users` is the container's user namespace.
pub(super) fn of_mount(mount: &mut Mount, users: Option<&IdMaps>) -> Result<Option<(IdMaps, bool)>, Fault> {
    let mut options = mount.options().clone().unwrap_or_default();
    let (named, below) = (options.iter().any(|o| o == "idmap"), options.iter().any(|o| o == "ridmap"));
    let list = |list: &Option<Vec<LinuxIdMapping>>| list.clone().unwrap_or_default();
    let (uids, gids) = (list(mount.uid_mappings()), list(mount.gid_mappings()));
    let own = !uids.is_empty() || !gids.is_empty();
    if !(named || below || own) {
        return Ok(None);
    }
    let at = mount.destination().display().to_string();
    options.retain(|o| o != "idmap" && o != "ridmap");
    mount.set_options(Some(options)).set_uid_mappings(None).set_gid_mappings(None);
    let maps = match (own, users) {
        (true, _) => IdMaps::read(&format!("the mount at {at}: "), &uids, &gids)?,
        (false, Some(users)) => users.clone(),
        (false, None) => {
            let what = format!("option idmap of the mount at {at}");
            return Err(refused(what, "it has no mappings, and the container no user namespace"));
        }
    };
    Ok(Some((maps, below)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn ids(container: u32, host: u32, size: u32) -> IdRange {
        IdRange { container, host, size }
    }

    fn spec(namespaces: Value, uids: Value, gids: Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.2.0",
            "linux": {"namespaces": namespaces, "uidMappings": uids, "gidMappings": gids},
        }))
        .unwrap()
    }

    fn map(container: u32, host: u32, size: u32) -> Value {
        json!({"containerID": container, "hostID": host, "size": size})
    }

    #[test]
    fn a_user_namespace_is_what_its_lists_say() {
        let user = json!([{"type": "user"}]);
        let maps = of_spec(&spec(user, json!([map(0, 100_000, 65536)]), json!([map(0, 200_000, 10)])));
        let maps = maps.unwrap().unwrap();
        assert_eq!(maps.root(), (100_000, 200_000));
        assert_eq!(maps.files()[1], ("gid_map", "0 200000 10\n".to_owned()));
        assert_eq!(of_spec(&spec(json!([]), json!([]), json!([]))).unwrap(), None);
    }

    #[test]
    fn what_the_kernel_would_refuse_is_refused_by_name() {
        let good = json!([map(0, 1000, 10)]);
        let refusal = |namespaces: Value, uids: Value| {
            of_spec(&spec(namespaces, uids, good.clone())).unwrap_err().message
        };
        let user = || json!([{"type": "user"}]);
        for (uids, expected) in [
            (json!([]), "linux.uidMappings: no id is mapped"),
            (json!([map(1, 1000, 10)]), "linux.uidMappings without id 0"),
            (json!([map(0, 1000, 0)]), "linux.uidMappings: 0:1000:0 is no range"),
            (json!([map(0, u32::MAX, 1)]), "is no range"),
            (json!([map(0, 1000, 10), map(9, 2000, 1)]), "9:2000:1 overlaps 0:1000:10"),
            (json!([map(0, 1000, 10), map(10, 1009, 1)]), "10:1009:1 overlaps 0:1000:10"),
        ] {
            let said = refusal(user(), uids);
            assert!(said.contains(expected), "{said}");
        }
        let said = refusal(json!([]), good.clone());
        assert!(said.contains("has no user namespace"), "{said}");
    }

    #[test]
    fn the_words_of_a_snapshotter_are_taken_out() {
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let options = words(&["index=off", "uidmap=0:100000:65536", "gidmap=0:5:1,1:9:2", "lowerdir=/a"]);
        let (maps, rest) = IdMaps::take(&options).unwrap();
        let maps = maps.unwrap();
        assert_eq!(rest, words(&["index=off", "lowerdir=/a"]));
        assert_eq!((maps.uids, maps.gids), (vec![ids(0, 100_000, 65536)], vec![ids(0, 5, 1), ids(1, 9, 2)]));
        for wrong in ["uidmap=0:1", "uidmap=0:1:2:3", "gidmap=x", "uidmap=0:1:1"] {
            assert!(IdMaps::take(&words(&[wrong])).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_mount_is_mapped_as_it_says_or_as_its_container() {
        let mount = |extra: Value| -> Mount {
            let mut mount =
                json!({"destination": "/v", "type": "bind", "source": "/s", "options": ["rbind"]});
            mount.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            serde_json::from_value(mount).unwrap()
        };
        let users = IdMaps { uids: vec![ids(0, 7, 1)], gids: vec![ids(0, 8, 1)] };
        assert_eq!(of_mount(&mut mount(json!({})), Some(&users)).unwrap(), None);
        let mut own = mount(json!({"uidMappings": [map(0, 9, 2)], "gidMappings": [map(0, 9, 2)]}));
        let (maps, below) = of_mount(&mut own, Some(&users)).unwrap().unwrap();
        assert_eq!((maps.uids, below), (vec![ids(0, 9, 2)], false));
        assert_eq!((own.uid_mappings(), own.gid_mappings()), (&None, &None));
        let mut named = mount(json!({"options": ["rbind", "ridmap"]}));
        assert_eq!(of_mount(&mut named, Some(&users)).unwrap(), Some((users, true)));
        assert_eq!(named.options().as_deref(), Some(["rbind".to_owned()].as_slice()));
        let said = of_mount(&mut mount(json!({"options": ["idmap"]})), None).unwrap_err().message;
        assert!(said.contains("idmap of the mount at /v"), "{said}");
    }
}
