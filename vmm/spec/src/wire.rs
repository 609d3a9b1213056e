//! What the shim and its machine monitor say to each other: one message boots, a few commands, events.
//! Knows no socket; a message is one JSON value in one packet, with the descriptors that it names attached.
//!
//! ```text
//!  shim ──Boot{shape, slots} + fds──▶ vmm          one packet of a SOCK_SEQPACKET pair each
//!  shim ◀──────Reply{id 0}─────────── vmm          the guest runs, or why it cannot
//!  shim ──Request{id, command}──────▶ vmm
//!  shim ◀──────Reply{id, …}────────── vmm
//!  shim ◀──────Event──────────────── vmm          whenever something happens
//! ```
//!
//! The shim's end closing ends the machine: nothing runs that nobody watches.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Shape;

/// The longest message, in bytes.
pub const MAX_MESSAGE: usize = 64 << 10;
/// The most descriptors in one message (the kernel's SCM_MAX_FD).
pub const MAX_FDS: usize = 253;

/// The position of a descriptor among those attached to a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(pub usize);

/// What backs a machine: every descriptor that it will ever have, but for what is attached later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slots {
    /// /dev/kvm.
    pub kvm: Slot,
    /// Uncompressed ELF kernel.
    pub kernel: Slot,
    /// Initial root file system.
    pub initrd: Slot,
    /// Listening unix socket of the vsock device.
    pub vsock: Slot,
    /// Connection to virtiofsd, where the shape has a share.
    pub share: Option<Slot>,
    /// Image or block device for each block device of the shape.
    pub blocks: Vec<Slot>,
    /// What is behind each network card of the shape.
    pub nets: Vec<NetSlots>,
}

/// What is behind a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSlots {
    /// A tap, opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR and not blocking.
    pub tap: Slot,
    /// /dev/vhost-net, where the host has it.
    pub vhost: Option<Slot>,
}

/// Whom the jailed process becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// User id on the host, never 0.
    pub uid: u32,
    /// Group id on the host, never 0.
    pub gid: u32,
    /// It was started in the network namespace of its pod and stays there: by its pid that namespace is
    /// found. Else it makes an empty one.
    pub in_pod_network: bool,
}

/// The first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// What the guest sees.
    pub shape: Shape,
    /// What backs it.
    pub slots: Slots,
    /// Who runs it.
    pub identity: Identity,
}

/// A message from the shim after the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Comes back with the reply; not 0, which is Boot's.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// What a machine can be told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Stops the processors and lets the devices finish what they began.
    Pause,
    /// Goes on after a pause.
    Resume,
    /// Ends the machine at once; the process leaves with status 0 after its reply.
    Stop,
    /// Changes what the guest is to have of what its shape leaves room for; [`Event::Grown`] tells what it has.
    Resize {
        /// Bytes of memory beyond the shape's own that the guest is to have, at most the shape's growth.
        growth_bytes: Option<u64>,
        /// Bytes of the boot memory that the balloon takes from the guest.
        balloon_bytes: Option<u64>,
    },
    /// Lets so many processors run, of those that the shape has room for; the others are held, whatever the guest
    /// does. At boot that is [`crate::Shape::vcpus`].
    Processors {
        /// At least 1, at most [`crate::Shape::max_vcpus`].
        count: u32,
    },
    /// Puts a block device into a spare slot; the descriptor is attached.
    Attach {
        /// Image or block device.
        file: Slot,
        /// What the guest sees.
        block: crate::BlockShape,
    },
    /// Takes the device out of a spare slot. The guest must have let go of it.
    Detach {
        /// As answered by [`Answer::Attached`].
        slot: u32,
    },
    /// Asks for all counters.
    Metrics,
    /// Answers [`Event::Dial`]; a connected stream is attached, or nothing where there is no listener.
    Dialed {
        /// As in the event.
        dial: u64,
        /// The stream.
        stream: Option<Slot>,
    },
}

/// A message to the shim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The answer to the request of that id; to Boot if it is 0.
    Reply {
        /// The request's.
        id: u64,
        /// What came of it; an error is a text for people.
        result: Result<Answer, String>,
    },
    /// Something happened.
    Event(Event),
}

/// What a command yields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done.
    Done,
    /// The device is in this slot.
    Attached {
        /// Number of the slot: the guest finds the device as `virtio-mmio.<device>`.
        slot: u32,
        /// Number of the platform device in the guest.
        device: u32,
    },
    /// Counters by part and name.
    Metrics(BTreeMap<String, BTreeMap<String, u64>>),
}

/// What a machine tells without being asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The guest connects to a port of the host: answer with [`Command::Dialed`].
    Dial {
        /// Names the attempt.
        dial: u64,
        /// The port.
        port: u32,
    },
    /// The guest's kernel panicked.
    Panic {
        /// The line by which it said so.
        message: String,
        /// The last lines of its console, that one among them.
        console: Vec<String>,
    },
    /// The guest has taken or given back memory, as [`Command::Resize`] asked for or of its own accord.
    Grown {
        /// Bytes that it has now beyond the shape's own.
        growth_bytes: u64,
    },
    /// The machine is about to end.
    Ended(Ended),
}

/// Why a machine ends by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    /// The guest reset its machine or powered it off; status 0.
    Guest,
    /// KVM or a device gave up; another status.
    Failure(String),
}

/// Exit statuses of the machine monitor.
pub mod status {
    /// The guest ended, or Stop was asked for.
    pub const ENDED: i32 = 0;
    /// The machine failed; a line on standard error says how.
    pub const FAILED: i32 = 1;
    /// It was started in a way that makes no sense.
    pub const USAGE: i32 = 2;
    /// The shim went away.
    pub const ORPHANED: i32 = 3;
    /// A system call that the filter forbids: 128 + SIGSYS.
    pub const FORBIDDEN: i32 = 159;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_their_journey() {
        let messages = [
            Message::Reply { id: 3, result: Ok(Answer::Attached { slot: 1, device: 7 }) },
            Message::Reply { id: 0, result: Err("no".into()) },
            Message::Event(Event::Dial { dial: 9, port: 1024 }),
            Message::Event(Event::Grown { growth_bytes: 2 << 20 }),
            Message::Event(Event::Ended(Ended::Guest)),
        ];
        for message in messages {
            let text = serde_json::to_string(&message).unwrap();
            assert_eq!(serde_json::from_str::<Message>(&text).unwrap(), message, "{text}");
        }
    }
}
