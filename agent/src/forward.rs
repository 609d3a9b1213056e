//! Connections from the host to servers at the pod's `localhost`.
//! Knows sockets and the streams of a process, which are used as they are; must not know who asks.

use std::{
    fs::File,
    io::{self, ErrorKind},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    time::Duration,
};

use bulkhead_proto::agent::{ForwardRequest, Stdio};

use crate::{
    error::{Doing, Error, Result},
    events::Events,
    netns, stdio,
};

/// On `localhost` a server answers at once, unless its queue is full.
const CONNECT: Duration = Duration::from_secs(10);

/// Connects, and moves bytes until both sides have closed.
pub(crate) async fn forward(request: &ForwardRequest, events: &Events) -> Result<()> {
    let port = u16::try_from(request.port).ok().filter(|&port| port != 0);
    let port = port.ok_or_else(|| Error::Invalid(format!("{} is no port", request.port)))?;
    let mut addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), (Ipv6Addr::LOCALHOST, port).into()];
    if request.ipv6_first {
        addresses.reverse();
    }
    let pod = File::open(netns::network()).doing(|| "open the pod's network namespace".into())?;
    let connected = tokio::task::spawn_blocking(move || netns::within(pod, move || connect(&addresses)));
    let server = match connected.await.unwrap_or_else(|e| Err(io::Error::other(e))) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            return Err(Error::NotFound(format!("nobody listens at port {port} of the pod's localhost")));
        }
        other => other.doing(|| format!("connect to port {port} of the pod's localhost"))?,
    };
    let streams = Stdio {
        stdin_token: request.in_token.clone(),
        stdout_token: request.out_token.clone(),
        ..Default::default()
    };
    let streams = stdio::dial(&streams).await?;
    streams.pump_connection(server, events).doing(|| "watch a connection".into())
}

/// The first that somebody listens at.
fn connect(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut last = ErrorKind::ConnectionRefused.into();
    for address in addresses {
        match TcpStream::connect_timeout(address, CONNECT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}
