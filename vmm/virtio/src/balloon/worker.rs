//! Serves the rings.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{BUFFERS, Discard, Metrics, PAGE, PAGES, Stats, TURN, stats};
use crate::{
    Interrupt, Memory,
    ring::{Chain, Ring, RingError, RingState, total},
};

/// What a ring is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// A stretch of whole pages in one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// A ring of the device, whether the driver uses it or not.
pub(super) enum Place {
    Served(Role, Ring),
    Unused(RingState),
}

pub(super) struct Worker {
    /// By the rings' numbers.
    pub(super) places: Vec<Place>,
    pub(super) books: Books,
}

/// What is kept besides the rings.
pub(super) struct Books {
    pub(super) stats: Stats,
    pub(super) held: Option<u16>,
    pub(super) metrics: Arc<Metrics>,
}

impl Worker {
    /// Serves ring `index` for one turn. Answers whether there is more.
    pub(super) fn run(&mut self, index: usize, discard: &mut dyn Discard) -> Result<bool, RingError> {
        match self.places.get_mut(index) {
            Some(Place::Served(role, ring)) => self.books.serve(*role, ring, discard),
            _ => Ok(false),
        }
    }

    /// Gives the kept list back, which the driver answers with a newer one. Answers whether there was one.
    pub(super) fn request_stats(&mut self) -> Result<bool, RingError> {
        for place in &mut self.places {
            if let Place::Served(Role::Statistics, ring) = place
                && let Some(head) = self.books.held.take()
            {
                ring.complete(head, 0)?;
                ring.notify()?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Where the rings stand.
    pub(super) fn save(&self) -> Vec<RingState> {
        let state = |place: &Place| match place {
            Place::Served(_, ring) => ring.save(),
            Place::Unused(state) => *state,
        };
        self.places.iter().map(state).collect()
    }

    /// How the guest is told; a balloon without rings is none.
    pub(super) fn interrupt(&self) -> Option<&Arc<Interrupt>> {
        self.places.iter().find_map(|place| match place {
            Place::Served(_, ring) => Some(ring.interrupt()),
            Place::Unused(_) => None,
        })
    }
}

impl Books {
    fn serve(&mut self, role: Role, ring: &mut Ring, discard: &mut dyn Discard) -> Result<bool, RingError> {
        let mut budget = TURN;
        loop {
            ring.disable_kicks()?;
            while budget > 0
                && let Some(chain) = ring.pop()?
            {
                budget -= 1;
                let done = match role {
                    Role::Inflate => {
                        self.inflate(ring.memory(), &chain, discard)?;
                        Some(chain.head)
                    }
                    Role::Deflate => {
                        self.metrics.deflated.add(total(&chain.readable) / 4);
                        Some(chain.head)
                    }
                    Role::Reporting => {
                        self.report(ring.memory(), &chain, discard);
                        Some(chain.head)
                    }
                    // One is kept; a second one, which no driver sends (5.5.6.3), pushes the first out.
                    Role::Statistics => {
                        self.read_stats(ring.memory(), &chain)?;
                        self.held.replace(chain.head)
                    }
                };
                if let Some(head) = done {
                    ring.complete(head, 0)?;
                }
            }
            ring.notify()?;
            if budget == 0 {
                return Ok(true);
            }
            if !ring.enable_kicks()? {
                return Ok(false);
            }
        }
    }

    fn inflate(
        &mut self,
        memory: &Memory,
        chain: &Chain,
        discard: &mut dyn Discard,
    ) -> Result<(), RingError> {
        let mut bytes = [0; 4 * PAGES];
        let read = chain.read(memory, 0, &mut bytes)?;
        let numbers = bytes[..read].chunks_exact(4).map(|n| u32::from_le_bytes([n[0], n[1], n[2], n[3]]));
        let offered = total(&chain.readable) / 4;
        let mut pages = 0;
        for run in runs(memory, numbers.collect()) {
            pages += run.len / PAGE;
            self.give_back(run, discard);
        }
        self.metrics.inflated.add(pages);
        self.metrics.skipped.add(offered.saturating_sub(pages));
        Ok(())
    }

    fn report(&mut self, memory: &Memory, chain: &Chain, discard: &mut dyn Discard) {
        // A guest cannot have more free than it has: who reports more repeats itself.
        let mut left: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
        for (n, span) in chain.writable.iter().enumerate() {
            let run = whole_pages(span.address.0, u64::from(span.len)).filter(|run| run.len <= left);
            match run.filter(|_| n < BUFFERS) {
                Some(run) => {
                    left -= run.len;
                    if self.give_back(run, discard) {
                        self.metrics.reported_bytes.add(run.len);
                    }
                }
                None => self.metrics.skipped.increment(),
            }
        }
    }

    fn give_back(&mut self, run: Run, discard: &mut dyn Discard) -> bool {
        let done = discard.discard(GuestAddress(run.start), run.len).is_ok();
        if !done {
            self.metrics.failures.increment();
        }
        done
    }

    fn read_stats(&mut self, memory: &Memory, chain: &Chain) -> Result<(), RingError> {
        let mut bytes = [0; stats::BYTES];
        let read = chain.read(memory, 0, &mut bytes)?;
        self.stats = Stats::parse(&bytes[..read]);
        self.metrics.statistics.increment();
        Ok(())
    }
}

/// The pages of a list that are in memory, once each, as few stretches. A guest's pages come in any order.
pub(super) fn runs(memory: &Memory, mut numbers: Vec<u32>) -> Vec<Run> {
    numbers.sort_unstable();
    numbers.dedup();
    let mut runs: Vec<Run> = Vec::new();
    let mut end_of_region = 0;
    for number in numbers {
        let at = u64::from(number) * PAGE;
        if let Some(last) = runs.last_mut()
            && last.start + last.len == at
            && at + PAGE <= end_of_region
        {
            last.len += PAGE;
        } else if let Some(region) = memory.find_region(GuestAddress(at)) {
            end_of_region = region.start_addr().0 + region.len();
            if at + PAGE <= end_of_region {
                runs.push(Run { start: at, len: PAGE });
            }
        }
    }
    runs
}

/// The whole pages in a stretch of memory.
pub(super) fn whole_pages(address: u64, len: u64) -> Option<Run> {
    let start = address.checked_next_multiple_of(PAGE)?;
    let end = address.checked_add(len)? / PAGE * PAGE;
    (end > start).then(|| Run { start, len: end - start })
}
