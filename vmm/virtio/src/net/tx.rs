//! What the guest sends: from its buffers to the tap.

use std::{io, os::fd::RawFd, sync::Arc};

use super::{ETHERNET, FRAME_LIMIT, HEADER, Metrics};
use crate::{
    buffers::Buffers,
    ring::{Chain, Ring, RingError, total},
};

pub(super) struct Tx {
    pub(super) ring: Ring,
    /// The tap had no room: it says when it has.
    pub(super) blocked: bool,
    pub(super) metrics: Arc<Metrics>,
}

impl Tx {
    /// Sends what the driver has offered, at most one ring's worth. Answers whether there is more.
    pub(super) fn run(&mut self, tap: RawFd) -> Result<bool, RingError> {
        let mut budget = self.ring.size();
        self.blocked = false;
        loop {
            self.ring.disable_kicks()?;
            while budget > 0
                && let Some(chain) = self.ring.pop()?
            {
                budget -= 1;
                if !self.send(&chain, tap) {
                    self.ring.unpop();
                    self.blocked = true;
                    self.metrics.tx_blocked.increment();
                    self.ring.notify()?;
                    return Ok(false);
                }
                self.ring.complete(chain.head, 0)?;
            }
            self.ring.notify()?;
            if budget == 0 {
                return Ok(true);
            }
            if !self.ring.enable_kicks()? {
                return Ok(false);
            }
        }
    }

    /// Sends one frame, or drops it. `false`: the tap has no room for it now.
    fn send(&self, chain: &Chain, tap: RawFd) -> bool {
        let bytes = total(&chain.readable);
        let metrics = &self.metrics;
        if bytes > FRAME_LIMIT as u64 {
            metrics.tx_oversized.increment();
            return true;
        }
        let whole = bytes >= (HEADER + ETHERNET) as u64 && chain.writable.is_empty();
        // A frame in more pieces than a call takes is none.
        let frame = Buffers::new(self.ring.memory(), &chain.readable, 0, bytes).filter(|_| whole);
        let Some(frame) = frame else {
            metrics.tx_malformed.increment();
            return true;
        };
        match frame.write_to(tap) {
            Ok(_) => {
                metrics.tx_frames.increment();
                metrics.tx_bytes.add(bytes);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            // A header that lies (EINVAL), a tap that is down (EIO): the frame is lost, as on a wire.
            Err(_) => metrics.tx_refused.increment(),
        }
        true
    }
}
