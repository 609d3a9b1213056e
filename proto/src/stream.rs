//! The preface: the first bytes that the guest writes on a vsock connection it has dialled.
//! Knows bytes only; sockets belong to the callers.
//!
//! Any process of the guest can dial the host, so a connection proves what it is by its preface:
//! the control connection by being the first and by its [`Hello`], a stdio stream by a token that the
//! shim drew at random and gave to the agent alone.
//!
//! ```text
//! stream port   magic "bhS1" (4)  token (16)                        then raw bytes, one direction
//! control port  magic "bhC1" (4)  length (4, big endian)  Hello     then ttrpc, the guest serving
//! ```

use serde::{Deserialize, Serialize};

/// First bytes on the stream port.
pub const STREAM_MAGIC: [u8; 4] = *b"bhS1";
/// First bytes on the control port.
pub const CONTROL_MAGIC: [u8; 4] = *b"bhC1";
/// Length of a [`Token`] in bytes.
pub const TOKEN_LEN: usize = 16;
/// Length of the preface of a stream in bytes.
pub const STREAM_PREFACE_LEN: usize = STREAM_MAGIC.len() + TOKEN_LEN;
/// Length of what comes before a [`Hello`]: magic and length, in bytes.
pub const HELLO_HEADER_LEN: usize = CONTROL_MAGIC.len() + 4;
/// The longest [`Hello`] that the host reads, in bytes.
pub const HELLO_MAX_LEN: usize = 4096;

/// Opens one stream, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub [u8; TOKEN_LEN]);

impl TryFrom<&[u8]> for Token {
    type Error = PrefaceError;
    fn try_from(bytes: &[u8]) -> Result<Self, PrefaceError> {
        bytes.try_into().map(Token).map_err(|_| PrefaceError::TokenLength { found: bytes.len() })
    }
}

/// What the agent says of itself when it dials.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::PROTOCOL_VERSION`] of the agent.
    pub protocol: u32,
    /// Version of the agent's package.
    pub agent: String,
    /// `uname -r` of the guest.
    pub kernel: String,
    /// Nanoseconds on the guest's monotonic clock, i.e. since its boot.
    pub uptime_nanos: u64,
}

/// Why a preface was not accepted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PrefaceError {
    /// The connection is not one of ours.
    #[error("unknown preface {found:02x?}")]
    Magic {
        /// The first bytes.
        found: [u8; 4],
    },
    /// A token of another length.
    #[error("a token has {TOKEN_LEN} bytes, this one has {found}")]
    TokenLength {
        /// Its length.
        found: usize,
    },
    /// A hello that no agent of ours writes.
    #[error("a hello has at most {HELLO_MAX_LEN} bytes, this one announces {found}")]
    HelloLength {
        /// The announced length.
        found: usize,
    },
    /// A hello that cannot be read.
    #[error("hello cannot be read: {0}")]
    HelloSyntax(String),
}

/// The bytes that open the stream of `token`.
pub fn encode_stream(token: &Token) -> [u8; STREAM_PREFACE_LEN] {
    let mut out = [0; STREAM_PREFACE_LEN];
    out[..4].copy_from_slice(&STREAM_MAGIC);
    out[4..].copy_from_slice(&token.0);
    out
}

/// Reads the preface of a stream.
pub fn decode_stream(bytes: &[u8; STREAM_PREFACE_LEN]) -> Result<Token, PrefaceError> {
    check_magic(bytes, STREAM_MAGIC)?;
    Token::try_from(&bytes[4..])
}

/// The bytes that open the control connection.
pub fn encode_hello(hello: &Hello) -> Vec<u8> {
    let body = serde_json::to_vec(hello).expect("a hello is plain data");
    let mut out = CONTROL_MAGIC.to_vec();
    out.extend((body.len() as u32).to_be_bytes());
    out.extend(body);
    out
}

/// Reads what comes before a hello and answers the length of its body.
pub fn decode_hello_header(bytes: &[u8; HELLO_HEADER_LEN]) -> Result<usize, PrefaceError> {
    check_magic(bytes, CONTROL_MAGIC)?;
    let found = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
    if found > HELLO_MAX_LEN {
        return Err(PrefaceError::HelloLength { found });
    }
    Ok(found)
}

/// Reads the body of a hello.
pub fn decode_hello(body: &[u8]) -> Result<Hello, PrefaceError> {
    serde_json::from_slice(body).map_err(|e| PrefaceError::HelloSyntax(e.to_string()))
}

fn check_magic(bytes: &[u8], wanted: [u8; 4]) -> Result<(), PrefaceError> {
    let found = [bytes[0], bytes[1], bytes[2], bytes[3]];
    if found == wanted { Ok(()) } else { Err(PrefaceError::Magic { found }) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_stream_preface_survives_the_wire(token: [u8; TOKEN_LEN]) {
            prop_assert_eq!(decode_stream(&encode_stream(&Token(token))), Ok(Token(token)));
        }

        #[test]
        fn a_hello_survives_the_wire(protocol: u32, agent: String, kernel: String, uptime_nanos: u64) {
            let hello = Hello { protocol, agent, kernel, uptime_nanos };
            let bytes = encode_hello(&hello);
            if bytes.len() <= HELLO_HEADER_LEN + HELLO_MAX_LEN {
                let len = decode_hello_header(bytes[..HELLO_HEADER_LEN].try_into().unwrap()).unwrap();
                prop_assert_eq!(len, bytes.len() - HELLO_HEADER_LEN);
                prop_assert_eq!(decode_hello(&bytes[HELLO_HEADER_LEN..]), Ok(hello));
            }
        }

        #[test]
        fn any_bytes_are_refused_without_panic(bytes: [u8; STREAM_PREFACE_LEN], body: Vec<u8>) {
            let _ = decode_stream(&bytes);
            let _ = decode_hello_header(bytes[..HELLO_HEADER_LEN].try_into().unwrap());
            let _ = decode_hello(&body);
        }
    }

    #[test]
    fn a_control_connection_is_no_stream() {
        let mut bytes = encode_stream(&Token([7; TOKEN_LEN]));
        bytes[..4].copy_from_slice(&CONTROL_MAGIC);
        assert_eq!(decode_stream(&bytes), Err(PrefaceError::Magic { found: CONTROL_MAGIC }));
    }

    #[test]
    fn a_hello_longer_than_the_limit_is_refused_by_its_header() {
        let mut header = [0; HELLO_HEADER_LEN];
        header[..4].copy_from_slice(&CONTROL_MAGIC);
        header[4..].copy_from_slice(&(HELLO_MAX_LEN as u32 + 1).to_be_bytes());
        assert_eq!(decode_hello_header(&header), Err(PrefaceError::HelloLength { found: HELLO_MAX_LEN + 1 }));
    }
}
