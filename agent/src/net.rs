//! The pod's network in the guest: cards get the names, addresses and routes of the host's links.
//! Knows rtnetlink; must not know how a card is joined to a link.
//!
//! A card is found by the hardware address that it had at boot, in the namespace in which the kernel finds
//! devices, and moves to the pod's. What is set there is remembered as it was told: the next network is set by
//! taking away what it has not, and adding what is new.

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use bulkhead_netlink::{self as netlink, Attributes, Request, Socket, hop_places, numbers, u32_of};
use bulkhead_proto::agent::{Card, Network};
use nix::errno::Errno;

use crate::{
    error::{Doing, Error, Result},
    netns,
};

/// How long a card may take to be found after the machine has it.
const FOUND: Duration = Duration::from_secs(10);
/// `lo` has this number in every namespace, on the host as here.
const LOOPBACK: u32 = 1;

/// One list of a [`Network`].
struct List {
    /// What its members are called in errors.
    what: &'static str,
    /// RTM_NEW… of its members; RTM_DEL… is the next number.
    kind: u16,
    /// Length of the structure before the attributes.
    header: usize,
    /// Attributes of a member that name links by their numbers, and where its structure does.
    links: &'static [u16],
    link_at: Option<usize>,
    /// The attribute that tells one member from another, for errors.
    name: u16,
    of: fn(&Network) -> &Vec<Vec<u8>>,
}

/// In the order in which they are set: an address before the routes that prefer it.
const LISTS: [List; 4] = [
    List {
        what: "address",
        kind: libc::RTM_NEWADDR,
        header: 8,
        links: &[],
        link_at: Some(4),
        name: libc::IFA_ADDRESS,
        of: |network| &network.addresses,
    },
    List {
        what: "neighbour",
        kind: libc::RTM_NEWNEIGH,
        header: 12,
        links: &[],
        link_at: Some(4),
        name: libc::NDA_DST,
        of: |network| &network.neighbours,
    },
    List {
        what: "route to",
        kind: libc::RTM_NEWROUTE,
        header: 12,
        links: &[libc::RTA_IIF, libc::RTA_OIF],
        link_at: None,
        name: libc::RTA_DST,
        of: |network| &network.routes,
    },
    List {
        what: "rule for",
        kind: libc::RTM_NEWRULE,
        header: 12,
        links: &[],
        link_at: None,
        name: 2,
        of: |network| &network.rules,
    },
];

/// What the pod's network is at present.
#[derive(Default)]
pub(crate) struct Applied {
    /// Numbers of links: the host's, and ours.
    links: BTreeMap<u32, u32>,
    network: Network,
}

impl Applied {
    /// Makes the network `wanted`. After an error it is something between the old one and the new one.
    pub(crate) fn set(&mut self, wanted: &Network) -> Result<()> {
        if *wanted == self.network {
            return Ok(());
        }
        let pod = File::open(netns::network()).doing(|| "open the pod's network namespace".into())?;
        let mut socket = pod
            .try_clone()
            .and_then(netns::socket_in)
            .doing(|| "speak with the pod's network namespace".into())?;
        for list in LISTS.iter().rev() {
            for body in (list.of)(&self.network).iter().filter(|body| !(list.of)(wanted).contains(body)) {
                // With its link or its address it may have gone by itself.
                let _ = self
                    .renumbered(list, body)
                    .map(|body| socket.ask(&Request::new(list.kind + 1, 0, &body)));
            }
        }
        for card in self.network.cards.iter().filter(|old| !wanted.cards.iter().any(|c| c.link == old.link)) {
            if let Some(index) = self.links.remove(&card.link) {
                flags(&mut socket, index, 0, libc::IFF_UP).doing(|| format!("set {} down", card.name))?;
            }
        }
        for card in &wanted.cards {
            if self.network.cards.contains(card) {
                continue;
            }
            let index = match self.links.get(&card.link) {
                Some(&index) => index,
                None => adopt(&mut socket, &pod, card)?,
            };
            self.links.insert(card.link, index);
            dress(&mut socket, index, card)?;
        }
        for list in &LISTS {
            for body in (list.of)(wanted).iter().filter(|body| !(list.of)(&self.network).contains(body)) {
                self.add(&mut socket, list, body)?;
            }
        }
        self.network = wanted.clone();
        Ok(())
    }

    fn add(&self, socket: &mut Socket, list: &List, body: &[u8]) -> Result<()> {
        let refused =
            |why: String| Err(Error::Invalid(format!("the guest refuses {}: {why}", describe(list, body))));
        let Some(ours) = self.renumbered(list, body) else {
            return refused("it names a link that was not told".into());
        };
        let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        match socket.ask(&Request::new(list.kind, flags, &ours)) {
            // The kernel has set it by itself.
            Err(error) if error.is(&[Errno::EEXIST]) => Ok(()),
            Err(error) => refused(error.to_string()),
            Ok(()) => Ok(()),
        }
    }

    /// A member with our numbers of its links.
    fn renumbered(&self, list: &List, body: &[u8]) -> Option<Vec<u8>> {
        let mut ours = body.to_vec();
        let mut places: Vec<usize> = list.link_at.into_iter().collect();
        for attribute in Attributes(body.get(list.header..)?) {
            // Where in the body its value lies: both are of one allocation.
            let at = attribute.value.as_ptr() as usize - body.as_ptr() as usize;
            if list.links.contains(&attribute.kind) {
                places.push(at);
            } else if list.kind == libc::RTM_NEWROUTE && attribute.kind == libc::RTA_MULTIPATH {
                places.extend(hop_places(attribute.value).into_iter().map(|hop| at + hop + 4));
            }
        }
        for at in places {
            let theirs = u32_of(ours.get(at..)?)?;
            let own = if theirs == LOOPBACK { LOOPBACK } else { *self.links.get(&theirs)? };
            ours.get_mut(at..at + 4)?.copy_from_slice(&own.to_ne_bytes());
        }
        Some(ours)
    }
}

/// A member as a person would name it.
fn describe(list: &List, body: &[u8]) -> String {
    let value = Attributes(body.get(list.header..).unwrap_or_default()).get(list.name);
    let ip = value.and_then(|bytes| match bytes.len() {
        4 => Some(std::net::IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => Some(std::net::IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => None,
    });
    let length = body.get(1).copied().unwrap_or(0);
    match ip {
        Some(ip) if list.kind == libc::RTM_NEWNEIGH => format!("{} {ip}", list.what),
        Some(ip) => format!("{} {ip}/{length}", list.what),
        None => format!("{} everything", list.what),
    }
}

/// Finds a card and takes it into the pod's namespace under its name. Answers its number there.
fn adopt(pod: &mut Socket, netns: &File, card: &Card) -> Result<u32> {
    let mut here = Socket::watch_links().doing(|| "watch for network cards".into())?;
    let until = Instant::now() + FOUND;
    let index = loop {
        if let Some(index) = with_mac(&mut here, &card.found_by).doing(|| "list network cards".into())? {
            break index;
        }
        here.told(until).doing(|| format!("find the network card for {}", card.name))?;
    };
    let request = Request::new(libc::RTM_NEWLINK, 0, &ifinfo(index, 0, 0))
        .text(libc::IFLA_IFNAME, &card.name)
        .u32(libc::IFLA_NET_NS_FD, netns.as_raw_fd() as u32);
    here.ask(&request).map_err(|error| refused(card, "its name", &error))?;
    with_mac(pod, &card.found_by)
        .doing(|| "list the pod's network cards".into())?
        .ok_or_else(|| Error::NotFound(format!("network card {}: lost on its way to the pod", card.name)))
}

fn with_mac(socket: &mut Socket, mac: &[u8]) -> std::result::Result<Option<u32>, netlink::Error> {
    let links = socket.dump(&Request::new(libc::RTM_GETLINK, 0, &ifinfo(0, 0, 0)))?;
    let found = links.iter().find(|m| m.attributes(16).get(libc::IFLA_ADDRESS) == Some(mac));
    Ok(found.and_then(|m| u32_of(m.body.get(4..)?)))
}

/// Gives a card what its link has, and sets it up.
fn dress(socket: &mut Socket, index: u32, card: &Card) -> Result<()> {
    let steps = [
        ("its name", link(index).text(libc::IFLA_IFNAME, &card.name)),
        ("its hardware address", link(index).attr(libc::IFLA_ADDRESS, &card.mac)),
        ("its MTU", link(index).u32(libc::IFLA_MTU, card.mtu)),
        // Its addresses are told; of the host's making, its own would be there twice.
        (
            "its kind of IPv6 addresses",
            link(index).nested(libc::IFLA_AF_SPEC, |spec| {
                spec.nested(libc::AF_INET6 as u16, |inet6| {
                    inet6.attr(numbers::IFLA_INET6_ADDR_GEN_MODE, &[numbers::ADDR_GEN_MODE_NONE])
                })
            }),
        ),
    ];
    for (what, request) in &steps {
        match socket.ask(request) {
            // An MTU below 1280 leaves no IPv6 on a link (RFC 8200, 5).
            Err(error) if *what == steps[3].0 && error.is(&[Errno::EINVAL, Errno::EAFNOSUPPORT]) => {}
            other => other.map_err(|error| refused(card, what, &error))?,
        }
    }
    let mut on = 0;
    for (flag, wanted) in [(libc::IFF_UP, card.up), (libc::IFF_NOARP, card.no_arp)] {
        on |= if wanted { flag } else { 0 };
    }
    flags(socket, index, on, libc::IFF_UP | libc::IFF_NOARP)
        .map_err(|error| refused(card, "to be set up", &error))
}

fn refused(card: &Card, what: &str, error: &netlink::Error) -> Error {
    Error::Invalid(format!("the guest refuses network card {} {what}: {error}", card.name))
}

fn link(index: u32) -> Request {
    Request::new(libc::RTM_NEWLINK, 0, &ifinfo(index, 0, 0))
}

fn flags(socket: &mut Socket, index: u32, on: i32, change: i32) -> std::result::Result<(), netlink::Error> {
    socket.ask(&Request::new(libc::RTM_NEWLINK, 0, &ifinfo(index, on as u32, change as u32)))
}

/// `struct ifinfomsg`.
fn ifinfo(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut header = [0; 16];
    for (at, value) in [(4, index), (8, flags), (12, change)] {
        header[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes
    }

    fn applied() -> Applied {
        Applied { links: [(7, 2), (9, 3)].into(), network: Network::new() }
    }

    #[test]
    fn links_are_renumbered_wherever_they_are_named() {
        let (address, route) = (&LISTS[0], &LISTS[2]);
        let body = [vec![2, 24, 0, 0, 7, 0, 0, 0], attribute(1, &[10, 0, 0, 2])].concat();
        assert_eq!(applied().renumbered(address, &body).unwrap()[4..8], [2, 0, 0, 0]);
        let hop = |link: u8| vec![8, 0, 0, 0, link, 0, 0, 0];
        let hops = attribute(libc::RTA_MULTIPATH, &[hop(7), hop(9)].concat());
        let body = [vec![0; 12], attribute(libc::RTA_OIF, &[9, 0, 0, 0]), hops].concat();
        let expected = attribute(libc::RTA_MULTIPATH, &[hop(2), hop(3)].concat());
        let ours = applied().renumbered(route, &body).unwrap();
        assert_eq!(ours[12..], [attribute(libc::RTA_OIF, &[3, 0, 0, 0]), expected].concat());
    }

    #[test]
    fn a_link_that_was_not_told_is_no_ones() {
        let body = [vec![2, 24, 0, 0, 8, 0, 0, 0], attribute(1, &[10, 0, 0, 2])].concat();
        assert_eq!(applied().renumbered(&LISTS[0], &body), None);
        assert_eq!(applied().renumbered(&LISTS[0], &[1, 2, 3]), None);
        let lo = [vec![2, 32, 0, 0, 1, 0, 0, 0], attribute(1, &[10, 0, 0, 2])].concat();
        assert_eq!(applied().renumbered(&LISTS[0], &lo), Some(lo));
    }

    #[test]
    fn errors_name_what_is_meant() {
        let body = [vec![2, 24, 0, 0, 7, 0, 0, 0], attribute(1, &[10, 0, 0, 2])].concat();
        assert_eq!(describe(&LISTS[0], &body), "address 10.0.0.2/24");
        assert_eq!(describe(&LISTS[2], &[0; 12]), "route to everything");
    }
}
