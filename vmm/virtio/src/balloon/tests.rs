use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::{worker::*, *};
use crate::{
    Device, DeviceState,
    interrupt::CONFIG_CHANGE,
    testing::{BUFFERS as AT, Bench, DriverRing, MEMORY, memory},
};

/// Everything that the device offers.
const FEATURES: u64 = 1 << 32 | 1 << 1 | 1 << 2 | 1 << 5;
const STATISTICS: usize = 2;
const REPORTING: usize = 3;

/// Notes what it is asked for.
struct Notes {
    list: Arc<Mutex<Vec<(u64, u64)>>>,
    refuse: bool,
}

impl Discard for Notes {
    fn discard(&mut self, address: GuestAddress, len: u64) -> io::Result<()> {
        self.list.lock().unwrap().push((address.0, len));
        if self.refuse { Err(io::ErrorKind::Unsupported.into()) } else { Ok(()) }
    }
}

struct Fixture {
    bench: Bench<Balloon>,
    list: Arc<Mutex<Vec<(u64, u64)>>>,
}

fn inactive(refuse: bool) -> Fixture {
    let list: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
    let notes = Notes { list: list.clone(), refuse };
    Fixture { bench: Bench::new(Balloon::new(Box::new(notes)).unwrap()), list }
}

fn active() -> Fixture {
    let mut fixture = inactive(false);
    fixture.bench.activate(FEATURES).unwrap();
    fixture
}

impl Fixture {
    fn send_pages(&mut self, queue: usize, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.bench.fill(AT, &bytes);
        self.bench.rings[queue].offer(&[(AT, bytes.len() as u32, false)]);
        self.bench.kick(queue);
    }

    fn send_stats(&mut self, entries: &[(u16, u64)]) -> u16 {
        let bytes: Vec<u8> =
            entries.iter().flat_map(|(t, v)| [&t.to_le_bytes()[..], &v.to_le_bytes()[..]].concat()).collect();
        self.bench.fill(AT, &bytes);
        let head = self.bench.rings[STATISTICS].offer(&[(AT, bytes.len() as u32, false)]);
        self.bench.kick(STATISTICS);
        head
    }

    fn taken(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.list.lock().unwrap())
    }

    fn counted(&self, name: &str) -> u64 {
        let metrics = self.device().metrics();
        metrics.into_iter().find(|(n, _)| *n == name).unwrap().1
    }

    fn device(&self) -> std::sync::MutexGuard<'_, Balloon> {
        self.bench.device.lock().unwrap()
    }
}

#[test]
fn pages_that_are_given_up_are_discarded_as_stretches() {
    let mut fixture = active();
    fixture.send_pages(0, &[7, 5, 6, 100, 5]);
    assert_eq!(fixture.taken(), [(5 * PAGE, 3 * PAGE), (100 * PAGE, PAGE)]);
    assert_eq!(fixture.bench.rings[0].take_used(), Some((0, 0)));
    assert!(fixture.bench.interrupted());
    assert_eq!(fixture.counted("inflated"), 4);
}

#[test]
fn pages_that_are_taken_again_are_only_counted() {
    let mut fixture = active();
    fixture.send_pages(1, &[7, 5, 6]);
    assert_eq!(fixture.taken(), []);
    assert!(fixture.bench.rings[1].take_used().is_some());
    assert_eq!(fixture.counted("deflated"), 3);
}

#[test]
fn what_is_outside_of_memory_or_too_much_is_left_alone() {
    let mut fixture = active();
    let last = (MEMORY as u64 / PAGE) as u32 - 1;
    fixture.send_pages(0, &[last, last + 1, u32::MAX]);
    assert_eq!(fixture.taken(), [(MEMORY as u64 - PAGE, PAGE)]);
    assert_eq!(fixture.counted("skipped"), 2);
    // Every other page, more of them than one request may have.
    let pages: Vec<u32> = (0..PAGES as u32 + 10).map(|n| 2 * n).collect();
    fixture.send_pages(0, &pages);
    assert_eq!(fixture.taken().len(), PAGES);
    assert_eq!(fixture.counted("skipped"), 2 + 10);
    assert!(!fixture.bench.needs_reset());
    // A list of all of memory.
    fixture.bench.rings[0].offer(&[(0, MEMORY as u32, false)]);
    fixture.bench.kick(0);
    assert!(fixture.taken().len() <= PAGES);
}

#[test]
fn free_pages_are_discarded_where_they_are_whole() {
    let mut fixture = active();
    let unaligned = (AT + 1, 3 * PAGE as u32, true);
    let small = (AT + 8 * PAGE, 100, true);
    fixture.bench.rings[REPORTING].offer(&[(AT, 1 << 21, true), unaligned, small]);
    fixture.bench.kick(REPORTING);
    assert_eq!(fixture.taken(), [(AT, 1 << 21), (AT + PAGE, 2 * PAGE)]);
    assert_eq!(fixture.counted("skipped"), 1);
    assert_eq!(fixture.counted("reported_bytes"), (1 << 21) + 2 * PAGE);
    assert!(fixture.bench.rings[REPORTING].take_used().is_some());
}

#[test]
fn nobody_has_more_free_pages_than_memory() {
    let mut fixture = active();
    let all = (0, MEMORY as u32, true);
    fixture.bench.rings[REPORTING].offer(&[all, all, all]);
    fixture.bench.kick(REPORTING);
    assert_eq!(fixture.taken(), [(0, MEMORY as u64)]);
}

#[test]
fn a_turn_is_bounded_and_the_rest_follows() {
    let mut fixture = active();
    fixture.bench.fill(AT, &[0; 4]);
    for _ in 0..TURN * 3 {
        fixture.bench.rings[0].offer(&[(AT, 4, false)]);
    }
    fixture.device().kicks()[0].write(1).unwrap();
    fixture.bench.turn(0);
    assert_eq!(fixture.taken().len(), usize::from(TURN));
    fixture.bench.settle();
    assert_eq!(fixture.taken().len(), usize::from(TURN * 2));
}

#[test]
fn a_host_that_keeps_its_pages_is_counted() {
    let mut fixture = inactive(true);
    fixture.bench.activate(FEATURES).unwrap();
    fixture.send_pages(0, &[1]);
    assert_eq!(fixture.counted("failures"), 1);
    assert!(fixture.bench.rings[0].take_used().is_some());
}

#[test]
fn the_target_is_read_and_the_actual_size_is_written() {
    let fixture = active();
    fixture.device().set_target(3);
    assert_eq!(fixture.bench.interrupt.pending(), CONFIG_CHANGE);
    let mut data = [0; 4];
    fixture.device().read_config(0, &mut data);
    assert_eq!(u32::from_le_bytes(data), 3 * 256);
    fixture.device().write_config(0, &[9; 4]);
    fixture.device().write_config(4, &512u32.to_le_bytes());
    fixture.device().write_config(5, &[9; 2]);
    assert_eq!(fixture.device().actual(), 2 << 20);
    fixture.device().read_config(4, &mut data);
    assert_eq!(u32::from_le_bytes(data), 512);
    fixture.device().read_config(u64::MAX, &mut data);
    fixture.device().set_target(u32::MAX);
    fixture.device().read_config(0, &mut data);
    assert_eq!(u32::from_le_bytes(data), u32::MAX, "no more than the number can hold");
    fixture.device().reset();
    assert_eq!(fixture.device().actual(), 0);
}

#[test]
fn statistics_are_kept_until_newer_ones_are_wanted() {
    let mut fixture = active();
    assert!(!fixture.device().request_stats(), "there is nothing to give back");
    let head = fixture.send_stats(&[(4, 100), (5, 300), (6, 200), (99, 1)]);
    assert_eq!(fixture.bench.rings[STATISTICS].take_used(), None);
    {
        let device = fixture.device();
        let stats = device.stats();
        assert_eq!((stats.free(), stats.total(), stats.available()), (Some(100), Some(300), Some(200)));
        assert_eq!(stats.list(), [("free_bytes", 100), ("total_bytes", 300), ("available_bytes", 200)]);
    }
    assert!(fixture.device().request_stats());
    assert!(!fixture.device().request_stats(), "it is asked already");
    assert_eq!(fixture.bench.rings[STATISTICS].take_used(), Some((head, 0)));
    assert!(fixture.bench.interrupted());
    let second = fixture.send_stats(&[(4, 50)]);
    assert_eq!(fixture.device().stats().free(), Some(50));
    // Two at once, as no driver does.
    let third = fixture.send_stats(&[(4, 40)]);
    assert_eq!(fixture.bench.rings[STATISTICS].take_used(), Some((second, 0)));
    assert!(fixture.device().request_stats());
    assert_eq!(fixture.bench.rings[STATISTICS].take_used(), Some((third, 0)));
}

#[test]
fn without_statistics_the_third_ring_is_for_reports() {
    let mut fixture = inactive(false);
    fixture.bench.activate(FEATURES & !(1 << 1)).unwrap();
    fixture.bench.rings[2].offer(&[(AT, PAGE as u32, true)]);
    fixture.bench.kick(2);
    assert_eq!(fixture.taken(), [(AT, PAGE)]);
    fixture.bench.rings[3].offer(&[(AT, PAGE as u32, true)]);
    fixture.bench.kick(3);
    assert_eq!(fixture.taken(), []);
    fixture.device().pause();
    assert_eq!(fixture.device().save().rings().len(), 4);
}

#[test]
fn a_liar_stops_the_device_until_its_reset() {
    let mut fixture = active();
    fixture.bench.rings[0].set_available_index(QUEUE_SIZE + 1);
    fixture.bench.kick(0);
    assert!(fixture.bench.needs_reset());
    assert_eq!(fixture.counted("faults"), 1);
    fixture.send_pages(1, &[1]);
    assert_eq!(fixture.bench.rings[1].take_used(), None);
    fixture.device().reset();
    for ring in 0..4 {
        let at = 0x10_0000 * (ring as u64 + 1);
        fixture.bench.rings[ring] = DriverRing::new(&fixture.bench.memory, at, QUEUE_SIZE);
    }
    fixture.bench.activate(FEATURES).unwrap();
    fixture.send_pages(0, &[1]);
    assert_eq!(fixture.taken(), [(PAGE, PAGE)]);
}

#[test]
fn paused_it_rests_and_saved_it_goes_on_elsewhere() {
    let mut fixture = active();
    fixture.device().set_target(5);
    fixture.device().write_config(4, &256u32.to_le_bytes());
    let head = fixture.send_stats(&[(4, 77)]);
    fixture.device().pause();
    fixture.send_pages(0, &[1]);
    assert_eq!(fixture.taken(), []);
    assert!(!fixture.device().request_stats());
    let state = fixture.device().save();

    let mut other = inactive(false);
    assert!(other.device().restore(&state));
    other.bench.memory = fixture.bench.memory.clone();
    let rings = state.rings().iter().map(|ring| ring.queue().unwrap()).collect();
    let (memory, interrupt) = (fixture.bench.memory.clone(), fixture.bench.interrupt.clone());
    let activation = crate::Activation { memory, features: FEATURES, queues: rings, interrupt };
    other.device().activate(activation).unwrap();
    assert_eq!(other.device().actual(), 1 << 20);
    assert_eq!(other.device().stats().free(), Some(77));
    other.device().resume();
    assert_eq!(other.taken(), [(PAGE, PAGE)]);
    assert!(other.device().request_stats());
    assert_eq!(fixture.bench.rings[STATISTICS].take_used(), Some((head, 0)));

    assert!(!other.device().restore(&DeviceState::Rng(crate::rng::State::default())));
    let impossible = State { held: Some(QUEUE_SIZE), ..State::default() };
    assert!(!other.device().restore(&DeviceState::Balloon(impossible)));
}

#[test]
fn a_stretch_does_not_cross_regions() {
    let ranges = [(GuestAddress(0), 4 * PAGE as usize), (GuestAddress(4 * PAGE), 4 * PAGE as usize)];
    let memory: crate::Memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let expected = [Run { start: 3 * PAGE, len: PAGE }, Run { start: 4 * PAGE, len: 2 * PAGE }];
    assert_eq!(runs(&memory, vec![5, 4, 3]), expected);
}

proptest! {
    #[test]
    fn stretches_are_the_pages_in_memory(pages in prop::collection::vec(0u32..5000, 0..300)) {
        let memory = memory();
        let mut expected: Vec<u64> =
            pages.iter().map(|p| u64::from(*p) * PAGE).filter(|at| at + PAGE <= MEMORY as u64).collect();
        expected.sort_unstable();
        expected.dedup();
        let runs = runs(&memory, pages);
        let got: Vec<u64> =
            runs.iter().flat_map(|r| (r.start..r.start + r.len).step_by(PAGE as usize)).collect();
        prop_assert_eq!(got, expected);
    }

    #[test]
    fn whole_pages_lie_inside(address: u64, len: u64) {
        if let Some(run) = whole_pages(address, len) {
            prop_assert!(run.start >= address && run.len <= len && run.len > 0);
            prop_assert!(run.start % PAGE == 0 && run.len % PAGE == 0);
            prop_assert!(run.start - address < PAGE);
        }
    }

    #[test]
    fn any_list_of_statistics_can_be_read(list in prop::collection::vec(any::<u8>(), 0..1000)) {
        prop_assert!(Stats::parse(&list).list().len() <= 16);
    }
}
