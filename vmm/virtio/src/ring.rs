//! A ring that does not believe its driver: every index, address and length is checked before use.
//! Knows virtqueues (virtio 1.2, 2.7); knows nothing of what the buffers mean.

use std::{
    io,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::{Interrupt, Memory};

/// What no honest driver does. The device that meets it stops and sets DEVICE_NEEDS_RESET.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The available index is further ahead than the ring is long.
    #[error("the available index jumped")]
    Index,
    /// A chain that loops, leaves its table, has no end in sight, nests tables, or points outside the guest's memory.
    #[error("a chain of descriptors is broken")]
    Chain,
    /// A readable descriptor after a writable one (virtio 1.2, 2.7.4.2).
    #[error("a chain of descriptors is out of order")]
    Order,
    /// The ring itself is not in the guest's memory.
    #[error("the ring is outside of memory")]
    Memory,
}

/// The most descriptors of a chain. Drivers may not make one longer than its queue, indirect or not
/// (virtio 1.2, 2.7.5.3.1), which is for each device to say, some with an answer for the driver. This is
/// more than any device here takes, and 32 times less than the 65,535 that a table can hold: a ring of 256
/// such tables would be 16 million descriptors for one turn of the event loop.
const CHAIN_LIMIT: usize = 2048;

/// A stretch of guest memory, whole in one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where it begins.
    pub address: GuestAddress,
    /// How many bytes it has; never 0.
    pub len: u32,
}

/// The buffers of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// What names the request to the driver.
    pub head: u16,
    /// What the driver wrote, in order.
    pub readable: Vec<Span>,
    /// What the device is to write, in order.
    pub writable: Vec<Span>,
}

/// Bytes in all of `spans`.
pub fn total(spans: &[Span]) -> u64 {
    spans.iter().map(|s| u64::from(s.len)).sum()
}

impl Chain {
    /// Reads from the readable buffers, from byte `offset` on. Answers how many bytes there were.
    pub fn read(&self, memory: &Memory, offset: u64, out: &mut [u8]) -> Result<usize, RingError> {
        walk(&self.readable, offset, out.len(), |at, range| {
            memory.read_slice(&mut out[range], at).map_err(|_| RingError::Chain)
        })
    }

    /// Writes to the writable buffers, from byte `offset` on. Answers how many bytes had room.
    pub fn write(&self, memory: &Memory, offset: u64, data: &[u8]) -> Result<usize, RingError> {
        walk(&self.writable, offset, data.len(), |at, range| {
            memory.write_slice(&data[range], at).map_err(|_| RingError::Chain)
        })
    }
}

/// Goes through `len` bytes of `spans` from `offset` on, piece by piece.
fn walk(
    spans: &[Span],
    mut offset: u64,
    len: usize,
    mut piece: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), RingError>,
) -> Result<usize, RingError> {
    let mut done = 0;
    for span in spans {
        if done == len {
            break;
        }
        if offset >= u64::from(span.len) {
            offset -= u64::from(span.len);
            continue;
        }
        let n = (len - done).min((u64::from(span.len) - offset) as usize);
        piece(GuestAddress(span.address.0 + offset), done..done + n)?;
        offset = 0;
        done += n;
    }
    Ok(done)
}

/// A ring in use by a device.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    /// How many requests were given back since the driver's wish to be told was last looked at.
    completed: u16,
}

impl Ring {
    /// Takes over a ring that the driver has set up. `None` if it is not in the guest's memory.
    pub fn new(queue: Queue, memory: Memory, interrupt: Arc<Interrupt>) -> Option<Self> {
        queue.is_valid(&*memory).then_some(Self { queue, memory, interrupt, completed: 0 })
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// How the guest is told.
    pub fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next request, if there is one.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let memory = self.memory.clone();
        let mut available = match self.queue.iter(&*memory) {
            Ok(available) => available,
            Err(virtio_queue::Error::InvalidAvailRingIndex) => return Err(RingError::Index),
            Err(_) => return Err(RingError::Memory),
        };
        let Some(descriptors) = available.next() else { return Ok(None) };
        let mut chain = Chain { head: descriptors.head_index(), ..Chain::default() };
        if chain.head >= self.queue.size() {
            return Err(RingError::Chain);
        }
        // The iterator ends early where a chain is broken: then what came last promises a successor.
        let mut more = true;
        for (n, descriptor) in descriptors.enumerate() {
            if n == CHAIN_LIMIT {
                return Err(RingError::Chain);
            }
            more = descriptor.has_next();
            let spans = if descriptor.is_write_only() {
                &mut chain.writable
            } else if chain.writable.is_empty() {
                &mut chain.readable
            } else {
                return Err(RingError::Order);
            };
            append(&memory, descriptor.addr(), descriptor.len(), spans)?;
        }
        if more { Err(RingError::Chain) } else { Ok(Some(chain)) }
    }

    /// Gives the last request back, to be popped again: there is no room for it yet. Only for what
    /// [`Ring::pop`] answered last and is not completed; several times for several.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Whether the driver has offered more than was popped.
    pub fn has_more(&self) -> Result<bool, RingError> {
        let index = self.queue.avail_idx(&*self.memory, Ordering::Acquire).map_err(|_| RingError::Memory)?;
        Ok(index.0 != self.queue.next_avail())
    }

    /// Gives a request back with so many bytes written. The driver learns of it by [`Ring::notify`].
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        self.completed = self.completed.saturating_add(1);
        self.queue.add_used(&*self.memory, head, written).map_err(|_| RingError::Memory)
    }

    /// Gives several requests back that the driver must see all at once, as the buffers of one frame
    /// (virtio 1.2, 5.1.6.4): it may look while this runs, and finds either none of them or all.
    pub fn complete_together(&mut self, requests: &[(u16, u32)]) -> Result<(), RingError> {
        let Some(((head, written), others)) = requests.split_last() else { return Ok(()) };
        let mut next = self.queue.next_used();
        for &(head, written) in others {
            let slot = u64::from(next % self.queue.size());
            // The elements follow the flags and the index (2.7.8).
            let at = self.queue.used_ring().checked_add(4 + 8 * slot).ok_or(RingError::Memory)?;
            let element = [u32::from(head).to_le(), written.to_le()];
            self.memory.write_obj(element, GuestAddress(at)).map_err(|_| RingError::Memory)?;
            next = next.wrapping_add(1);
        }
        self.completed = self.completed.saturating_add(others.len().min(usize::from(u16::MAX)) as u16);
        // The index that this writes covers all of them.
        self.queue.set_next_used(next);
        self.complete(*head, *written)
    }

    /// Interrupts the guest if its driver wants to be told of what was completed since the last time.
    pub fn notify(&mut self) -> Result<(), RingError> {
        if self.wants_notification()? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    fn wants_notification(&mut self) -> Result<bool, RingError> {
        let completed = std::mem::take(&mut self.completed);
        if completed == 0 {
            return Ok(false);
        }
        // What was completed must be visible before the driver's wish is read: it writes the wish, then
        // looks once more for what was completed.
        fence(Ordering::SeqCst);
        let wish = |at: u64| -> Result<u16, RingError> {
            let value = self.memory.load(GuestAddress(at), Ordering::Acquire);
            value.map(u16::from_le).map_err(|_| RingError::Memory)
        };
        let available = self.queue.avail_ring();
        if !self.queue.event_idx_enabled() {
            // VIRTQ_AVAIL_F_NO_INTERRUPT; without the event index it is the driver's whole say.
            return Ok(wish(available)? & 1 == 0);
        }
        // 2.7.7.2: used_event, behind the available ring, is the index whose use the driver waits for.
        let at = available.checked_add(4 + 2 * u64::from(self.queue.size())).ok_or(RingError::Memory)?;
        let behind = self.queue.next_used().wrapping_sub(wish(at)?).wrapping_sub(1);
        Ok(behind < completed)
    }

    /// Asks for the driver's kicks; `true` if there are requests that it offered meanwhile.
    pub fn enable_kicks(&mut self) -> Result<bool, RingError> {
        self.queue.enable_notification(&*self.memory).map_err(|_| RingError::Memory)
    }

    /// Tells the driver that its kicks are not needed: the ring is being looked at.
    pub fn disable_kicks(&mut self) -> Result<(), RingError> {
        self.queue.disable_notification(&*self.memory).map_err(|_| RingError::Memory)
    }

    /// Where it stands, as plain data.
    pub fn save(&self) -> RingState {
        self.queue.state().into()
    }
}

/// Adds a buffer, cut where memory regions meet. An empty one is left out: it is legal, and says nothing.
fn append(memory: &Memory, address: GuestAddress, len: u32, to: &mut Vec<Span>) -> Result<(), RingError> {
    if len == 0 {
        return Ok(());
    }
    let mut at = address;
    // Guest memory is readable and writable everywhere: the permission asked for makes no difference.
    let slices = memory.get_slices(address, len as usize, Permissions::Read).map_err(|_| RingError::Chain)?;
    for slice in slices {
        let len = slice.map_err(|_| RingError::Chain)?.len() as u32;
        to.push(Span { address: at, len });
        at.0 += u64::from(len);
    }
    Ok(())
}

/// The position of a ring as plain data; mirrors [`QueueState`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Named as in virtio-queue.
pub struct RingState {
    pub max_size: u16,
    pub next_avail: u16,
    pub next_used: u16,
    pub event_idx_enabled: bool,
    pub size: u16,
    pub ready: bool,
    pub desc_table: u64,
    pub avail_ring: u64,
    pub used_ring: u64,
}

impl RingState {
    /// The ring at this position; an error if no ring can be there.
    pub fn queue(self) -> io::Result<Queue> {
        let state = QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx_enabled,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        };
        Queue::try_from(state).map_err(io::Error::other)
    }
}

impl From<QueueState> for RingState {
    fn from(state: QueueState) -> Self {
        Self {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

#[cfg(test)]
mod tests;
