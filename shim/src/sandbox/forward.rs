//! Hands connections to `localhost` of the pod's namespace on the host to the guest, where the servers are.
//! Knows sockets and the agent; does not know who forwards which port.

use std::os::fd::AsFd;

use bulkhead_hostnet::Forwarder;
use nix::sys::socket::{setsockopt, sockopt::Linger};
use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, warn};

use crate::{guest::Agent, stdio::Hub, tasks};

/// Serves until the process ends: nobody outside of the pod's namespace can tell that it does.
pub(super) async fn serve(forwarder: Forwarder, agent: Agent, hub: Hub) {
    let Forwarder { listeners, program } = forwarder;
    let served = listeners.into_iter().map(|listener| async {
        match TcpListener::from_std(listener) {
            Ok(listener) => accept(listener, &agent, &hub).await,
            Err(error) => warn!(%error, "ports of the pod are not forwarded"),
        }
    });
    futures::future::join_all(served).await;
    drop(program);
}

async fn accept(listener: TcpListener, agent: &Agent, hub: &Hub) {
    loop {
        match listener.accept().await {
            Ok((peer, _)) => {
                tasks::spawn(connect(peer, agent.clone(), hub.clone()));
            }
            Err(error) => return warn!(%error, "ports of the pod are not forwarded any more"),
        }
    }
}

/// Connects a peer to the port of the guest that it has dialled. Where nobody listens it is reset, which is as
/// near to a refusal as can be: it was let in before that could be known.
async fn connect(peer: TcpStream, agent: Agent, hub: Hub) {
    let reset = |on: bool| libc::linger { l_onoff: on.into(), l_linger: 0 };
    let (Ok(address), Ok(handle)) = (peer.local_addr(), peer.as_fd().try_clone_to_owned()) else { return };
    let _ = setsockopt(&handle, Linger, &reset(true));
    let tokens = match hub.open_connection(peer) {
        Ok(tokens) => tokens,
        Err(error) => return warn!(%error, "a connection to the pod"),
    };
    match agent.forward(address.port(), address.is_ipv6(), tokens).await {
        Ok(()) => drop(setsockopt(&handle, Linger, &reset(false))),
        Err(fault) => {
            debug!("a connection to the pod: {fault}");
            hub.withdraw(&tokens);
        }
    }
}
