//! The part of rtnetlink that a pod's network needs: messages, attributes, and a socket that asks.
//! Knows the wire (rtnetlink(7), linux/netlink.h) and no namespace; what a message means is the callers'.
//!
//! Written here because the crate for it, netlink-packet-route, adds 692 KB to a program that reads a link,
//! most of a megabyte that the shim may not grow by; both sides together need a dozen kinds of message.
//! Addresses, routes, neighbours and rules are not even read: what one kernel has said of them is said to
//! another one, with the numbers of the links replaced.

mod message;
mod socket;
mod sys;

pub use message::{Attribute, Attributes, Message, Request, hop_places, padded, text, u32_of};
pub use socket::{Error, Socket};

/// Numbers of linux/rtnetlink.h, linux/if_link.h and linux/if_addr.h that the libc crate does not have.
pub mod numbers {
    /// Flag of a nested attribute.
    pub const NLA_F_NESTED: u16 = 1 << 15;
    /// What is left of an attribute's type without its flags.
    pub const NLA_TYPE_MASK: u16 = 0x3fff;
    /// `IFLA_LINK_NETNSID`: the lower link is in another namespace.
    pub const IFLA_LINK_NETNSID: u16 = 37;
    /// `IFLA_INFO_KIND`, within `IFLA_LINKINFO`.
    pub const IFLA_INFO_KIND: u16 = 1;
    /// `IFLA_INET6_ADDR_GEN_MODE`, within `AF_INET6` within `IFLA_AF_SPEC`.
    pub const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
    /// `IN6_ADDR_GEN_MODE_NONE`: the kernel gives the link no address by itself.
    pub const ADDR_GEN_MODE_NONE: u8 = 1;
}
