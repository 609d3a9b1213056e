//! Messages and attributes as bytes: written, and read without trust in their lengths.
//! Knows no socket.

use crate::numbers::{NLA_F_NESTED, NLA_TYPE_MASK};

/// Length of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;
/// Length of `struct nlattr`.
const ATTRIBUTE: usize = 4;

/// A length rounded up to where the next attribute or message begins (`NLMSG_ALIGN`, `NLA_ALIGN`).
pub const fn padded(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// A message to the kernel in the making.
#[derive(Clone, Debug)]
pub struct Request {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Request {
    /// A message of type `kind` (`RTM_*`) with `flags` (`NLM_F_*`) whose body begins with the type's own
    /// structure, `family`.
    pub fn new(kind: u16, flags: i32, family: &[u8]) -> Self {
        let mut request = Self { kind, flags: flags as u16, body: family.to_vec() };
        request.pad();
        request
    }

    fn pad(&mut self) {
        self.body.resize(padded(self.body.len()), 0);
    }

    /// Adds an attribute.
    #[must_use]
    pub fn attr(mut self, kind: u16, value: &[u8]) -> Self {
        self.body.extend(((ATTRIBUTE + value.len()) as u16).to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(value);
        self.pad();
        self
    }

    /// Adds a number of 32 bits.
    #[must_use]
    pub fn u32(self, kind: u16, value: u32) -> Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Adds a text with the zero byte at its end.
    #[must_use]
    pub fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Adds an attribute that holds those that `inner` adds.
    #[must_use]
    pub fn nested(mut self, kind: u16, inner: impl FnOnce(Self) -> Self) -> Self {
        let start = self.body.len();
        self = inner(self.attr(kind | NLA_F_NESTED, &[]));
        let length = (self.body.len() - start) as u16;
        self.body[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// The whole message with its header.
    pub(crate) fn encode(&self, flags: i32, sequence: u32) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        bytes.extend(((HEADER + self.body.len()) as u32).to_ne_bytes());
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend((self.flags | flags as u16).to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&self.body);
        bytes
    }
}

/// A message from the kernel, without its header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its type: `RTM_*`, or `NLMSG_*` below 16.
    pub kind: u16,
    /// `NLM_F_*`.
    pub flags: u16,
    /// Names the request that it answers.
    pub sequence: u32,
    /// The type's own structure, and attributes.
    pub body: Vec<u8>,
}

impl Message {
    /// The messages of one datagram. What comes after one that says a wrong length is not read.
    pub fn split(mut bytes: &[u8]) -> Vec<Self> {
        let mut messages = Vec::new();
        while let Some(length) = u32_of(bytes).map(|n| n as usize)
            && (HEADER..=bytes.len()).contains(&length)
        {
            let half = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
            messages.push(Self {
                kind: half(4),
                flags: half(6),
                sequence: u32_of(&bytes[8..]).unwrap_or(0),
                body: bytes[HEADER..length].to_vec(),
            });
            bytes = bytes.get(padded(length)..).unwrap_or_default();
        }
        messages
    }

    /// The first `N` bytes of the type's own structure.
    pub fn family<const N: usize>(&self) -> Option<[u8; N]> {
        self.body.get(..N)?.try_into().ok()
    }

    /// The attributes after a structure of `length` bytes.
    pub fn attributes(&self, length: usize) -> Attributes<'_> {
        Attributes(self.body.get(padded(length)..).unwrap_or_default())
    }
}

/// One attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attribute<'a> {
    /// Its type, without flags.
    pub kind: u16,
    /// Its value.
    pub value: &'a [u8],
}

/// The attributes in a row of bytes. What comes after one that says a wrong length is not read.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a>(pub &'a [u8]);

impl<'a> Attributes<'a> {
    /// The value of the first attribute of this type.
    pub fn get(mut self, kind: u16) -> Option<&'a [u8]> {
        self.find(|attribute| attribute.kind == kind).map(|attribute| attribute.value)
    }

    /// What the first attribute of this type holds.
    pub fn inner(self, kind: u16) -> Attributes<'a> {
        Attributes(self.get(kind).unwrap_or_default())
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let head = self.0.get(..ATTRIBUTE)?;
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let kind = u16::from_ne_bytes([head[2], head[3]]) & NLA_TYPE_MASK;
        let value = self.0.get(ATTRIBUTE..length)?;
        self.0 = self.0.get(padded(length)..).unwrap_or_default();
        Some(Attribute { kind, value })
    }
}

/// Where each next hop of a route begins (`struct rtnexthop`: length, flags, hops, and the link at 4).
pub fn hop_places(hops: &[u8]) -> Vec<usize> {
    const HOP: usize = 8;
    let (mut places, mut at) = (Vec::new(), 0);
    while let Some(hop) = hops.get(at..at + HOP) {
        places.push(at);
        at += padded(usize::from(u16::from_ne_bytes([hop[0], hop[1]])).max(HOP));
    }
    places
}

/// The number of 32 bits that the bytes begin with.
pub fn u32_of(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// The text of a value, up to its zero byte.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let request = Request::new(16, 4, &[7; 6])
            .text(3, "eth0")
            .nested(18, |inner| inner.text(1, "veth").u32(2, 9))
            .u32(4, 1500);
        let bytes = request.encode(1, 77);
        let message = &Message::split(&bytes)[..];
        let [message] = message else { panic!("{message:?}") };
        assert_eq!((message.kind, message.flags, message.sequence), (16, 5, 77));
        assert_eq!(message.family(), Some([7; 6]));
        let attributes = message.attributes(6);
        assert_eq!(attributes.count(), 3);
        assert_eq!(attributes.get(3).map(text).as_deref(), Some("eth0"));
        assert_eq!(attributes.inner(18).get(1).map(text).as_deref(), Some("veth"));
        assert_eq!(attributes.get(4).and_then(u32_of), Some(1500));
        assert_eq!(attributes.get(5), None);
    }

    #[test]
    fn next_hops_are_found_whatever_their_lengths_say() {
        let hop = |length: u16| [length.to_ne_bytes().to_vec(), vec![0; 6]].concat();
        assert_eq!(hop_places(&[hop(8), hop(8)].concat()), [0, 8]);
        assert_eq!(hop_places(&[hop(0), hop(0)].concat()), [0, 8]);
        assert_eq!(hop_places(&[hop(16), vec![0; 8], hop(8)].concat()), [0, 16]);
        assert_eq!(hop_places(&hop(u16::MAX)), [0]);
        assert_eq!(hop_places(&[1, 2, 3]), [0_usize; 0]);
    }

    #[test]
    fn lengths_that_lie_end_the_reading() {
        let good = Request::new(16, 0, &[]).u32(1, 1).encode(0, 1);
        for length in [0_u32, 3, 15, 25, u32::MAX] {
            let mut bytes = good.clone();
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(Message::split(&bytes), [], "{length}");
        }
        for length in [0_u8, 3, 9, 255] {
            assert_eq!(Attributes(&[length, 0, 1, 0, 1, 2, 3, 4]).count(), 0, "{length}");
        }
        for end in 0..good.len() {
            assert_eq!(Message::split(&good[..end]), [], "{end}");
        }
    }
}
