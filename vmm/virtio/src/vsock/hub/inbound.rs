//! The guest's packets: whose each is, and what is wrong with it.

use super::Hub;
use crate::{
    Memory,
    ring::{Chain, RingError, total},
    vsock::{
        DIAL_LIMIT, HOST_CID, RESET_LIMIT, STREAM_LIMIT,
        packet::{
            CREDIT_REQUEST, CREDIT_UPDATE, HEADER, Header, REQUEST, RESPONSE, RST, RW, SHUTDOWN, STREAM,
        },
        stream::{Fault, Phase, Ports},
    },
};

impl Hub {
    /// Whether a packet of the guest's can be taken: it may cost a refusal.
    pub(in crate::vsock) fn has_room(&self) -> bool {
        self.resets.len() < RESET_LIMIT
    }

    /// Takes a packet of the guest's.
    pub(in crate::vsock) fn take(&mut self, memory: &Memory, chain: &Chain) -> Result<(), RingError> {
        self.metrics.packets_from_guest.increment();
        let mut bytes = [0; HEADER];
        let present = chain.read(memory, 0, &mut bytes)?;
        let header = Header::parse(&bytes);
        let carried = total(&chain.readable).saturating_sub(HEADER as u64);
        if present < HEADER || u64::from(header.len) > carried {
            self.metrics.malformed.increment();
            return Ok(());
        }
        if header.src_cid != self.cid {
            self.metrics.wrong_source.increment();
            return Ok(());
        }
        let refused = if header.dst_cid != HOST_CID {
            Some(&self.metrics.wrong_destination)
        } else if header.kind != STREAM {
            Some(&self.metrics.wrong_type)
        } else {
            None
        };
        if let Some(counter) = refused {
            counter.increment();
            self.refuse(&header);
            return Ok(());
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        match self.names.get(&ports).copied() {
            Some(name) => self.take_known(name, &header, memory, chain)?,
            None => self.take_unknown(ports, &header),
        }
        Ok(())
    }

    /// Answers a packet with a RST, unless it is one.
    fn refuse(&mut self, header: &Header) {
        if header.op != RST {
            self.resets.push_back(header.refusal());
        }
    }

    fn take_unknown(&mut self, ports: Ports, header: &Header) {
        match header.op {
            RST => self.metrics.resets_received.increment(),
            REQUEST => self.begin(ports, header),
            RESPONSE..=CREDIT_REQUEST => {
                self.metrics.unknown_connection.increment();
                self.refuse(header);
            }
            _ => {
                self.metrics.unknown_operation.increment();
                self.refuse(header);
            }
        }
    }

    /// The guest opens a connection.
    fn begin(&mut self, ports: Ports, header: &Header) {
        if self.streams.len() >= STREAM_LIMIT || self.dials.len() >= DIAL_LIMIT {
            self.metrics.crowded.increment();
            return self.refuse(header);
        }
        // Without a socket nothing fails.
        let Ok(name) = self.insert(ports, Phase::Dialing, None) else { return };
        self.names.insert(ports, name);
        if let Some(stream) = self.streams.get_mut(&name) {
            stream.learn_credit(header);
        }
        self.dials.insert(name);
        self.dialer.dial(name, ports.host);
    }

    fn take_known(
        &mut self,
        name: u64,
        header: &Header,
        memory: &Memory,
        chain: &Chain,
    ) -> Result<(), RingError> {
        let Some(stream) = self.streams.get_mut(&name) else { return Ok(()) };
        if header.op == RST {
            self.metrics.resets_received.increment();
            self.end(name);
            return Ok(());
        }
        if stream.phase == Phase::Dead {
            return Ok(()); // It crossed the RST.
        }
        stream.learn_credit(header);
        let connected = stream.phase == Phase::Open;
        let outcome = match header.op {
            RESPONSE => stream.accepted().inspect(|()| self.metrics.host_connections.increment()),
            SHUTDOWN if connected => {
                stream.guest_shutdown(header.flags);
                Ok(())
            }
            SHUTDOWN if stream.phase == Phase::Dialing => {
                self.end(name);
                return Ok(());
            }
            RW => {
                let outcome = stream.receive(memory, chain, header.len)?;
                if outcome.is_ok() {
                    self.metrics.bytes_from_guest.add(u64::from(header.len));
                }
                outcome
            }
            CREDIT_UPDATE if connected => Ok(()),
            CREDIT_REQUEST if connected => {
                stream.owe_credit();
                Ok(())
            }
            REQUEST..=CREDIT_REQUEST => Err(Fault::Unexpected),
            _ => {
                self.metrics.unknown_operation.increment();
                stream.kill();
                Ok(())
            }
        };
        if let Err(fault) = outcome {
            match fault {
                Fault::Unexpected => self.metrics.unexpected.increment(),
                Fault::Credit => self.metrics.credit_violations.increment(),
            }
            stream.kill();
        }
        self.serve(name);
        Ok(())
    }

    /// The guest's end is gone.
    fn end(&mut self, name: u64) {
        let Some(stream) = self.streams.get_mut(&name) else { return };
        let ports = stream.ports;
        if stream.drain() {
            self.forget_ports(ports, name);
        } else {
            self.remove(name);
        }
    }
}
