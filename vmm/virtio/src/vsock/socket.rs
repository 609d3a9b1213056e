//! The host's end of a connection: its place in the epoll set, and its first line.

use std::{
    io::{self, ErrorKind, Read},
    net::Shutdown,
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::Arc,
};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// The longest first line of the host's: `CONNECT 4294967295` and its end.
const GREETING_LIMIT: usize = 19;

/// A socket in the device's epoll set, edge-triggered; dropped, it leaves the set and is closed.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) socket: UnixStream,
    epoll: Arc<Epoll>,
}

impl Watched {
    pub(super) fn new(socket: UnixStream, epoll: Arc<Epoll>, id: u64) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        epoll.ctl(ControlOperation::Add, socket.as_raw_fd(), EpollEvent::new(events, id))?;
        Ok(Self { socket, epoll })
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // Closing alone does neither while whoever passed the socket in still holds it.
        let _ = self.epoll.ctl(ControlOperation::Delete, self.socket.as_raw_fd(), EpollEvent::default());
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// Reads a line `CONNECT <port>` byte by byte: what follows it is for the guest. `line` is what came so
/// far. Answers the port once the line is whole; an error closes the connection.
pub(super) fn read_greeting(mut socket: &UnixStream, line: &mut Vec<u8>) -> io::Result<Option<u32>> {
    let mut byte = [0];
    loop {
        match socket.read(&mut byte) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) if byte[0] == b'\n' => break,
            Ok(_) if line.len() == GREETING_LIMIT => return Err(ErrorKind::InvalidData.into()),
            Ok(_) => line.push(byte[0]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e),
        }
    }
    parse_greeting(line).map(Some).ok_or_else(|| ErrorKind::InvalidData.into())
}

/// The port in `CONNECT <port>`.
fn parse_greeting(line: &[u8]) -> Option<u32> {
    let port = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?;
    // Digits alone: parse() takes a sign, too.
    if port.bytes().all(|b| b.is_ascii_digit()) { port.parse().ok() } else { None }
}
