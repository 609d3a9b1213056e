//! Takes every TCP connection to `localhost` in a pod's network namespace, whatever its port.
//! Knows sockets; does not know where a connection is forwarded to.
//!
//! Who forwards a port of a pod (containerd, for the kubelet) dials `localhost` in the pod's namespace on the
//! host, where nobody listens: the pod's servers are in the guest. So two sockets listen there, and a program at
//! the kernel's lookup of sockets (BPF_SK_LOOKUP, Linux 5.9) gives them every connection that comes to the
//! namespace's own stack. Nothing is written down: all of it goes with the descriptors.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, TcpListener},
    os::fd::AsFd,
};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn6, bind, listen, setsockopt, socket,
    sockopt::Ipv6V6Only,
};

use crate::{
    NetError, Netns,
    bpf::{self, Attached},
    error::Doing,
};

/// Listens for all connections to `localhost` of a namespace, until it is dropped.
#[derive(Debug)]
pub struct Forwarder {
    /// For IPv4, and for IPv6 where the host has it. Not blocking. The local address of a connection says which
    /// port it was made to.
    pub listeners: Vec<TcpListener>,
    /// What gives them the connections, until it is dropped.
    pub program: Attached,
}

impl Forwarder {
    /// Begins to listen in `netns`.
    ///
    /// # Errors
    /// The host's kernel has no such lookup, or no descriptor is left.
    pub fn open(netns: &Netns) -> Result<Self, NetError> {
        let four = netns.within(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        let mut listeners = vec![four.doing(|| "listen at 127.0.0.1".into())?];
        match netns.within(listen_six)? {
            Ok(listener) => listeners.push(listener),
            Err(error) => tracing::debug!(%error, "no IPv6 in the pod's network namespace"),
        }
        for listener in &listeners {
            listener.set_nonblocking(true).doing(|| "listen without blocking".into())?;
        }
        let sockets: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
        let program = bpf::take_connections(netns.fd(), &sockets)
            .doing(|| "take the connections of a network namespace (BPF_SK_LOOKUP, Linux 5.9)".into())?;
        Ok(Self { listeners, program })
    }
}

/// For IPv6 alone: the other one has its own.
fn listen_six() -> io::Result<TcpListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let six = socket(AddressFamily::Inet6, SockType::Stream, flags, None)?;
    setsockopt(&six, Ipv6V6Only, &true)?;
    let address = std::net::SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0);
    bind(std::os::fd::AsRawFd::as_raw_fd(&six), &SockaddrIn6::from(address))?;
    listen(&six, Backlog::MAXCONN)?;
    Ok(TcpListener::from(six))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{SocketAddr, TcpStream},
        process::Command,
    };

    use super::*;

    #[test]
    fn any_port_of_localhost_is_taken_and_told() {
        let netns = Netns::create().unwrap();
        let up = Command::new("nsenter")
            .arg(format!("--net={}", netns.path_for_others()))
            .args(["ip", "link", "set", "lo", "up"])
            .status();
        assert!(up.unwrap().success());
        let forwarder = Forwarder::open(&netns).unwrap();
        for (listener, address) in forwarder.listeners.iter().zip(["127.0.0.1:80", "[::1]:65535"]) {
            let address: SocketAddr = address.parse().unwrap();
            let mut client = netns.within(|| TcpStream::connect(address)).unwrap().unwrap();
            let (mut taken, _) = listener.accept().unwrap();
            assert_eq!(taken.local_addr().unwrap(), address);
            taken.write_all(b"x").unwrap();
            client.read_exact(&mut [0]).unwrap();
        }
        drop(forwarder);
        let refused = netns.within(|| TcpStream::connect("127.0.0.1:80")).unwrap();
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
