//! The window: which blocks are plugged, and what a driver may ask for. Decisions only: no memory is made
//! or ended here, and no ring is known.

use std::{io, ops::Range};

use super::{ALIGNMENT, BLOCK_SIZE, MemConfig, SIZE_LIMIT, SLACK, State};

/// What a driver asks for (5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Plug { address: u64, blocks: u16 },
    Unplug { address: u64, blocks: u16 },
    UnplugAll,
    State { address: u64, blocks: u16 },
}

/// Bytes of a request.
pub(super) const REQUEST: usize = 24;

impl Request {
    /// Reads a request; `None` for a type that does not exist.
    pub(super) fn parse(bytes: &[u8; REQUEST]) -> Option<Self> {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut address = [0; 8];
        address.copy_from_slice(&bytes[8..16]);
        let (address, blocks) = (u64::from_le_bytes(address), half(16));
        match half(0) {
            0 => Some(Self::Plug { address, blocks }),
            1 => Some(Self::Unplug { address, blocks }),
            2 => Some(Self::UnplugAll),
            3 => Some(Self::State { address, blocks }),
            _ => None,
        }
    }
}

/// How the blocks of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blocks {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

/// What is to be done for a request that is in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Plug(Range<u64>),
    Unplug(Range<u64>),
    UnplugAll(Range<u64>),
    Tell(Blocks),
}

/// Why a request is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It is more than the host wants the guest to have.
    Nack,
    /// It is nothing that can be done.
    Error,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Window {
    config: MemConfig,
    requested: u64,
    usable: u64,
    plugged: u64,
    bits: Vec<u64>,
}

impl Window {
    pub(super) fn new(config: MemConfig) -> io::Result<Self> {
        let MemConfig { start, size, block_size } = config;
        let block_is_right = block_size.is_power_of_two() && (BLOCK_SIZE..=ALIGNMENT).contains(&block_size);
        let aligned = start.is_multiple_of(ALIGNMENT) && size.is_multiple_of(ALIGNMENT);
        let fits = (1..=SIZE_LIMIT).contains(&size) && start.checked_add(size).is_some();
        if !(block_is_right && aligned && fits) {
            let what = format!(
                "a window of {size} bytes from {start:#x} in blocks of {block_size}: it must be whole \
                 {ALIGNMENT} bytes, no more than {SIZE_LIMIT}, in blocks of a power of two from {BLOCK_SIZE}"
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let words = (size / block_size).div_ceil(64) as usize;
        Ok(Self { config, requested: 0, usable: SLACK.min(size), plugged: 0, bits: vec![0; words] })
    }

    /// Bytes that are plugged.
    pub(super) fn plugged(&self) -> u64 {
        self.plugged
    }

    /// Bytes that the host wants the guest to have.
    pub(super) fn requested(&self) -> u64 {
        self.requested
    }

    pub(super) fn request(&mut self, bytes: u64) -> io::Result<()> {
        if bytes > self.config.size || !bytes.is_multiple_of(self.config.block_size) {
            let MemConfig { size, block_size, .. } = self.config;
            let what = format!("{bytes} bytes are not whole blocks of {block_size}, at most {size} in all");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        self.requested = bytes;
        // It only grows here: what a driver uses stays usable (5.15.5.2).
        self.usable = self.usable.max(self.usable_for_requested());
        Ok(())
    }

    fn usable_for_requested(&self) -> u64 {
        (self.requested.next_multiple_of(ALIGNMENT) + SLACK).min(self.config.size)
    }

    /// struct virtio_mem_config (5.15.4); there are no nodes.
    pub(super) fn space(&self) -> [u8; 56] {
        let MemConfig { start, size, block_size } = self.config;
        let fields = [block_size, 0, start, size, self.usable, self.plugged, self.requested];
        let mut space = [0; 56];
        for (to, field) in space.chunks_exact_mut(8).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        space
    }

    /// What is to be done for a request. Nothing has changed yet: see [`Window::done`].
    pub(super) fn decide(&self, request: Request) -> Result<Step, Refusal> {
        match request {
            Request::Plug { address, blocks } => {
                let range = self.range(address, blocks)?;
                if self.plugged + (range.end - range.start) > self.requested {
                    return Err(Refusal::Nack);
                }
                match self.state(&range) {
                    Blocks::Unplugged => Ok(Step::Plug(range)),
                    _ => Err(Refusal::Error),
                }
            }
            Request::Unplug { address, blocks } => {
                let range = self.range(address, blocks)?;
                match self.state(&range) {
                    Blocks::Plugged => Ok(Step::Unplug(range)),
                    _ => Err(Refusal::Error),
                }
            }
            Request::UnplugAll => {
                Ok(Step::UnplugAll(self.config.start..self.config.start + self.config.size))
            }
            Request::State { address, blocks } => Ok(Step::Tell(self.state(&self.range(address, blocks)?))),
        }
    }

    /// Notes that a step was taken.
    pub(super) fn done(&mut self, step: &Step) {
        match step {
            Step::Plug(range) => self.set(range, true),
            Step::Unplug(range) => self.set(range, false),
            Step::UnplugAll(range) => {
                self.set(range, false);
                // The one moment at which it may shrink (5.15.6.5).
                self.usable = self.usable_for_requested();
            }
            Step::Tell(_) => {}
        }
    }

    /// The addresses of a request: whole blocks in the usable part of the window.
    fn range(&self, address: u64, blocks: u16) -> Result<Range<u64>, Refusal> {
        let MemConfig { start, block_size, .. } = self.config;
        let len = u64::from(blocks) * block_size;
        match address.checked_add(len) {
            Some(end)
                if blocks > 0
                    && address.is_multiple_of(block_size)
                    && address >= start
                    && end <= start + self.usable =>
            {
                Ok(address..end)
            }
            _ => Err(Refusal::Error),
        }
    }

    /// The numbers of the blocks in a range.
    fn blocks(&self, range: &Range<u64>) -> Range<usize> {
        let number = |address: u64| ((address - self.config.start) / self.config.block_size) as usize;
        number(range.start)..number(range.end)
    }

    fn is_plugged(&self, block: usize) -> bool {
        self.bits[block / 64] >> (block % 64) & 1 == 1
    }

    fn state(&self, range: &Range<u64>) -> Blocks {
        let blocks = self.blocks(range);
        let plugged = blocks.clone().filter(|block| self.is_plugged(*block)).count();
        match plugged {
            0 => Blocks::Unplugged,
            n if n == blocks.len() => Blocks::Plugged,
            _ => Blocks::Mixed,
        }
    }

    fn set(&mut self, range: &Range<u64>, plugged: bool) {
        for block in self.blocks(range) {
            if self.is_plugged(block) != plugged {
                self.bits[block / 64] ^= 1 << (block % 64);
            }
        }
        self.count();
    }

    fn count(&mut self) {
        let blocks: u64 = self.bits.iter().map(|word| u64::from(word.count_ones())).sum();
        self.plugged = blocks * self.config.block_size;
    }

    /// The plugged stretches, in order.
    pub(super) fn plugged_ranges(&self) -> Vec<Range<u64>> {
        let MemConfig { start, size, block_size } = self.config;
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for block in (0..(size / block_size) as usize).filter(|block| self.is_plugged(*block)) {
            let at = start + block as u64 * block_size;
            match ranges.last_mut() {
                Some(last) if last.end == at => last.end += block_size,
                _ => ranges.push(at..at + block_size),
            }
        }
        ranges
    }

    pub(super) fn save(&self, rings: Vec<crate::ring::RingState>) -> State {
        State {
            rings,
            config: self.config,
            requested: self.requested,
            usable: self.usable,
            plugged: self.bits.clone(),
        }
    }

    /// The window of a saved state; `None` if it is another window's, or cannot be.
    pub(super) fn restored(&self, state: &State) -> Option<Self> {
        let mut window = Self::new(self.config).ok()?;
        window.request(state.requested).ok()?;
        let usable_can_be = state.usable >= window.usable
            && state.usable <= self.config.size
            && state.usable.is_multiple_of(self.config.block_size);
        if state.config != self.config || state.plugged.len() != window.bits.len() || !usable_can_be {
            return None;
        }
        window.usable = state.usable;
        window.bits.clone_from(&state.plugged);
        // No block beyond the usable part.
        let blocks = (state.usable / self.config.block_size) as usize;
        let beyond = |(n, word): (usize, &u64)| match blocks.saturating_sub(n * 64) {
            0 => *word != 0,
            used if used < 64 => *word >> used != 0,
            _ => false,
        };
        if window.bits.iter().enumerate().any(beyond) {
            return None;
        }
        window.count();
        Some(window)
    }
}
