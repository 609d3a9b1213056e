//! Joins a link and a tap: what comes in on the one goes out on the other.
//! Knows tc-mirred(8); does not know who reads the tap.

use std::path::PathBuf;

use bulkhead_netlink::{Error, Request, Socket, numbers};
use nix::errno::Errno;

use crate::{Link, NetError, Netns, error::Doing};

/// Priority of our rule on a link: nobody else's is likely to have it, and we find it again by it.
const PRIORITY: u32 = 0xb0d;
/// All protocols (`ETH_P_ALL`), in the order of the network.
const ALL: u32 = (libc::ETH_P_ALL as u16).to_be() as u32;
/// Where rules for incoming frames hang, with `ingress` as with `clsact` (`TC_H_CLSACT | TC_H_MIN_INGRESS`).
const INCOMING: u32 = 0xffff_fff2;
/// The discipline itself (`TC_H_INGRESS`), and its handle.
const INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;

/// How to take from a link what [`join`] gives it. To be written down before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undo {
    /// The namespace.
    pub netns: PathBuf,
    /// Device and inode of the namespace: another one may have its path later.
    pub identity: (u64, u64),
    /// The link's number.
    pub link: u32,
    /// The link had a queueing discipline for incoming frames before.
    pub keep_ingress: bool,
}

impl Undo {
    /// What [`join`] will do to `link`. `None` in a namespace without a name: it goes with those who are in it,
    /// and takes all with it.
    ///
    /// # Errors
    /// As of [`Netns::identity`].
    pub fn of(netns: &Netns, link: &Link) -> Result<Option<Self>, NetError> {
        let Some(name) = netns.name() else { return Ok(None) };
        let (netns, identity) = (name.to_owned(), netns.identity()?);
        Ok(Some(Self { netns, identity, link: link.index, keep_ingress: link.has_ingress }))
    }
}

/// Sets the tap up beside `link`, and has each give the other what it receives.
///
/// # Errors
/// There is no such tap; the host's kernel has no ingress discipline, no classifier or no mirred.
pub fn join(netns: &Netns, link: &Link, tap: &str) -> Result<(), NetError> {
    let mut socket = netns.socket()?;
    let index = set_up(&mut socket, tap, link.mtu).doing(|| format!("set up {tap} for {}", link.name))?;
    for (from, name, to, has_ingress) in
        [(index, tap, link.index, false), (link.index, link.name.as_str(), index, link.has_ingress)]
    {
        if !has_ingress {
            let hint = "a queueing discipline for incoming frames (module sch_ingress)";
            match socket.ask(&qdisc(libc::RTM_NEWQDISC, from)) {
                Err(error) if !error.is(&[Errno::EEXIST]) => {
                    return Err(error).doing(|| format!("give {name} {hint}"));
                }
                _ => {}
            }
        }
        redirect(&mut socket, from, to).doing(|| {
            format!("redirect what {name} receives (modules cls_u32 or cls_matchall, act_mirred)")
        })?;
    }
    Ok(())
}

/// Takes back what [`join`] gave to a link. Nothing is there any more: nothing to do.
///
/// # Errors
/// The system refuses.
pub fn undo(undo: &Undo) -> Result<(), NetError> {
    let netns = match Netns::open(&undo.netns) {
        Ok(netns) => netns,
        // Its path is gone or leads elsewhere: so has the link.
        Err(NetError::Open { .. }) => return Ok(()),
        Err(other) => return Err(other),
    };
    if netns.identity()? != undo.identity {
        return Ok(());
    }
    let mut socket = netns.socket()?;
    let request = if undo.keep_ingress {
        filter(libc::RTM_DELTFILTER, 0, undo.link)
    } else {
        qdisc(libc::RTM_DELQDISC, undo.link)
    };
    match socket.ask(&request) {
        Err(error) if !error.is(&[Errno::ENODEV, Errno::ENOENT, Errno::EINVAL]) => {
            Err(error).doing(|| format!("take the redirection from link {}", undo.link))
        }
        _ => Ok(()),
    }
}

/// Gives the tap the link's MTU and sets it up, without an address: it must not speak to the guest by itself.
fn set_up(socket: &mut Socket, tap: &str, mtu: u32) -> Result<u32, Error> {
    let set = Request::new(libc::RTM_NEWLINK, 0, &[0; 16])
        .text(libc::IFLA_IFNAME, tap)
        .u32(libc::IFLA_MTU, mtu)
        .nested(libc::IFLA_AF_SPEC, |spec| {
            spec.nested(libc::AF_INET6 as u16, |inet6| {
                inet6.attr(numbers::IFLA_INET6_ADDR_GEN_MODE, &[numbers::ADDR_GEN_MODE_NONE])
            })
        });
    match socket.ask(&set) {
        // A kernel without IPv6 has no such mode, and no such address.
        Err(error) if error.is(&[Errno::EAFNOSUPPORT]) => {
            let set = Request::new(libc::RTM_NEWLINK, 0, &[0; 16]).text(libc::IFLA_IFNAME, tap);
            socket.ask(&set.u32(libc::IFLA_MTU, mtu))?;
        }
        other => other?,
    }
    let mut header = [0; 16];
    for at in [8, 12] {
        header[at..at + 4].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
    }
    socket.ask(&Request::new(libc::RTM_NEWLINK, 0, &header).text(libc::IFLA_IFNAME, tap))?;
    index_of(socket, tap)
}

fn index_of(socket: &mut Socket, name: &str) -> Result<u32, Error> {
    let links = socket.dump(&Request::new(libc::RTM_GETLINK, 0, &[0; 16]))?;
    let named = |m: &&bulkhead_netlink::Message| {
        m.attributes(16).get(libc::IFLA_IFNAME).map(bulkhead_netlink::text).as_deref() == Some(name)
    };
    let index = links.iter().find(named).and_then(|m| bulkhead_netlink::u32_of(m.body.get(4..)?));
    index.ok_or(Error::Refused(Errno::ENODEV, String::new()))
}

/// `struct tcmsg`.
fn tcmsg(link: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut header = [0; 20];
    for (at, value) in [(4, link), (8, handle), (12, parent), (16, info)] {
        header[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    header
}

fn qdisc(kind: u16, link: u32) -> Request {
    let flags = if kind == libc::RTM_NEWQDISC { libc::NLM_F_CREATE | libc::NLM_F_EXCL } else { 0 };
    Request::new(kind, flags, &tcmsg(link, INGRESS_HANDLE, INGRESS, 0)).text(libc::TCA_KIND, "ingress")
}

fn filter(kind: u16, flags: i32, link: u32) -> Request {
    Request::new(kind, flags, &tcmsg(link, 0, INCOMING, PRIORITY << 16 | ALL))
}

/// Everything that `from` receives goes out on `to`. By u32, which most kernels have, else by matchall.
fn redirect(socket: &mut Socket, from: u32, to: u32) -> Result<(), Error> {
    const TCA_OPTIONS: u16 = 2;
    const TCA_U32_SEL: u16 = 5;
    const TCA_U32_ACT: u16 = 7;
    const TCA_MATCHALL_ACT: u16 = 2;
    let new = || filter(libc::RTM_NEWTFILTER, libc::NLM_F_CREATE | libc::NLM_F_EXCL, from);
    // struct tc_u32_sel with one key that any frame has: TC_U32_TERMINAL, and no bit of its first word.
    let mut selector = [0; 32];
    (selector[0], selector[2]) = (1, 1);
    let by_u32 = new().text(libc::TCA_KIND, "u32").nested(TCA_OPTIONS, |options| {
        options.attr(TCA_U32_SEL, &selector).nested(TCA_U32_ACT, |list| mirred(list, to))
    });
    match socket.ask(&by_u32) {
        Err(error) if error.is(&[Errno::ENOENT]) => {}
        other => return other,
    }
    let by_matchall = new()
        .text(libc::TCA_KIND, "matchall")
        .nested(TCA_OPTIONS, |options| options.nested(TCA_MATCHALL_ACT, |list| mirred(list, to)));
    socket.ask(&by_matchall)
}

/// A list of one action: steal the frame, and send it on `to` (`struct tc_mirred`).
fn mirred(list: Request, to: u32) -> Request {
    const FIRST: u16 = 1;
    const TCA_ACT_KIND: u16 = 1;
    const TCA_ACT_OPTIONS: u16 = 2;
    const TCA_MIRRED_PARMS: u16 = 2;
    const TC_ACT_STOLEN: u32 = 4;
    const TCA_EGRESS_REDIR: u32 = 1;
    let words = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to];
    let parameters: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    list.nested(FIRST, |action| {
        action
            .text(TCA_ACT_KIND, "mirred")
            .nested(TCA_ACT_OPTIONS, |options| options.attr(TCA_MIRRED_PARMS, &parameters))
    })
}

#[cfg(test)]
#[path = "join_tests.rs"]
mod tests;
