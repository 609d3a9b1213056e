//! Serves the rings.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
};

use super::{Metrics, PIECE, REQUEST_LIMIT, TURN};
use crate::ring::{Chain, Ring, RingError, total};

/// Where bytes for the guest come from.
pub(super) struct Input {
    pub(super) file: File,
    /// Nothing comes any more. The file stays open for as long as the event loop knows its number.
    ended: bool,
}

impl Input {
    /// Sets O_NONBLOCK. The standard library does so for sockets only, but by a call (FIONBIO) that every
    /// kind of file has.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let file = UnixStream::from(OwnedFd::from(file));
        file.set_nonblocking(true)?;
        Ok(Self { file: File::from(OwnedFd::from(file)), ended: false })
    }
}

pub(super) struct Worker {
    pub(super) receive: Ring,
    pub(super) transmit: Ring,
    pub(super) metrics: Arc<Metrics>,
}

impl Worker {
    /// Writes what the guest has sent, for one turn. Answers whether there is more.
    pub(super) fn transmit(&mut self, output: &mut dyn Write) -> Result<bool, RingError> {
        let mut requests = self.transmit.size();
        let mut bytes = 0;
        loop {
            self.transmit.disable_kicks()?;
            while requests > 0
                && bytes < TURN
                && let Some(chain) = self.transmit.pop()?
            {
                requests -= 1;
                bytes += total(&chain.readable).min(REQUEST_LIMIT);
                self.write(&chain, output)?;
                self.transmit.complete(chain.head, 0)?;
            }
            self.transmit.notify()?;
            if requests == 0 || bytes >= TURN {
                return Ok(true);
            }
            if !self.transmit.enable_kicks()? {
                return Ok(false);
            }
        }
    }

    /// Writes as much of a request as the output takes now.
    fn write(&self, chain: &Chain, output: &mut dyn Write) -> Result<(), RingError> {
        let all = total(&chain.readable);
        let mut piece = [0; PIECE];
        let mut done = 0;
        while done < all.min(REQUEST_LIMIT) {
            let n = chain.read(self.transmit.memory(), done, &mut piece)?;
            let written = self.offer(&piece[..n], output);
            done += written as u64;
            if written < n {
                break;
            }
        }
        self.metrics.written_bytes.add(done);
        self.metrics.dropped_bytes.add(all - done);
        Ok(())
    }

    /// Answers how many of the bytes the output took.
    fn offer(&self, bytes: &[u8], output: &mut dyn Write) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            match output.write(&bytes[done..]) {
                // An output that claims more than it was given has taken all of it.
                Ok(n) if n > 0 => done = bytes.len().min(done + n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                _ => {
                    self.metrics.failures.increment();
                    break;
                }
            }
        }
        done
    }

    /// Gives the guest what there is to read, for one turn. Answers whether there may be more.
    pub(super) fn receive(&mut self, mut input: Option<&mut Input>) -> Result<bool, RingError> {
        let mut bytes = 0;
        let mut requests = self.receive.size();
        loop {
            // Without an input, or with room that waits for it, nobody needs to be told of more room.
            self.receive.disable_kicks()?;
            let Some(input) = input.as_mut().filter(|input| !input.ended) else { return Ok(false) };
            while requests > 0
                && bytes < TURN
                && let Some(chain) = self.receive.pop()?
            {
                requests -= 1;
                match self.read(&chain, &mut input.file) {
                    Ok(piece) => {
                        let written = chain.write(self.receive.memory(), 0, &piece)?;
                        bytes += written as u64;
                        self.metrics.read_bytes.add(written as u64);
                        self.receive.complete(chain.head, written as u32)?;
                    }
                    Err(end) => {
                        self.receive.unpop();
                        self.receive.notify()?;
                        input.ended = end;
                        return Ok(false);
                    }
                }
            }
            self.receive.notify()?;
            if requests == 0 || bytes >= TURN {
                return Ok(true);
            }
            if !self.receive.enable_kicks()? {
                return Ok(false);
            }
        }
    }

    /// Reads as much as a request has room for, or not at all: then, whether the input is at its end.
    fn read(&self, chain: &Chain, input: &mut File) -> Result<Vec<u8>, bool> {
        let room = usize::try_from(total(&chain.writable)).unwrap_or(PIECE).min(PIECE);
        let mut piece = vec![0; room];
        if room == 0 {
            return Ok(piece);
        }
        loop {
            match input.read(&mut piece) {
                Ok(0) => return Err(true),
                Ok(n) => {
                    piece.truncate(n);
                    return Ok(piece);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(false),
                // A terminal nobody has open (EIO) is an error now, and an input again later.
                Err(_) => {
                    self.metrics.failures.increment();
                    return Err(false);
                }
            }
        }
    }
}
