use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::{window::*, *};
use crate::{
    Device, DeviceState,
    interrupt::CONFIG_CHANGE,
    testing::{BUFFERS as AT, Bench, DriverRing},
};

const FEATURES: u64 = 1 << 32 | 1 << 1;
const START: u64 = 4 << 30;
const CONFIG: MemConfig = MemConfig { start: START, size: 8 * ALIGNMENT, block_size: BLOCK_SIZE };

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    Plug(Range<u64>),
    Unplug(Range<u64>),
}

#[derive(Default)]
struct Host {
    asked: Vec<Asked>,
    exhausted: bool,
}

struct Notes(Arc<Mutex<Host>>);

impl Notes {
    fn note(&mut self, asked: Asked) -> io::Result<()> {
        let mut host = self.0.lock().unwrap();
        if host.exhausted {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        host.asked.push(asked);
        Ok(())
    }
}

impl Backing for Notes {
    fn plug(&mut self, range: Range<u64>) -> io::Result<()> {
        self.note(Asked::Plug(range))
    }

    fn unplug(&mut self, range: Range<u64>) -> io::Result<()> {
        self.note(Asked::Unplug(range))
    }
}

struct Fixture {
    bench: Bench<Mem>,
    host: Arc<Mutex<Host>>,
}

fn inactive() -> Fixture {
    let host: Arc<Mutex<Host>> = Arc::default();
    Fixture { bench: Bench::new(Mem::new(CONFIG, Box::new(Notes(host.clone()))).unwrap()), host }
}

fn active(requested: u64) -> Fixture {
    let mut fixture = inactive();
    fixture.device().set_requested(requested).unwrap();
    fixture.bench.activate(FEATURES).unwrap();
    fixture
}

fn bytes(kind: u16, address: u64, blocks: u16) -> [u8; REQUEST] {
    let mut bytes = [0; REQUEST];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

impl Fixture {
    /// Answers the type of the answer, and the state in it.
    fn ask(&mut self, kind: u16, block: u64, blocks: u16) -> (u16, u16) {
        self.ask_at(kind, START + block * BLOCK_SIZE, blocks)
    }

    fn ask_at(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
        self.bench.fill(AT, &bytes(kind, address, blocks));
        self.bench.fill(AT + 64, &[0xff; 10]);
        self.bench.rings[0].offer(&[(AT, REQUEST as u32, false), (AT + 64, 10, true)]);
        self.bench.kick(0);
        assert_eq!(self.bench.rings[0].take_used().unwrap().1, 10);
        let answer = self.bench.bytes(AT + 64, 10);
        (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
    }

    fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.host.lock().unwrap().asked)
    }

    fn device(&self) -> std::sync::MutexGuard<'_, Mem> {
        self.bench.device.lock().unwrap()
    }

    fn config(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.device().read_config(offset, &mut data);
        u64::from_le_bytes(data)
    }

    fn counted(&self, name: &str) -> u64 {
        let metrics = self.device().metrics();
        metrics.into_iter().find(|(n, _)| *n == name).unwrap().1
    }
}

fn range(block: u64, blocks: u64) -> Range<u64> {
    START + block * BLOCK_SIZE..START + (block + blocks) * BLOCK_SIZE
}

#[test]
fn a_window_that_linux_could_not_use_is_refused() {
    let refused = |config| {
        let error = Mem::new(config, Box::new(Notes(Arc::default()))).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    };
    refused(MemConfig { size: 0, ..CONFIG });
    refused(MemConfig { size: ALIGNMENT - BLOCK_SIZE, ..CONFIG });
    refused(MemConfig { start: START + BLOCK_SIZE, ..CONFIG });
    refused(MemConfig { start: u64::MAX / ALIGNMENT * ALIGNMENT, ..CONFIG });
    refused(MemConfig { size: SIZE_LIMIT + ALIGNMENT, ..CONFIG });
    refused(MemConfig { block_size: BLOCK_SIZE / 2, ..CONFIG });
    refused(MemConfig { block_size: 3 * BLOCK_SIZE, ..CONFIG });
    refused(MemConfig { block_size: 2 * ALIGNMENT, ..CONFIG });
}

#[test]
fn the_configuration_tells_the_window() {
    let fixture = active(3 * BLOCK_SIZE);
    let fields: Vec<u64> = (0..7).map(|n| fixture.config(8 * n)).collect();
    assert_eq!(
        fields,
        [BLOCK_SIZE, 0, START, 8 * ALIGNMENT, 3 * ALIGNMENT, 0, 3 * BLOCK_SIZE],
        "block size, node, address, size, usable, plugged, requested"
    );
    assert_eq!(fixture.config(56), 0);
    assert_eq!(fixture.config(u64::MAX), 0);
}

#[test]
fn a_new_request_tells_the_driver() {
    let fixture = active(0);
    fixture.device().set_requested(2 * BLOCK_SIZE).unwrap();
    assert_eq!(fixture.bench.interrupt.pending(), CONFIG_CHANGE);
    assert_eq!(fixture.device().requested(), 2 * BLOCK_SIZE);
    for wrong in [BLOCK_SIZE / 2, 8 * ALIGNMENT + BLOCK_SIZE] {
        assert_eq!(fixture.device().set_requested(wrong).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    assert_eq!(fixture.device().requested(), 2 * BLOCK_SIZE);
}

#[test]
fn a_change_of_what_is_plugged_is_told() {
    let mut fixture = active(8 * BLOCK_SIZE);
    let told: Arc<Mutex<Vec<u64>>> = Arc::default();
    let notes = told.clone();
    fixture.device().tell_changes(move |plugged| notes.lock().unwrap().push(plugged));
    assert_eq!(fixture.ask(PLUG, 2, 4), (ACK, 0));
    assert_eq!(fixture.ask(STATE, 2, 4), (ACK, 0), "no change");
    assert_eq!(fixture.ask(PLUG, 6, 8), (NACK, 0), "nor is this");
    assert_eq!(fixture.ask(UNPLUG, 3, 2), (ACK, 0));
    assert_eq!(*told.lock().unwrap(), [4 * BLOCK_SIZE, 2 * BLOCK_SIZE]);
}

#[test]
fn blocks_come_and_go() {
    let mut fixture = active(8 * BLOCK_SIZE);
    assert_eq!(fixture.ask(PLUG, 2, 4), (ACK, 0));
    assert_eq!(fixture.asked(), [Asked::Plug(range(2, 4))]);
    assert_eq!(fixture.config(40), 4 * BLOCK_SIZE);
    assert_eq!(fixture.ask(STATE, 2, 4), (ACK, 0));
    assert_eq!(fixture.ask(STATE, 6, 4), (ACK, 1));
    assert_eq!(fixture.ask(STATE, 0, 4), (ACK, 2));
    assert_eq!(fixture.ask(UNPLUG, 3, 2), (ACK, 0));
    assert_eq!(fixture.asked(), [Asked::Unplug(range(3, 2))]);
    assert_eq!(fixture.device().plugged(), 2 * BLOCK_SIZE);
    assert_eq!(fixture.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(fixture.asked(), [Asked::Unplug(START..START + CONFIG.size)]);
    assert_eq!(fixture.device().plugged(), 0);
    assert_eq!(["plugs", "unplugs", "queries"].map(|name| fixture.counted(name)), [1, 2, 3]);
}

#[test]
fn more_than_requested_is_denied() {
    let mut fixture = active(4 * BLOCK_SIZE);
    assert_eq!(fixture.ask(PLUG, 0, 5).0, NACK);
    assert_eq!(fixture.ask(PLUG, 0, 4).0, ACK);
    assert_eq!(fixture.ask(PLUG, 4, 1).0, NACK);
    fixture.device().set_requested(BLOCK_SIZE).unwrap();
    assert_eq!(fixture.ask(UNPLUG, 0, 1).0, ACK);
    assert_eq!(fixture.ask(PLUG, 0, 1).0, NACK, "it has more than it should still");
    assert_eq!(fixture.counted("refused"), 3);
}

#[test]
fn what_cannot_be_is_an_error() {
    let mut fixture = active(CONFIG.size);
    let window = (CONFIG.size / BLOCK_SIZE) as u16;
    assert_eq!(fixture.ask(PLUG, 0, 2).0, ACK);
    fixture.asked();
    for kind in [PLUG, UNPLUG, STATE] {
        assert_eq!(fixture.ask(kind, 4, 0).0, ERROR, "no blocks");
        assert_eq!(fixture.ask_at(kind, START + 1, 1).0, ERROR, "unaligned");
        assert_eq!(fixture.ask_at(kind, START - BLOCK_SIZE, 1).0, ERROR, "before the window");
        assert_eq!(fixture.ask(kind, u64::from(window) - 1, 2).0, ERROR, "past the window");
        assert_eq!(fixture.ask_at(kind, u64::MAX - BLOCK_SIZE + 1, 2).0, ERROR, "past the end of everything");
        assert_eq!(fixture.ask_at(kind, 0, u16::MAX).0, ERROR);
    }
    assert_eq!(fixture.ask(PLUG, 1, 2).0, ERROR, "plugged already");
    assert_eq!(fixture.ask(UNPLUG, 1, 2).0, ERROR, "not plugged");
    assert_eq!(fixture.ask(4, 0, 1).0, ERROR, "no such request");
    assert_eq!(fixture.asked(), []);
    assert_eq!(fixture.device().plugged(), 2 * BLOCK_SIZE);
    assert!(!fixture.bench.needs_reset());
}

#[test]
fn only_the_usable_part_is_used() {
    let mut fixture = active(BLOCK_SIZE);
    let usable = fixture.config(32);
    assert_eq!(usable, 3 * ALIGNMENT);
    assert_eq!(fixture.ask_at(PLUG, START + usable, 1).0, ERROR);
    assert_eq!(fixture.ask_at(PLUG, START + usable - BLOCK_SIZE, 1).0, ACK);
    fixture.device().set_requested(CONFIG.size).unwrap();
    assert_eq!(fixture.config(32), CONFIG.size);
    fixture.device().set_requested(0).unwrap();
    assert_eq!(fixture.config(32), CONFIG.size, "what is in use stays usable");
    assert_eq!(fixture.ask(UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!(fixture.config(32), SLACK);
}

#[test]
fn a_host_without_memory_is_busy() {
    let mut fixture = active(CONFIG.size);
    assert_eq!(fixture.ask(PLUG, 0, 1).0, ACK);
    fixture.host.lock().unwrap().exhausted = true;
    assert_eq!(fixture.ask(PLUG, 1, 1).0, BUSY);
    assert_eq!(fixture.ask(UNPLUG, 0, 1).0, BUSY);
    assert_eq!(fixture.ask(UNPLUG_ALL, 0, 0).0, BUSY);
    assert_eq!(fixture.device().plugged(), BLOCK_SIZE);
    assert_eq!(fixture.counted("busy"), 3);
}

#[test]
fn a_request_that_cannot_be_read_or_answered_changes_nothing() {
    let mut fixture = active(CONFIG.size);
    fixture.bench.fill(AT, &bytes(PLUG, START, 1));
    let head = fixture.bench.rings[0].offer(&[(AT, REQUEST as u32 - 1, false), (AT + 64, 10, true)]);
    fixture.bench.kick(0);
    assert_eq!(fixture.bench.rings[0].take_used(), Some((head, 10)));
    assert_eq!(fixture.bench.bytes(AT + 64, 2), ERROR.to_le_bytes());
    fixture.bench.rings[0].offer(&[(AT, REQUEST as u32, false), (AT + 64, 9, true)]);
    fixture.bench.rings[0].offer(&[(AT, REQUEST as u32, false)]);
    fixture.bench.kick(0);
    assert_eq!(fixture.bench.rings[0].take_used().unwrap().1, 9);
    assert_eq!(fixture.bench.rings[0].take_used().unwrap().1, 0);
    assert_eq!(fixture.asked(), []);
    assert_eq!(fixture.counted("errors"), 3);
}

#[test]
fn a_driver_that_reads_what_is_not_plugged_is_not_served() {
    let mut fixture = inactive();
    assert!(fixture.bench.activate(1 << 32).is_err());
}

#[test]
fn a_reset_leaves_the_blocks_and_a_liar_needs_one() {
    let mut fixture = active(CONFIG.size);
    assert_eq!(fixture.ask(PLUG, 0, 3).0, ACK);
    fixture.bench.rings[0].set_available_index(100);
    fixture.bench.kick(0);
    assert!(fixture.bench.needs_reset());
    assert_eq!(fixture.counted("faults"), 1);
    fixture.device().reset();
    assert_eq!(fixture.device().plugged(), 3 * BLOCK_SIZE);
    fixture.bench.rings[0] = DriverRing::new(&fixture.bench.memory, 0x10_0000, QUEUE_SIZE);
    fixture.bench.activate(FEATURES).unwrap();
    assert_eq!(fixture.ask(UNPLUG_ALL, 0, 0).0, ACK);
}

#[test]
fn paused_it_rests_and_saved_it_goes_on_elsewhere() {
    let mut fixture = active(CONFIG.size);
    assert_eq!(fixture.ask(PLUG, 1, 2).0, ACK);
    assert_eq!(fixture.ask(PLUG, 70, 1).0, ACK);
    fixture.device().pause();
    fixture.bench.fill(AT, &bytes(UNPLUG, START + BLOCK_SIZE, 1));
    fixture.bench.rings[0].offer(&[(AT, REQUEST as u32, false), (AT + 64, 10, true)]);
    fixture.bench.kick(0);
    assert_eq!(fixture.bench.rings[0].take_used(), None);
    let state = fixture.device().save();
    assert_eq!(state.rings().len(), 1);

    let other = inactive();
    assert!(other.device().restore(&state));
    assert_eq!(other.asked(), [Asked::Plug(range(1, 2)), Asked::Plug(range(70, 1))]);
    assert_eq!(other.device().plugged(), 3 * BLOCK_SIZE);
    assert_eq!(other.config(48), CONFIG.size);

    fixture.device().resume();
    assert!(fixture.bench.rings[0].take_used().is_some());
    assert_eq!(fixture.device().plugged(), 2 * BLOCK_SIZE);
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let fixture = active(4 * BLOCK_SIZE);
    let DeviceState::Mem(state) = fixture.device().save() else { panic!("another device's state") };
    let refused = |change: fn(&mut State)| {
        let mut state = state.clone();
        change(&mut state);
        let other = inactive();
        assert!(!other.device().restore(&DeviceState::Mem(state)));
        assert_eq!(other.asked(), []);
    };
    refused(|state| state.config.start = 0);
    refused(|state| state.requested = 1);
    refused(|state| state.requested = u64::MAX / BLOCK_SIZE * BLOCK_SIZE);
    refused(|state| state.usable = 0);
    refused(|state| state.usable = 16 * ALIGNMENT);
    refused(|state| state.plugged.push(0));
    refused(|state| state.plugged.truncate(1));
    refused(|state| *state.plugged.last_mut().unwrap() = 1 << 63);
    assert!(!fixture.device().restore(&DeviceState::Rng(crate::rng::State::default())));
    let other = inactive();
    other.host.lock().unwrap().exhausted = true;
    let mut plugged = state.clone();
    plugged.plugged[0] = 1;
    assert!(!other.device().restore(&DeviceState::Mem(plugged)), "without memory there is no such guest");
    assert!(other.device().restore(&DeviceState::Mem(state)));
}

proptest! {
    /// Whatever is asked in whatever order, the window is a set of blocks, and grows as far as requested.
    #[test]
    fn the_window_is_a_set_of_blocks(
        steps in prop::collection::vec((0u16..5, 0u64..520, 0u16..40, prop::option::of(0u64..512)), 1..60),
    ) {
        let blocks = CONFIG.size / BLOCK_SIZE;
        let mut window = Window::new(CONFIG).unwrap();
        let mut model = std::collections::BTreeSet::new();
        for (kind, block, count, wanted) in steps {
            if let Some(wanted) = wanted {
                window.request(wanted * BLOCK_SIZE).unwrap();
            }
            let before = window.clone();
            let bytes = bytes(kind, START + block * BLOCK_SIZE, count);
            let Some(request) = Request::parse(&bytes) else { continue };
            let range = block..block + u64::from(count);
            match window.decide(request) {
                Ok(step) => {
                    window.done(&step);
                    match step {
                        Step::Plug(_) => {
                            prop_assert!(range.clone().all(|b| model.insert(b)));
                            prop_assert!(window.plugged() <= window.requested());
                        }
                        Step::Unplug(_) => prop_assert!(range.clone().all(|b| model.remove(&b))),
                        Step::UnplugAll(_) => model.clear(),
                        Step::Tell(told) => {
                            let plugged = range.clone().filter(|b| model.contains(b)).count() as u64;
                            let expected = match plugged {
                                0 => Blocks::Unplugged,
                                n if n == u64::from(count) => Blocks::Plugged,
                                _ => Blocks::Mixed,
                            };
                            prop_assert_eq!(told, expected);
                        }
                    }
                    prop_assert!(range.end <= blocks || kind == UNPLUG_ALL);
                }
                Err(_) => prop_assert_eq!(&window, &before),
            }
            prop_assert_eq!(window.plugged(), model.len() as u64 * BLOCK_SIZE);
            let ranges = window.plugged_ranges();
            let listed: u64 = ranges.iter().map(|r| r.end - r.start).sum();
            prop_assert_eq!(listed, window.plugged());
        }
        prop_assert_eq!(Window::new(CONFIG).unwrap().restored(&window.save(vec![])), Some(window));
    }

    #[test]
    fn any_bytes_are_a_request_or_none(bytes: [u8; REQUEST]) {
        let mut window = Window::new(CONFIG).unwrap();
        window.request(CONFIG.size).unwrap();
        if let Some(request) = Request::parse(&bytes)
            && let Ok(Step::Plug(range) | Step::Unplug(range)) = window.decide(request)
        {
            prop_assert!(range.start >= START && range.end <= START + CONFIG.size);
        }
    }
}
