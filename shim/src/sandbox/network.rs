//! The network of one pod on the host: its namespace, its machine's cards, and which link each stands for.
//! Knows what was told to the guest last; does not know how the guest sets it.
//!
//! A machine gets its cards when it is launched, before anybody may have given the pod a network: one for each
//! link that is there, and some to spare. Each has a hardware address of its own at first, by which the guest
//! finds it. A link that is found later, since hooks or plugins made it, takes the next one to spare.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use bulkhead_hostnet::{Forwarder, Link, NetError, Netns, Network, TAP, Undo, join};
use bulkhead_proto::agent;
use bulkhead_vmm_spec::{Bindings, NetBinding, NetShape, Shape};

use crate::{
    error::{Fault, Kind},
    ledger::{Entry, Ledger},
};

/// The ledger of a sandbox, until it is taken back.
pub(super) type SharedLedger = Arc<Mutex<Option<Ledger>>>;

/// The network of one pod.
pub(super) struct PodNetwork {
    netns: Netns,
    state: Mutex<State>,
}

struct State {
    /// For each card the number of the link that it stands for.
    cards: Vec<Option<u32>>,
    told: agent::Network,
}

/// The hardware address of a card when its machine begins: locally administered, and unlike any other's in
/// the machine.
fn first_mac(card: usize) -> [u8; 6] {
    [0x02, b'b', b'h', 0, 0, card as u8]
}

fn tap(card: usize) -> String {
    format!("{TAP}{card}")
}

fn fault(error: NetError) -> Fault {
    let kind = match error {
        NetError::Open { .. } | NetError::Host(_) | NetError::Link { .. } => Kind::InvalidArgument,
        NetError::Busy(_) => Kind::FailedPrecondition,
        NetError::System { .. } => Kind::Internal,
    };
    Fault::of(kind, &error)
}

impl PodNetwork {
    /// Looks at the namespace at `path`, or makes one. The machine is to have `spare` cards more than it has
    /// links now.
    pub(super) fn acquire(path: Option<&Path>, spare: u32) -> Result<Self, Fault> {
        let netns = match path {
            Some(path) => Netns::open(path),
            None => Netns::create(),
        }
        .map_err(fault)?;
        netns.check_not_hosts().map_err(fault)?;
        let links = Network::scan(&netns).map_err(fault)?.links.len();
        let state = State { cards: vec![None; links + spare as usize], told: agent::Network::new() };
        Ok(Self { netns, state: Mutex::new(state) })
    }

    /// Gives a machine its cards. Their taps are made when it is launched, and go with it.
    pub(super) fn equip(&self, shape: &mut Shape, bindings: &mut Bindings) {
        let netns = Some(self.netns.path());
        for card in 0..self.state.lock().unwrap_or_else(PoisonError::into_inner).cards.len() {
            shape.nets.push(NetShape { mac: first_mac(card), mtu: None });
            bindings.nets.push(NetBinding { tap: tap(card), netns: netns.clone() });
        }
        bindings.netns = netns;
    }

    /// A descriptor of the namespace, for a process that is to be in it.
    pub(super) fn namespace(&self) -> std::io::Result<OwnedFd> {
        Ok(std::fs::File::open(self.netns.path())?.into())
    }

    /// Fails for a container that is to be in another network namespace than its pod.
    pub(super) fn check_joins(&self, path: Option<&Path>) -> Result<(), Fault> {
        let Some(path) = path else { return Ok(()) };
        let same = Netns::open(path).and_then(|other| Ok(other.identity()? == self.netns.identity()?));
        if same.map_err(fault)? {
            return Ok(());
        }
        let ours = self.netns.name().map_or_else(PathBuf::new, Path::to_owned);
        Err(Fault::new(
            Kind::InvalidArgument,
            format!(
                "joining the network namespace {} is not supported: all containers of a pod share the pod's{}{}",
                path.display(),
                if ours.as_os_str().is_empty() { "" } else { ", which is " },
                ours.display()
            ),
        ))
    }

    /// Looks again, joins links that are new to cards, and answers the network that the guest is to have now,
    /// if it is not the one that it was told last. Blocks for a moment.
    pub(super) fn refresh(&self, ledger: &SharedLedger) -> Result<Option<agent::Network>, Fault> {
        let network = Network::scan(&self.netns).map_err(fault)?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for link in &network.links {
            if !state.cards.contains(&Some(link.index)) {
                self.attach(&mut state, link, ledger)?;
            }
        }
        let wanted = message(network, &state.cards);
        Ok((wanted != state.told).then_some(wanted))
    }

    /// Listens for connections to the pod's `localhost`. Nobody can dial that of a namespace without a name.
    pub(super) fn forwarder(&self) -> Result<Option<Forwarder>, Fault> {
        self.netns.name().map(|_| Forwarder::open(&self.netns)).transpose().map_err(fault)
    }

    /// Remembers what the guest has.
    pub(super) fn was_told(&self, network: agent::Network) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).told = network;
    }

    fn attach(&self, state: &mut State, link: &Link, ledger: &SharedLedger) -> Result<(), Fault> {
        let Some(card) = state.cards.iter().position(Option::is_none) else {
            return Err(Fault::new(
                Kind::FailedPrecondition,
                format!(
                    "link {} came when the machine had none of its {} network cards left: raise network.spare_cards",
                    link.name,
                    state.cards.len()
                ),
            ));
        };
        if let Some(undo) = Undo::of(&self.netns, link).map_err(fault)? {
            let mut ledger = ledger.lock().unwrap_or_else(PoisonError::into_inner);
            let gone = || Fault::new(Kind::Unavailable, "the sandbox is being taken back");
            let entry = Entry::Redirection {
                netns: undo.netns,
                device: undo.identity.0,
                inode: undo.identity.1,
                link: undo.link,
                keep_ingress: undo.keep_ingress,
            };
            ledger.as_mut().ok_or_else(gone)?.record(entry).map_err(|e| Fault::of(Kind::Internal, &e))?;
        }
        fail_point!(JoinRecorded);
        join(&self.netns, link, &tap(card)).map_err(fault)?;
        fail_point!(JoinMade);
        state.cards[card] = Some(link.index);
        Ok(())
    }
}

/// The network as the guest is told.
fn message(network: Network, cards: &[Option<u32>]) -> agent::Network {
    let card = |link: Link| {
        let card = cards.iter().position(|card| *card == Some(link.index))?;
        Some(agent::Card {
            found_by: first_mac(card).to_vec(),
            link: link.index,
            name: link.name,
            mac: link.mac.to_vec(),
            mtu: link.mtu,
            up: link.up,
            no_arp: link.no_arp,
            ..Default::default()
        })
    };
    agent::Network {
        cards: network.links.into_iter().filter_map(card).collect(),
        addresses: network.addresses,
        routes: network.routes,
        neighbours: network.neighbours,
        rules: network.rules,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_stays_in_its_pods_network() {
        let network = PodNetwork::acquire(None, 1).unwrap();
        network.check_joins(None).unwrap();
        network.check_joins(Some(&network.netns.path())).unwrap();
        let text = network.check_joins(Some(Path::new("/proc/self/ns/net"))).unwrap_err().message;
        assert!(text.contains("joining the network namespace /proc/self/ns/net"), "{text}");
    }

    #[test]
    fn the_hosts_own_network_is_refused() {
        let refused = PodNetwork::acquire(Some(Path::new("/proc/self/ns/net")), 0).err().unwrap();
        assert_eq!(refused.kind, Kind::InvalidArgument);
        assert!(refused.message.contains("network namespace of the host"), "{}", refused.message);
    }

    #[test]
    fn a_network_without_links_is_told_to_nobody() {
        let network = PodNetwork::acquire(None, 1).unwrap();
        assert_eq!(network.refresh(&SharedLedger::default()).unwrap(), None);
        let (mut shape, mut bindings) = (shape(), bindings());
        network.equip(&mut shape, &mut bindings);
        assert_eq!((shape.nets.len(), bindings.nets[0].tap.as_str()), (1, "lobhtap0"));
        assert!(bindings.netns.is_some());
    }

    fn shape() -> Shape {
        Shape {
            vcpus: 1,
            max_vcpus: 1,
            memory: bulkhead_vmm_spec::SizeMib(64),
            growth: bulkhead_vmm_spec::SizeMib(0),
            cmdline: String::new(),
            share_tag: None,
            blocks: Vec::new(),
            nets: Vec::new(),
            spare_slots: 0,
        }
    }

    fn bindings() -> Bindings {
        Bindings {
            kernel: PathBuf::new(),
            initrd: PathBuf::new(),
            share: None,
            vsock: PathBuf::new(),
            blocks: Vec::new(),
            nets: Vec::new(),
            netns: None,
            run_dir: PathBuf::new(),
        }
    }
}
