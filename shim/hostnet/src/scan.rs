//! What is in a network namespace: its links, and all that is set for them.
//! Knows rtnetlink; does not know what of it a guest has already.
//!
//! Links are read. Addresses, routes, neighbours and rules are kept as the kernel tells them (the bodies of
//! its messages, without what belongs to the host alone), since that is how another kernel takes them.

use std::collections::BTreeMap;

use bulkhead_netlink::{Attributes, Message, Request, hop_places, numbers, padded, text, u32_of};

use crate::{NetError, Netns, TAP, error::Doing};

/// Lengths of `struct ifinfomsg`, `ifaddrmsg`, `rtmsg`, `ndmsg` and `fib_rule_hdr`.
const IFINFO: usize = 16;
const IFADDR: usize = 8;
const RTMSG: usize = 12;
const NDMSG: usize = 12;
const RULE: usize = 12;

/// Attributes of an address that are told (linux/if_addr.h): address, local, label, broadcast, priority of
/// its route. Not its lifetime: who renews it is not in the guest.
const OF_ADDRESS: &[u16] = &[1, 2, 3, 4, 9];
/// Attributes of a route that are told (linux/rtnetlink.h): destination, source, incoming link, link, gateway,
/// priority, preferred source, metrics, next hops, flow, table, mark, via, preference. Not its age, and not
/// the number of a next hop, which is told in full as well.
const OF_ROUTE: &[u16] = &[1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 15, 16, 18, 20];
/// Attributes of a neighbour that are told: address, hardware address.
const OF_NEIGHBOUR: &[u16] = &[1, 2];

/// Fallback links that modules of the host put, down, into every namespace (ip_tunnel.c, ip6_tunnel.c, sit.c).
const FALLBACKS: &[&str] =
    &["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"];

/// Kinds of links that stand on another one and take frames out of its way.
const STACKED: &[&str] = &["vlan", "macvlan", "macvtap", "ipvlan", "ipvtap"];

/// A link that becomes a network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is, in the words of ip-link(8); empty for a device of the machine.
    pub kind: String,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Largest packet in bytes.
    pub mtu: u32,
    /// It is set up.
    pub up: bool,
    /// It asks nobody for hardware addresses (IFF_NOARP), as an ipvlan of layer 3.
    pub no_arp: bool,
    /// It has a queueing discipline for what comes in already.
    pub has_ingress: bool,
}

/// What is in a namespace. The lists hold bodies of rtnetlink messages, each in the order in which they can be
/// set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// The links, by number.
    pub links: Vec<Link>,
    /// RTM_NEWADDR.
    pub addresses: Vec<Vec<u8>>,
    /// RTM_NEWROUTE.
    pub routes: Vec<Vec<u8>>,
    /// RTM_NEWNEIGH, those that somebody has set.
    pub neighbours: Vec<Vec<u8>>,
    /// RTM_NEWRULE.
    pub rules: Vec<Vec<u8>>,
}

impl Network {
    /// Looks at what is in `netns`, without our own taps.
    ///
    /// # Errors
    /// [`NetError::Link`]: a link that no network card can stand for. The system tells nothing.
    pub fn scan(netns: &Netns) -> Result<Self, NetError> {
        let mut socket = netns.socket()?;
        let mut list = |kind: u16, header: &[u8]| {
            socket.dump(&Request::new(kind, 0, header)).doing(|| "list what is in a network namespace".into())
        };
        let ingress: Vec<u32> = list(libc::RTM_GETQDISC, &[0; 20])?.iter().filter_map(ingress_link).collect();
        let links = links(&list(libc::RTM_GETLINK, &[0; IFINFO])?, &ingress)?;
        let passed = |index: u32| index == LOOPBACK || links.iter().any(|link| link.index == index);

        let addresses = list(libc::RTM_GETADDR, &[0; IFADDR])?;
        let addresses = addresses.iter().filter_map(|m| address(m, &passed)).collect();
        let (mut routes, mut rules) = (Vec::new(), Vec::new());
        for family in [libc::AF_INET, libc::AF_INET6] {
            let header = [family as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            routes.extend(list(libc::RTM_GETROUTE, &header)?.iter().filter_map(|m| route(m, &passed)));
            rules.extend(list(libc::RTM_GETRULE, &header)?.iter().filter_map(rule));
        }
        // A gateway must be within reach when its route is set.
        routes.sort_by_key(|route| Attributes(&route[RTMSG..]).any(|a| VIA.contains(&a.kind)));
        let neighbours = list(libc::RTM_GETNEIGH, &[0; NDMSG])?;
        let neighbours = neighbours.iter().filter_map(|m| neighbour(m, &passed)).collect();
        Ok(Self { links, addresses, routes, neighbours, rules })
    }
}

/// `lo` has this number in every namespace.
const LOOPBACK: u32 = 1;
/// Attributes by which a route names a gateway: gateway, next hops, via.
const VIA: [u16; 3] = [libc::RTA_GATEWAY, libc::RTA_MULTIPATH, 18];

/// The link that a queueing discipline for incoming frames is on (`struct tcmsg`).
fn ingress_link(message: &Message) -> Option<u32> {
    let kind = message.attributes(20).get(libc::TCA_KIND).map(text)?;
    let index = u32_of(message.body.get(4..)?)?;
    (kind == "ingress" || kind == "clsact").then_some(index)
}

/// What is known of a link before it is decided upon.
struct Seen {
    link: Link,
    ethernet: bool,
    master: bool,
    /// The link below, where that is in the same namespace.
    below: Option<u32>,
}

fn links(messages: &[Message], ingress: &[u32]) -> Result<Vec<Link>, NetError> {
    let all: BTreeMap<u32, Seen> =
        messages.iter().filter_map(|m| seen(m, ingress)).map(|s| (s.link.index, s)).collect();
    let mut links = Vec::new();
    for seen in all.values() {
        let Seen { link, .. } = seen;
        let fallback = FALLBACKS.contains(&link.name.as_str()) && !link.up;
        if fallback || link.kind == "tun" && link.name.starts_with(TAP) {
            continue;
        }
        if seen.master {
            tracing::debug!(link = link.name, "what it carries is carried by its master");
            continue;
        }
        if let Some(reason) = reason_against(seen, &all) {
            let kind = if link.kind.is_empty() { "a device" } else { &link.kind };
            return Err(NetError::Link { name: link.name.clone(), kind: kind.into(), reason });
        }
        links.push(link.clone());
    }
    Ok(links)
}

/// Why a link cannot be passed. An unknown kind can: all that is needed of it is that it carries frames.
fn reason_against(seen: &Seen, all: &BTreeMap<u32, Seen>) -> Option<String> {
    if !seen.ethernet {
        return Some("it carries no Ethernet frames; make it in the guest, or put a veth before it".into());
    }
    if seen.link.kind == "vrf" {
        return Some("it carries no frames of its own; make it in the guest".into());
    }
    let below = seen.below.filter(|_| STACKED.contains(&seen.link.kind.as_str()))?;
    let below = &all.get(&below)?.link.name;
    Some(format!("it stands on {below} of the same namespace, which is passed itself; make it in the guest"))
}

/// Reads a link; `lo` is none.
fn seen(message: &Message, ingress: &[u32]) -> Option<Seen> {
    if message.kind != libc::RTM_NEWLINK {
        return None;
    }
    let header: [u8; IFINFO] = message.family()?;
    let index = u32_of(&header[4..])?;
    let flags = u32_of(&header[8..])? as i32;
    if flags & libc::IFF_LOOPBACK != 0 {
        return None;
    }
    let attributes = message.attributes(IFINFO);
    let mac = attributes.get(libc::IFLA_ADDRESS).and_then(|mac| mac.try_into().ok());
    let ethernet = u16::from_ne_bytes([header[2], header[3]]) == libc::ARPHRD_ETHER && mac.is_some();
    let elsewhere = attributes.get(numbers::IFLA_LINK_NETNSID).is_some();
    let below = attributes.get(libc::IFLA_LINK).and_then(u32_of).filter(|&n| n != index && n != 0);
    let kind = attributes.inner(libc::IFLA_LINKINFO).get(numbers::IFLA_INFO_KIND).map(text);
    let link = Link {
        index,
        name: attributes.get(libc::IFLA_IFNAME).map(text)?,
        kind: kind.unwrap_or_default(),
        mac: mac.unwrap_or_default(),
        mtu: attributes.get(libc::IFLA_MTU).and_then(u32_of)?,
        up: flags & libc::IFF_UP != 0,
        no_arp: flags & libc::IFF_NOARP != 0,
        has_ingress: ingress.contains(&index),
    };
    let master = attributes.get(libc::IFLA_MASTER).and_then(u32_of).is_some_and(|n| n != 0);
    Some(Seen { link, ethernet, master, below: below.filter(|_| !elsewhere) })
}

/// The body anew, with these attributes only.
fn only(header: &[u8], attributes: Attributes<'_>, kinds: &[u16]) -> Vec<u8> {
    let mut body = header.to_vec();
    for attribute in attributes.filter(|a| kinds.contains(&a.kind)) {
        add(&mut body, attribute.kind, attribute.value);
    }
    body
}

fn add(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend((4 + value.len() as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(padded(body.len()), 0);
}

fn address(message: &Message, passed: &impl Fn(u32) -> bool) -> Option<Vec<u8>> {
    const IFA_FLAGS: u16 = 8;
    let mut header: [u8; IFADDR] = message.family()?;
    let index = u32_of(&header[4..])?;
    let attributes = message.attributes(IFADDR);
    let flags = attributes.get(IFA_FLAGS).and_then(u32_of).unwrap_or(header[2].into());
    // What the guest's `lo` has by itself, and an address that somebody else turned out to have.
    let local = attributes.get(libc::IFA_LOCAL).or(attributes.get(libc::IFA_ADDRESS))?;
    let usual =
        index == LOOPBACK && (local == [127, 0, 0, 1] || local == std::net::Ipv6Addr::LOCALHOST.octets());
    if message.kind != libc::RTM_NEWADDR || !passed(index) || usual || flags & libc::IFA_F_DADFAILED != 0 {
        return None;
    }
    header[2] = 0;
    let mut body = only(&header, attributes, OF_ADDRESS);
    // It was proven to be ours on this very link; and its route is told, or was taken away on purpose.
    add(&mut body, IFA_FLAGS, &(libc::IFA_F_NODAD | libc::IFA_F_NOPREFIXROUTE).to_ne_bytes());
    Some(body)
}

fn route(message: &Message, passed: &impl Fn(u32) -> bool) -> Option<Vec<u8>> {
    let mut header: [u8; RTMSG] = message.family()?;
    let attributes = message.attributes(RTMSG);
    let [_, _, _, _, table, protocol, _, kind, ..] = header;
    // The kernel's own entries come with the addresses, or are of a moment.
    let own = table == libc::RT_TABLE_LOCAL && protocol == libc::RTPROT_KERNEL;
    let flags = u32_of(&header[8..])?;
    let told = [libc::RTN_UNICAST, libc::RTN_LOCAL, libc::RTN_BLACKHOLE, libc::RTN_UNREACHABLE]
        .into_iter()
        .chain([libc::RTN_PROHIBIT, libc::RTN_THROW])
        .any(|known| known == kind);
    if message.kind != libc::RTM_NEWROUTE || own || !told || flags & libc::RTM_F_CLONED != 0 {
        return None;
    }
    let one = attributes.get(libc::RTA_OIF).and_then(u32_of);
    let hops = attributes.get(libc::RTA_MULTIPATH).map(next_hops).unwrap_or_default();
    if !one.into_iter().chain(hops).all(passed) {
        return None;
    }
    // Only what can be set: not that a link is down, or that hardware forwards it (linux/rtnetlink.h).
    header[8..].copy_from_slice(&(flags & u32::from(ONLINK)).to_ne_bytes());
    let mut body = header.to_vec();
    for attribute in attributes.filter(|a| OF_ROUTE.contains(&a.kind)) {
        if attribute.kind == libc::RTA_MULTIPATH {
            let mut hops = attribute.value.to_vec();
            for at in hop_places(&hops) {
                hops[at + 2] &= ONLINK;
            }
            add(&mut body, attribute.kind, &hops);
        } else {
            add(&mut body, attribute.kind, attribute.value);
        }
    }
    Some(body)
}

/// Of a next hop's flags, the one that can be set: its gateway is on the link, whatever the routes say
/// (RTNH_F_ONLINK, linux/rtnetlink.h).
const ONLINK: u8 = 4;

/// The links of the next hops.
fn next_hops(hops: &[u8]) -> Vec<u32> {
    hop_places(hops).into_iter().filter_map(|at| u32_of(&hops[at + 4..])).collect()
}

fn neighbour(message: &Message, passed: &impl Fn(u32) -> bool) -> Option<Vec<u8>> {
    let header: [u8; NDMSG] = message.family()?;
    let state = u16::from_ne_bytes([header[8], header[9]]);
    let ip = [libc::AF_INET as u8, libc::AF_INET6 as u8].contains(&header[0]);
    let set = state & libc::NUD_PERMANENT != 0;
    (message.kind == libc::RTM_NEWNEIGH && ip && set && passed(u32_of(&header[4..])?))
        .then(|| only(&header, message.attributes(NDMSG), OF_NEIGHBOUR))
}

/// A rule that somebody has set; it names links by their names.
fn rule(message: &Message) -> Option<Vec<u8>> {
    const FRA_PROTOCOL: u16 = 21;
    let header: [u8; RULE] = message.family()?;
    let attributes = message.attributes(RULE);
    let kernels = attributes.get(FRA_PROTOCOL) == Some(&[libc::RTPROT_KERNEL]);
    let kinds: Vec<u16> = attributes.map(|a| a.kind).collect();
    (message.kind == libc::RTM_NEWRULE && !kernels).then(|| only(&header, attributes, &kinds))
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
