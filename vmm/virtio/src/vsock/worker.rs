//! Serves the rings.

use super::hub::Hub;
use crate::ring::{Ring, RingError, total};

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, le32.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

pub(super) struct Worker {
    /// To the guest.
    pub(super) receiving: Ring,
    /// From the guest.
    pub(super) sending: Ring,
    /// Events for the guest.
    pub(super) event: Ring,
    /// The guest does not know yet that its connections are gone.
    pub(super) reset_owed: bool,
}

impl Worker {
    /// Does what can be done, at most one ring's worth in each direction: one guest must not keep the loop
    /// from the other devices. Answers whether there is more.
    pub(super) fn run(&mut self, hub: &mut Hub) -> Result<bool, RingError> {
        self.tell_reset()?;
        hub.accept();
        let more_from_guest = self.take_packets(hub)?;
        let more_to_guest = self.fill_buffers(hub)?;
        // Packets left behind for want of room: buffers that come later wake the loop, too.
        Ok(more_from_guest && hub.has_room() || more_to_guest || hub.can_accept())
    }

    /// Takes the guest's packets. Answers whether there may be more.
    fn take_packets(&mut self, hub: &mut Hub) -> Result<bool, RingError> {
        let mut budget = self.sending.size();
        loop {
            self.sending.disable_kicks()?;
            while budget > 0
                && hub.has_room()
                && let Some(chain) = self.sending.pop()?
            {
                budget -= 1;
                hub.take(self.sending.memory(), &chain)?;
                self.sending.complete(chain.head, 0)?;
            }
            self.sending.notify()?;
            if budget == 0 || !hub.has_room() {
                return Ok(true);
            }
            if !self.sending.enable_kicks()? {
                return Ok(false);
            }
        }
    }

    /// Fills the guest's buffers. Answers whether there is more to fill and buffers for it.
    fn fill_buffers(&mut self, hub: &mut Hub) -> Result<bool, RingError> {
        let mut budget = self.receiving.size();
        self.receiving.disable_kicks()?;
        while hub.wants_buffers() && budget > 0 {
            let Some(chain) = self.receiving.pop()? else {
                // Only without buffers is it of interest that there are new ones.
                if self.receiving.enable_kicks()? {
                    continue;
                }
                break;
            };
            if total(&chain.writable) <= super::packet::HEADER as u64 {
                hub.metrics.small_buffers.increment();
                self.receiving.complete(chain.head, 0)?;
                budget -= 1;
                continue;
            }
            match hub.fill(self.receiving.memory(), &chain)? {
                Some(written) => self.receiving.complete(chain.head, written)?,
                None => self.receiving.unpop(),
            }
            budget -= 1;
        }
        self.receiving.notify()?;
        Ok(budget == 0 && hub.wants_buffers())
    }

    /// Tells the guest after a restore that its connections are gone.
    fn tell_reset(&mut self) -> Result<(), RingError> {
        while self.reset_owed {
            match self.event.pop()? {
                Some(chain) => {
                    let written = chain.write(self.event.memory(), 0, &TRANSPORT_RESET)?;
                    self.reset_owed = written < TRANSPORT_RESET.len();
                    self.event.complete(chain.head, written as u32)?;
                    self.event.notify()?;
                }
                None if self.event.enable_kicks()? => {}
                None => break,
            }
        }
        Ok(())
    }
}
