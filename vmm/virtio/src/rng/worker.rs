//! Serves the ring.

use std::{io, sync::Arc};

use super::{Metrics, REQUEST_LIMIT};
use crate::ring::{Ring, RingError, total};

/// Fills a buffer from the host's kernel.
pub(super) type Source = fn(&mut [u8]) -> io::Result<()>;

pub(super) struct Worker {
    pub(super) ring: Ring,
    pub(super) source: Source,
    pub(super) metrics: Arc<Metrics>,
}

impl Worker {
    /// Serves what the driver has offered, at most one ring's worth: a driver that never stops must not
    /// keep the loop from other devices. Answers whether there is more.
    pub(super) fn run(&mut self) -> Result<bool, RingError> {
        let mut buffer = [0; REQUEST_LIMIT];
        let mut budget = self.ring.size();
        loop {
            self.ring.disable_kicks()?;
            while budget > 0
                && let Some(chain) = self.ring.pop()?
            {
                budget -= 1;
                let wanted = usize::try_from(total(&chain.writable)).unwrap_or(usize::MAX);
                let bytes = &mut buffer[..wanted.min(REQUEST_LIMIT)];
                if bytes.is_empty() {
                    self.metrics.empty.increment();
                }
                // Without entropy the request is answered as empty: a driver asks again, nobody waits.
                let written = match (self.source)(bytes) {
                    Ok(()) => chain.write(self.ring.memory(), 0, bytes)?,
                    Err(_) => 0,
                };
                self.metrics.requests.increment();
                self.metrics.bytes.add(written as u64);
                self.ring.complete(chain.head, written as u32)?;
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
}
