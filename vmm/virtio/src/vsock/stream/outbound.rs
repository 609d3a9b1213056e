//! The guest's side of a connection: which packet is next.

use std::io::ErrorKind;

use super::{Phase, Stream};
use crate::{
    Memory,
    ring::{Chain, RingError, total},
    vsock::{
        HOST_CID, PACKET_LIMIT,
        packet::{
            CREDIT_REQUEST, CREDIT_UPDATE, HEADER, Header, RST, RW, SHUTDOWN, SHUTDOWN_RECEIVE,
            SHUTDOWN_SEND, STREAM,
        },
        transfer,
    },
};

impl Stream {
    /// Whether a buffer of the guest's would be of use.
    pub(in crate::vsock) fn wants_buffer(&self) -> bool {
        match self.phase {
            Phase::Dead => true,
            Phase::Greeting(_) | Phase::Dialing | Phase::Draining => false,
            Phase::Requested => self.opening.is_some(),
            Phase::Open => {
                self.opening.is_some()
                    || self.update_owed
                    || self.may_read() && (self.credit() > 0 || !self.credit_asked)
                    || self.shutdown_owed()
            }
        }
    }

    fn may_read(&self) -> bool {
        self.socket.is_some() && self.readable && !self.host_ended && !self.guest_deaf
    }

    fn shutdown_flags(&self) -> u32 {
        let send = if self.host_ended { SHUTDOWN_SEND } else { 0 };
        send | if self.host_deaf { SHUTDOWN_RECEIVE } else { 0 }
    }

    fn shutdown_owed(&self) -> bool {
        self.shutdown_flags() & !self.shutdown_told != 0
    }

    /// Writes the next packet for the guest into `chain`, which has room for a header and more.
    /// Answers the packet's length; `None` if there is none after all.
    pub(in crate::vsock) fn fill(
        &mut self,
        cid: u64,
        memory: &Memory,
        chain: &Chain,
    ) -> Result<Option<u32>, RingError> {
        let Some((op, flags, len)) = self.next_packet(memory, chain)? else { return Ok(None) };
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: STREAM,
            op,
            flags,
            buf_alloc: self.window,
            fwd_cnt: self.forwarded,
        };
        chain.write(memory, 0, &header.bytes())?;
        self.told = self.forwarded;
        self.update_owed = false;
        Ok(Some(HEADER as u32 + len))
    }

    /// Operation, flags and length of the next packet; data is in its place in the chain already.
    fn next_packet(&mut self, memory: &Memory, chain: &Chain) -> Result<Option<(u16, u32, u32)>, RingError> {
        match self.phase {
            Phase::Dead => return Ok(Some((RST, 0, 0))),
            Phase::Requested | Phase::Open => {}
            Phase::Greeting(_) | Phase::Dialing | Phase::Draining => return Ok(None),
        }
        if let Some(op) = self.opening.take() {
            return Ok(Some((op, 0, 0)));
        }
        if self.phase == Phase::Requested {
            return Ok(None);
        }
        if let Some(len) = self.read_host(memory, chain)? {
            return Ok(Some((RW, 0, len)));
        }
        if self.shutdown_owed() {
            self.shutdown_told = self.shutdown_flags();
            return Ok(Some((SHUTDOWN, self.shutdown_told, 0)));
        }
        if self.update_owed {
            return Ok(Some((CREDIT_UPDATE, 0, 0)));
        }
        if self.may_read() && self.credit() == 0 && !self.credit_asked {
            self.credit_asked = true;
            return Ok(Some((CREDIT_REQUEST, 0, 0)));
        }
        Ok(None)
    }

    /// Reads from the host behind the place of the header, as much as fits and the guest has room for.
    fn read_host(&mut self, memory: &Memory, chain: &Chain) -> Result<Option<u32>, RingError> {
        let room = total(&chain.writable).saturating_sub(HEADER as u64);
        let limit = room.min(u64::from(self.credit())).min(PACKET_LIMIT);
        let Some(watched) = self.socket.as_ref().filter(|_| limit > 0 && self.may_read()) else {
            return Ok(None);
        };
        match transfer::from_host(&watched.socket, memory, &chain.writable, HEADER as u64, limit)? {
            Ok(0) => self.host_ended = true,
            Ok(n) => {
                self.sent = self.sent.wrapping_add(n as u32);
                return Ok(Some(n as u32));
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => self.readable = false,
            // The host closed without having read everything.
            Err(_) => (self.host_ended, self.host_deaf) = (true, true),
        }
        self.settle();
        Ok(None)
    }
}
