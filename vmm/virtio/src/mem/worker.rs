//! Serves the ring.

use std::sync::Arc;

use super::{
    Backing, Metrics, TURN,
    window::{REQUEST, Refusal, Request, Step, Window},
};
use crate::ring::{Chain, Ring, RingError};

/// Bytes of an answer: its type, padding, and the state of blocks where that was asked for.
const ANSWER: usize = 10;
/// VIRTIO_MEM_RESP_ACK
const ACK: u16 = 0;
/// VIRTIO_MEM_RESP_NACK
const NACK: u16 = 1;
/// VIRTIO_MEM_RESP_BUSY
const BUSY: u16 = 2;
/// VIRTIO_MEM_RESP_ERROR
const ERROR: u16 = 3;

pub(super) struct Worker {
    pub(super) ring: Ring,
    pub(super) metrics: Arc<Metrics>,
}

impl Worker {
    /// Serves what the driver has offered, for one turn. Answers whether there is more.
    pub(super) fn run(&mut self, window: &mut Window, backing: &mut dyn Backing) -> Result<bool, RingError> {
        let mut budget = TURN;
        loop {
            self.ring.disable_kicks()?;
            while budget > 0
                && let Some(chain) = self.ring.pop()?
            {
                budget -= 1;
                let answer = self.answer(&chain, window, backing)?;
                let written = chain.write(self.ring.memory(), 0, &answer)?;
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

    fn answer(
        &self,
        chain: &Chain,
        window: &mut Window,
        backing: &mut dyn Backing,
    ) -> Result<[u8; ANSWER], RingError> {
        let mut bytes = [0; REQUEST];
        let read = chain.read(self.ring.memory(), 0, &mut bytes)?;
        // Nothing is done for who cannot be told about it.
        let readable = read == REQUEST && crate::ring::total(&chain.writable) >= ANSWER as u64;
        let request = Request::parse(&bytes).filter(|_| readable);
        let (kind, state) = match request {
            Some(request) => self.perform(request, window, backing),
            None => (ERROR, 0),
        };
        let counter = match (kind, request) {
            (NACK, _) => &self.metrics.refused,
            (BUSY, _) => &self.metrics.busy,
            (ACK, Some(Request::Plug { .. })) => &self.metrics.plugs,
            (ACK, Some(Request::Unplug { .. } | Request::UnplugAll)) => &self.metrics.unplugs,
            (ACK, Some(Request::State { .. })) => &self.metrics.queries,
            _ => &self.metrics.errors,
        };
        counter.increment();
        let mut answer = [0; ANSWER];
        answer[..2].copy_from_slice(&kind.to_le_bytes());
        answer[8..].copy_from_slice(&state.to_le_bytes());
        Ok(answer)
    }

    /// Answers the type of the answer, and the state of the blocks.
    fn perform(&self, request: Request, window: &mut Window, backing: &mut dyn Backing) -> (u16, u16) {
        let step = match window.decide(request) {
            Ok(step) => step,
            Err(Refusal::Nack) => return (NACK, 0),
            Err(Refusal::Error) => return (ERROR, 0),
        };
        let done = match &step {
            Step::Plug(range) => backing.plug(range.clone()),
            Step::Unplug(range) | Step::UnplugAll(range) => backing.unplug(range.clone()),
            Step::Tell(blocks) => return (ACK, *blocks as u16),
        };
        if done.is_err() {
            return (BUSY, 0);
        }
        window.done(&step);
        (ACK, 0)
    }
}
