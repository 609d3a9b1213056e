//! Taps and network namespaces of machines, opened.
//! Knows their names; what they are joined to is the caller's.

use std::{fs::File, os::fd::OwnedFd};

use bulkhead_hostnet::Netns;
use bulkhead_vmm_spec::{Bindings, NetBinding};

use crate::{LaunchError, child::Network};

/// Opens the tap of a network card, and makes it if there is none.
pub(crate) fn tap(net: &NetBinding) -> Result<OwnedFd, LaunchError> {
    let NetBinding { tap, netns } = net;
    let opened = match netns {
        None => bulkhead_hostnet::open_tap(tap),
        Some(path) => Netns::open(path).and_then(|netns| netns.open_tap(tap)),
    };
    opened.map_err(|error| LaunchError::system(format!("open the tap {tap}"), std::io::Error::other(error)))
}

/// Where the VMM runs. Never where its parent does: its pid is the pod's, and whoever sets up "the network of
/// that process" must not find the host's.
pub(crate) fn of_vmm(bindings: &Bindings) -> Result<Network, LaunchError> {
    let Some(path) = &bindings.netns else { return Ok(Network::Own) };
    let file = File::open(path).map_err(|source| LaunchError::File {
        what: "network namespace",
        path: path.clone(),
        source,
    })?;
    Ok(Network::Of(file.into()))
}
