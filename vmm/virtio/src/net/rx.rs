//! What the guest gets: from the tap to its buffers.
//!
//! Buffers are taken from the ring ahead, as many as the largest frame needs, and held until frames fill
//! them. **What is held is always what was popped last, in order**: so a pause can put it back.

use std::{collections::VecDeque, io, ops::Range, os::fd::RawFd, sync::Arc};

use super::{FRAME_LIMIT, HEADER, Metrics, NUM_BUFFERS};
use crate::{
    buffers::{Buffers, IOVECS_LIMIT},
    ring::{Chain, Ring, RingError, total},
};

/// The most pieces of memory held ahead, one less than a call takes: the last one is the scratch buffer.
const PIECES: usize = IOVECS_LIMIT - 1;
/// The most frames of one turn of the loop.
const TURN: u32 = 256;

pub(super) struct Rx {
    ring: Ring,
    /// MRG_RXBUF: a frame may go on in the next chain.
    merge: bool,
    /// Bytes of the largest frame to expect: so much is held ahead.
    ahead: u64,
    held: VecDeque<Chain>,
    /// Bytes and pieces of what is held.
    room: u64,
    pieces: usize,
    /// Holds the end of a frame that what was held had no room for.
    scratch: Box<[u8]>,
    /// A frame that fills everything held and goes on in `scratch`.
    pending: Option<Pending>,
    metrics: Arc<Metrics>,
}

/// The frame that waits for more buffers.
struct Pending {
    /// All of its bytes.
    bytes: u64,
    /// What of them is still in the scratch buffer.
    rest: Range<usize>,
}

/// Why no more frames are taken for now.
enum Wait {
    /// The driver offers no buffers.
    Buffers,
    /// The tap has no frame.
    Frames,
    /// It is somebody else's turn.
    Turn,
}

impl Rx {
    pub(super) fn new(ring: Ring, merge: bool, ahead: usize, metrics: Arc<Metrics>) -> Self {
        Self {
            ring,
            merge,
            // Without merging a frame has one chain, whatever its size.
            ahead: if merge { ahead as u64 } else { 1 },
            held: VecDeque::new(),
            room: 0,
            pieces: 0,
            // One byte more than a frame can have: a longer one shows.
            scratch: vec![0; FRAME_LIMIT + 64].into(),
            pending: None,
            metrics,
        }
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Hands frames to the guest while there are some, and buffers for them. Answers whether it wants
    /// another turn.
    pub(super) fn run(&mut self, tap: RawFd) -> Result<bool, RingError> {
        let mut turn = TURN;
        loop {
            self.ring.disable_kicks()?;
            let wait = self.serve(tap, &mut turn)?;
            self.ring.notify()?;
            match wait {
                Wait::Turn => return Ok(true),
                // The tap is watched for the next one.
                Wait::Frames => return Ok(false),
                Wait::Buffers if self.ring.enable_kicks()? => {}
                Wait::Buffers => return Ok(false),
            }
        }
    }

    fn serve(&mut self, tap: RawFd, turn: &mut u32) -> Result<Wait, RingError> {
        loop {
            if *turn == 0 {
                return Ok(Wait::Turn);
            }
            *turn -= 1;
            if let Some(pending) = self.pending.take() {
                if !self.go_on(pending)? {
                    return Ok(Wait::Buffers);
                }
                continue;
            }
            self.hold_ahead(turn)?;
            if self.held.is_empty() {
                return Ok(if *turn == 0 { Wait::Turn } else { Wait::Buffers });
            }
            if !self.frame(tap)? {
                return Ok(Wait::Frames);
            }
        }
    }

    /// Takes buffers until a frame of any size has room. Stops before one that cannot be a buffer, and
    /// throws it out only when nothing is held, because what is held stays in order.
    fn hold_ahead(&mut self, turn: &mut u32) -> Result<(), RingError> {
        while self.room < self.ahead && self.pieces < PIECES {
            let Some(chain) = self.ring.pop()? else { break };
            if self.pieces + chain.writable.len() <= PIECES && is_buffer(&chain) {
                self.hold(chain);
                continue;
            }
            if !self.held.is_empty() {
                self.ring.unpop();
                break;
            }
            self.metrics.rx_malformed.increment();
            self.ring.complete(chain.head, 0)?;
            *turn = turn.saturating_sub(1);
            if *turn == 0 {
                break;
            }
        }
        Ok(())
    }

    fn hold(&mut self, chain: Chain) {
        self.room += total(&chain.writable);
        self.pieces += chain.writable.len();
        self.held.push_back(chain);
    }

    /// Reads one frame. `false`: there is none.
    fn frame(&mut self, tap: RawFd) -> Result<bool, RingError> {
        let chains = if self.merge { self.held.len() } else { 1 };
        let spans = self.held.iter().take(chains).flat_map(|chain| &chain.writable);
        let room: u64 = spans.clone().map(|s| u64::from(s.len)).sum();
        let mut buffers = Buffers::new(self.ring.memory(), spans, 0, room).ok_or(RingError::Memory)?;
        let bytes = match buffers.read_from(tap, &mut self.scratch) {
            Ok(bytes) => bytes as u64,
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    self.metrics.rx_errors.increment();
                }
                return Ok(false);
            }
        };
        if bytes < HEADER as u64 {
            self.metrics.rx_errors.increment();
        } else if bytes <= room {
            self.finish(bytes)?;
        } else {
            let rest = (bytes - room) as usize;
            if self.merge && bytes <= FRAME_LIMIT as u64 + 4 && rest < self.scratch.len() {
                // With a VLAN tag of 4 bytes, which the limit does not count.
                self.pending = Some(Pending { bytes, rest: 0..rest });
            } else {
                self.metrics.rx_too_small.increment();
            }
        }
        Ok(true)
    }

    /// Goes on with a frame in the chains that have come since. `false`: they do not suffice yet.
    fn go_on(&mut self, mut pending: Pending) -> Result<bool, RingError> {
        while !pending.rest.is_empty() {
            let Some(chain) = self.ring.pop()? else {
                self.pending = Some(pending);
                return Ok(false);
            };
            if !is_buffer(&chain) {
                // The frame is lost; what is held serves the next ones, and then this comes again.
                self.ring.unpop();
                self.metrics.rx_too_small.increment();
                return Ok(true);
            }
            pending.rest.start += chain.write(self.ring.memory(), 0, &self.scratch[pending.rest.clone()])?;
            self.hold(chain);
        }
        self.finish(pending.bytes)?;
        Ok(true)
    }

    /// Gives back the chains that a frame of `bytes` fills.
    fn finish(&mut self, bytes: u64) -> Result<(), RingError> {
        let mut left = bytes;
        let used = self.held.iter().map_while(|chain| {
            let n = left.min(total(&chain.writable));
            left -= n;
            (n > 0).then_some((chain.head, n as u32))
        });
        let used: Vec<_> = used.collect();
        if let Some(first) = self.held.front() {
            // The tap leaves it out. 5.1.6.4: without merging it is 1.
            first.write(self.ring.memory(), NUM_BUFFERS, &(used.len() as u16).to_le_bytes())?;
        }
        for chain in self.held.drain(..used.len()) {
            self.room -= total(&chain.writable);
            self.pieces -= chain.writable.len();
        }
        self.metrics.rx_frames.increment();
        self.metrics.rx_bytes.add(bytes);
        self.ring.complete_together(&used)
    }

    /// Puts everything back that is held: the ring then stands where its driver thinks.
    pub(super) fn put_back(&mut self) {
        for _ in self.held.drain(..) {
            self.ring.unpop();
        }
        (self.room, self.pieces) = (0, 0);
        if self.pending.take().is_some() {
            self.metrics.rx_dropped.increment();
        }
    }
}

/// Whether a chain can hold a frame's beginning, and nothing was written to it.
fn is_buffer(chain: &Chain) -> bool {
    chain.readable.is_empty() && total(&chain.writable) >= HEADER as u64 && chain.writable.len() <= PIECES
}
