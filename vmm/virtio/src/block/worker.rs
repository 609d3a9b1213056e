//! Takes requests from the ring, keeps them in flight, and answers them.

use std::{io, sync::Arc};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use vm_memory::{Bytes, GuestAddress};

use super::{
    Metrics, SERIAL_BYTES,
    io::{Done, Engine, Job},
    request::{Fault, Kind, Limits, Work, parse},
};
use crate::ring::{Chain, Ring, RingError};

/// The most bytes of one turn where each request is done as it is taken: the loop has other devices.
const TURN_BYTES: u64 = 8 << 20;

/// What is to be known of a request in flight to answer it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token {
    head: u16,
    status: GuestAddress,
    kind: Kind,
    /// It is to be made durable before it is answered.
    sync: bool,
}

/// Why the worker cannot go on.
#[derive(Debug)]
pub(super) enum Broken {
    /// The driver's doing.
    Ring,
    /// The kernel no longer takes jobs.
    Engine,
}

impl From<RingError> for Broken {
    fn from(_: RingError) -> Self {
        Self::Ring
    }
}

impl From<io::Error> for Broken {
    fn from(_: io::Error) -> Self {
        Self::Engine
    }
}

pub(super) struct Worker {
    pub(super) ring: Ring,
    pub(super) features: u64,
    pub(super) metrics: Arc<Metrics>,
}

impl Worker {
    /// Takes what the driver has offered, at most one ring's worth, and answers what is done. Answers
    /// whether it wants another turn; what is in flight announces itself.
    pub(super) fn run(
        &mut self,
        engine: &mut Engine<Token>,
        limits: Limits,
        serial: &[u8; SERIAL_BYTES],
    ) -> Result<bool, Broken> {
        let limits = Limits { features: self.features, ..limits };
        let (mut requests, mut bytes) = (self.ring.size(), TURN_BYTES);
        let again = loop {
            self.ring.disable_kicks()?;
            let full = loop {
                if requests == 0 || bytes == 0 || !engine.has_room() {
                    break true;
                }
                let Some(chain) = self.ring.pop()? else { break false };
                requests -= 1;
                let taken = self.take(&chain, engine, &limits, serial)?;
                if !engine.is_uring() {
                    bytes = bytes.saturating_sub(taken);
                }
            };
            if full {
                if !engine.has_room() {
                    self.metrics.full.increment();
                }
                // Without room the next job that is done brings the next turn.
                break engine.has_room();
            }
            if !self.ring.enable_kicks()? {
                break false;
            }
        };
        let submitted = self.submit(engine)?;
        self.reap(engine)?;
        Ok(again || !submitted)
    }

    /// Answers what is done. Answers whether everything that was begun is with the kernel.
    pub(super) fn reap(&mut self, engine: &mut Engine<Token>) -> Result<bool, Broken> {
        while let Some(done) = engine.next_done() {
            self.follow(done, engine)?;
        }
        // Some of it may have begun a next step.
        let submitted = self.submit(engine)?;
        self.ring.notify()?;
        Ok(submitted)
    }

    fn submit(&mut self, engine: &mut Engine<Token>) -> Result<bool, Broken> {
        let submitted = engine.submit()?;
        if !submitted {
            self.metrics.retries.increment();
        }
        Ok(submitted)
    }

    /// Begins a request, or answers it. Answers how many bytes it moves.
    fn take(
        &mut self,
        chain: &Chain,
        engine: &mut Engine<Token>,
        limits: &Limits,
        serial: &[u8; SERIAL_BYTES],
    ) -> Result<u64, Broken> {
        let Some(request) = parse(chain, self.ring.memory(), limits) else {
            self.metrics.no_status.increment();
            self.metrics.requests.increment();
            self.ring.complete(chain.head, 0)?;
            return Ok(0);
        };
        match request.work {
            Err(fault) => {
                self.count(fault);
                self.answer(chain.head, request.status, fault.status(), 0)?;
                Ok(0)
            }
            Ok(Work::Identify) => {
                chain.write(self.ring.memory(), 0, serial)?;
                let written = SERIAL_BYTES as u32;
                self.answer(chain.head, request.status, VIRTIO_BLK_S_OK as u8, written)?;
                Ok(0)
            }
            Ok(Work::File(kind, job)) => {
                // 5.2.6.2: without FLUSH the driver cannot ask, so what it writes is durable when answered.
                let sync = self.features & 1 << VIRTIO_BLK_F_FLUSH == 0
                    && matches!(kind, Kind::Write(_) | Kind::Discard | Kind::Zero);
                let token = Token { head: chain.head, status: request.status, kind, sync };
                let bytes = match &job {
                    Job::Read { buffers, .. } | Job::Write { buffers, .. } => buffers.len(),
                    _ => 0,
                };
                if let Some(done) = engine.start(job, token) {
                    self.follow(done, engine)?;
                }
                Ok(bytes)
            }
        }
    }

    /// Goes on with a request whose job is done, to its next job or its answer.
    fn follow(&mut self, done: Done<Token>, engine: &mut Engine<Token>) -> Result<(), Broken> {
        let mut next = Some(done);
        while let Some(Done { mut token, mut job, result }) = next.take() {
            let outcome = match result.map(|n| (n, job.advance(n))) {
                Err(error) => Err(error),
                // The file has become shorter than the disk was said to be.
                Ok((0, left)) if left > 0 => Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((_, left)) if left > 0 => Ok(Some(job)),
                Ok(_) if token.sync => {
                    token.sync = false;
                    self.metrics.flushes.increment();
                    Ok(Some(Job::Sync))
                }
                Ok(_) => Ok(None),
            };
            match outcome {
                Ok(Some(job)) => next = engine.start(job, token),
                Ok(None) => self.succeed(token)?,
                Err(error) => self.refuse(token, &error)?,
            }
        }
        Ok(())
    }

    fn succeed(&mut self, token: Token) -> Result<(), Broken> {
        let metrics = &self.metrics;
        let written = match token.kind {
            Kind::Read(bytes) => {
                metrics.read_bytes.add(bytes.into());
                bytes
            }
            Kind::Write(bytes) => {
                metrics.written_bytes.add(bytes.into());
                0
            }
            Kind::Flush => {
                metrics.flushes.increment();
                0
            }
            Kind::Discard => {
                metrics.discards.increment();
                0
            }
            Kind::Zero => {
                metrics.zeroed.increment();
                0
            }
        };
        self.answer(token.head, token.status, VIRTIO_BLK_S_OK as u8, written)
    }

    fn refuse(&mut self, token: Token, error: &io::Error) -> Result<(), Broken> {
        let hole = matches!(token.kind, Kind::Discard | Kind::Zero);
        if hole && error.raw_os_error() == Some(libc::EOPNOTSUPP) {
            // A file system has the one and not the other (tmpfs cannot zero in place): a driver then
            // writes zeros by itself.
            self.metrics.unsupported.increment();
            return self.answer(token.head, token.status, VIRTIO_BLK_S_UNSUPP as u8, 0);
        }
        self.metrics.io_errors.increment();
        self.answer(token.head, token.status, VIRTIO_BLK_S_IOERR as u8, 0)
    }

    /// Writes the status, and gives the chain back with `data` bytes before it.
    fn answer(&mut self, head: u16, at: GuestAddress, status: u8, data: u32) -> Result<(), Broken> {
        self.ring.memory().write_obj(status, at).map_err(|_| RingError::Chain)?;
        self.metrics.requests.increment();
        // Drivers look at the length of what succeeded only; of the rest it says that there is a status.
        let written = if status == VIRTIO_BLK_S_OK as u8 { data + 1 } else { 1 };
        Ok(self.ring.complete(head, written)?)
    }

    fn count(&self, fault: Fault) {
        let metrics = &self.metrics;
        match fault {
            Fault::Malformed => metrics.malformed.increment(),
            Fault::OutOfRange => metrics.out_of_range.increment(),
            Fault::Oversized => metrics.oversized.increment(),
            Fault::ReadOnly => metrics.read_only.increment(),
            Fault::Unsupported => metrics.unsupported.increment(),
        }
    }
}
