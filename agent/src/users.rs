//! The ids of the pod's user namespace: which users and groups of a container are which of the guest.
//! Knows numbers; the namespace is made by `podns`.

use std::fmt::Write as _;

use bulkhead_proto::agent::{IdMapping, UserNamespace};
use oci_spec::runtime::{LinuxIdMapping, User};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Users and groups, each in the order in which they were told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Users {
    uids: Vec<Range>,
    gids: Vec<Range>,
}

/// Ids that follow each other in the container, and in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Range {
    container: u32,
    guest: u32,
    size: u32,
}

impl Range {
    fn guest(&self, id: u32) -> Option<u32> {
        let at = id.checked_sub(self.container).filter(|&at| at < self.size)?;
        self.guest.checked_add(at)
    }
}

fn guest(ranges: &[Range], id: u32) -> Option<u32> {
    ranges.iter().find_map(|range| range.guest(id))
}

impl Users {
    /// Reads what the host tells. A namespace without a root cannot be set up.
    pub(crate) fn read(told: &UserNamespace) -> Result<Self> {
        let ranges = |list: &[IdMapping]| -> Vec<Range> {
            let range = |m: &IdMapping| Range { container: m.container, guest: m.guest, size: m.size };
            list.iter().map(range).collect()
        };
        let users = Self { uids: ranges(&told.uids), gids: ranges(&told.gids) };
        for (name, ranges) in [("uids", &users.uids), ("gids", &users.gids)] {
            if guest(ranges, 0).is_none() {
                return Err(Error::Invalid(format!("users.{name}: id 0 of the container is not mapped")));
            }
        }
        Ok(users)
    }

    /// The guest's ids of the container's root.
    pub(crate) fn root(&self) -> (u32, u32) {
        (guest(&self.uids, 0).unwrap_or_default(), guest(&self.gids, 0).unwrap_or_default())
    }

    /// The guest's id of a user.
    pub(crate) fn uid(&self, uid: u32) -> Option<u32> {
        guest(&self.uids, uid)
    }

    /// The guest's id of a group.
    pub(crate) fn gid(&self, gid: u32) -> Option<u32> {
        guest(&self.gids, gid)
    }

    /// Whether a specification maps the same; one that joins the namespace need not repeat how it maps.
    pub(crate) fn agree(&self, uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> bool {
        let same = |ranges: &[Range], told: &[LinuxIdMapping]| {
            let equal = |(range, m): (&Range, &LinuxIdMapping)| {
                (range.container, range.guest, range.size) == (m.container_id(), m.host_id(), m.size())
            };
            told.is_empty() || (told.len() == ranges.len() && ranges.iter().zip(told).all(equal))
        };
        same(&self.uids, uids) && same(&self.gids, gids)
    }

    /// Refuses who does not exist in the namespace.
    pub(crate) fn check(&self, user: &User) -> Result<()> {
        let refuse = |field: &str, id: u32| {
            Err(Error::Invalid(format!("process.user.{field}: {id} is not mapped in the user namespace")))
        };
        if self.uid(user.uid()).is_none() {
            return refuse("uid", user.uid());
        }
        if self.gid(user.gid()).is_none() {
            return refuse("gid", user.gid());
        }
        match user.additional_gids().iter().flatten().find(|&&gid| self.gid(gid).is_none()) {
            Some(&gid) => refuse("additionalGids", gid),
            None => Ok(()),
        }
    }

    /// As /proc/<pid>/uid_map and gid_map take it (user_namespaces(7)).
    pub(crate) fn maps(&self) -> [(&'static str, String); 2] {
        let text = |ranges: &[Range]| {
            ranges.iter().fold(String::new(), |mut text, r| {
                let _ = writeln!(text, "{} {} {}", r.container, r.guest, r.size);
                text
            })
        };
        [("uid_map", text(&self.uids)), ("gid_map", text(&self.gids))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(container: u32, guest: u32, size: u32) -> IdMapping {
        IdMapping { container, guest, size, ..Default::default() }
    }

    fn users() -> Users {
        let uids = vec![mapping(0, 100_000, 1000), mapping(1000, 5000, 1)];
        let told = UserNamespace { uids, gids: vec![mapping(0, 200_000, 10)], ..Default::default() };
        Users::read(&told).unwrap()
    }

    #[test]
    fn ids_are_looked_up_in_every_range() {
        let users = users();
        assert_eq!(users.root(), (100_000, 200_000));
        assert_eq!((users.uid(999), users.uid(1000), users.uid(1001)), (Some(100_999), Some(5000), None));
        assert_eq!((users.gid(9), users.gid(10)), (Some(200_009), None));
        assert_eq!(users.maps()[0], ("uid_map", "0 100000 1000\n1000 5000 1\n".to_owned()));
    }

    #[test]
    fn a_namespace_without_root_is_refused() {
        let told = UserNamespace { uids: vec![mapping(0, 1, 1)], ..Default::default() };
        let error = Users::read(&told).unwrap_err().to_string();
        assert!(error.contains("users.gids: id 0"), "{error}");
    }

    #[test]
    fn who_is_not_mapped_is_named() {
        let user = |uid: u32, gid: u32, more: u32| -> User {
            serde_json::from_value(serde_json::json!({"uid": uid, "gid": gid, "additionalGids": [more]}))
                .unwrap()
        };
        users().check(&user(1000, 9, 0)).unwrap();
        let refusal = |user| users().check(&user).unwrap_err().to_string();
        assert!(refusal(user(1001, 0, 0)).contains("process.user.uid: 1001"));
        assert!(refusal(user(0, 10, 0)).contains("process.user.gid: 10"));
        assert!(refusal(user(0, 0, 11)).contains("process.user.additionalGids: 11"));
    }

    #[test]
    fn a_specification_that_maps_otherwise_does_not_agree() {
        let of = |json: serde_json::Value| -> Vec<LinuxIdMapping> { serde_json::from_value(json).unwrap() };
        let gids = of(serde_json::json!([{"containerID": 0, "hostID": 200_000, "size": 10}]));
        assert!(users().agree(&[], &gids) && users().agree(&[], &[]));
        let other = of(serde_json::json!([{"containerID": 0, "hostID": 200_000, "size": 11}]));
        assert!(!users().agree(&[], &other) && !users().agree(&other, &gids));
    }
}
