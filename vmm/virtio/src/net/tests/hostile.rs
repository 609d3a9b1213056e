//! What no honest driver does.

use proptest::prelude::*;

use super::*;

#[test]
fn each_lie_about_a_frame_is_counted_and_given_back() {
    type Lie = (&'static str, &'static [(u64, u32, bool)]);
    let lies: &[Lie] = &[
        ("tx_malformed", &[(SENT, 0, false)]),
        ("tx_malformed", &[(SENT, 11, false)]),
        ("tx_malformed", &[(SENT, 12, false)]),
        ("tx_malformed", &[(SENT, 25, false)]),
        ("tx_malformed", &[(SENT, 100, true)]),
        ("tx_malformed", &[(SENT, 100, false), (SENT, 1, true)]),
        ("tx_oversized", &[(SENT, FRAME_LIMIT as u32 + 1, false)]),
        ("tx_oversized", &[(BUFFERS, 4 << 20, false), (BUFFERS, 4 << 20, false)]),
    ];
    for (counter, lie) in lies {
        let mut card = Card::new(0);
        let head = card.send(lie);
        assert_eq!(card.bench.rings[TX].take_used(), Some((head, 0)), "{lie:?}");
        assert_eq!((card.counted(counter), card.sent()), (1, None), "{lie:?}");
        assert!(!card.bench.needs_reset());
    }
    let mut card = Card::new(0);
    card.send(&[(SENT, FRAME_LIMIT as u32, false)]);
    assert_eq!(card.sent().unwrap().len(), FRAME_LIMIT, "the largest that is");
}

#[test]
fn a_frame_in_too_many_pieces_is_dropped() {
    let mut card = Card::new(0);
    let descriptors = 1100u16;
    let mut table = Vec::new();
    for n in 0..descriptors {
        let last = n == descriptors - 1;
        table.extend(SENT.to_le_bytes());
        table.extend(20u32.to_le_bytes());
        table.extend(if last { 0u16 } else { crate::testing::NEXT }.to_le_bytes());
        table.extend((n + 1).to_le_bytes());
    }
    card.bench.fill(BUFFERS, &table);
    card.bench.rings[TX].descriptor(9, BUFFERS, table.len() as u32, crate::testing::INDIRECT, 0);
    card.bench.rings[TX].offer_head(9);
    card.bench.kick(TX);
    assert_eq!(card.bench.rings[TX].take_used(), Some((9, 0)));
    assert_eq!(card.counted("tx_malformed"), 1);
}

#[test]
fn buffers_that_are_none_are_given_back_in_order() {
    for features in [0, MERGE] {
        let mut card = Card::new(features);
        let good = card.offer(0, 100);
        let small = card.offer(1, 11);
        let readable = card.bench.rings[RX].offer(&[(BUFFERS, 100, false)]);
        let both = card.bench.rings[RX].offer(&[(BUFFERS, 100, false), (BUFFERS, 100, true)]);
        let last = card.offer(4, 100);
        card.bench.kick(RX);
        assert_eq!(card.bench.rings[RX].take_used(), None, "what is held stays in order");
        card.arrive(&frame(60));
        card.arrive(&frame(61));
        let used: Vec<_> = std::iter::from_fn(|| card.bench.rings[RX].take_used()).collect();
        assert_eq!(used, [(good, 72), (small, 0), (readable, 0), (both, 0), (last, 73)]);
        assert_eq!(card.counted("rx_malformed"), 3);
    }
}

#[test]
fn a_frame_that_meets_no_buffer_is_dropped() {
    let mut card = Card::new(MERGE);
    let good = card.offer(0, 100);
    card.bench.kick(RX);
    card.arrive(&frame(500));
    let small = card.offer(1, 11);
    card.bench.kick(RX);
    assert_eq!(card.counted("rx_too_small"), 1);
    card.arrive(&frame(60));
    let used: Vec<_> = std::iter::from_fn(|| card.bench.rings[RX].take_used()).collect();
    assert_eq!(used, [(good, 72), (small, 0)]);
}

#[test]
fn a_pause_drops_a_frame_that_is_half_placed() {
    let mut card = Card::new(MERGE);
    let good = card.offer(0, 100);
    card.bench.kick(RX);
    card.arrive(&frame(500));
    card.bench.device.lock().unwrap().pause();
    assert_eq!(card.counted("rx_dropped"), 1);
    assert_eq!(card.bench.device.lock().unwrap().save().rings()[RX].next_avail, 0);
    card.bench.device.lock().unwrap().resume();
    card.arrive(&frame(60));
    assert_eq!(card.bench.rings[RX].take_used(), Some((good, 72)));
}

#[test]
fn a_frame_beyond_all_limits_is_dropped() {
    let mut card = Card::new(MERGE);
    card.offer(0, 1 << 17);
    card.bench.kick(RX);
    for _ in 0..2 {
        card.offer(1, 100);
    }
    card.arrive(&frame(60));
    assert_eq!(card.bench.rings[RX].take_used().unwrap().1, 72);
    card.arrive(&frame(66000));
    assert_eq!(card.counted("rx_too_small"), 1);
    card.arrive(&[0; 5]);
    assert_eq!(card.counted("rx_errors"), 1);
    card.arrive(&frame(60));
    assert_eq!(card.bench.rings[RX].take_used().unwrap().1, 72);
}

#[test]
fn a_lying_ring_stops_the_device_until_its_reset() {
    for lying in [RX, TX] {
        let mut card = Card::new(MERGE);
        card.bench.rings[lying].offer(&[(u64::MAX - 8, 64, lying == RX)]);
        card.bench.kick(lying);
        assert!(card.bench.needs_reset() && card.bench.interrupted());
        assert_eq!(card.counted("faults"), 1);
        card.bench.fill(SENT, &frame(60));
        card.send(&[(SENT, 72, false)]);
        assert_eq!(card.sent(), None, "what follows is not looked at");
        card.bench.device.lock().unwrap().reset();
        card.bench.rings = rings(&card);
        card.bench.activate(0).unwrap();
        card.bench.settle();
        card.send(&[(SENT, 72, false)]);
        assert_eq!(card.sent(), Some(frame(60)));
    }
}

#[test]
fn one_buffer_offered_without_end_ends() {
    for features in [0, MERGE] {
        let mut card = Card::new(features);
        let head = card.offer(0, 12);
        for _ in 1..QUEUE_SIZE {
            card.bench.rings[RX].offer_head(head);
        }
        card.bench.kick(RX);
        for _ in 0..10 {
            card.arrive(&frame(60));
        }
        card.bench.device.lock().unwrap().pause();
        assert!(!card.bench.needs_reset());
    }
}

fn buffers() -> impl Strategy<Value = Vec<(u64, u32, bool)>> {
    let len = prop_oneof![Just(0u32), Just(11), Just(12), 0..200u32, 0..70000u32];
    prop::collection::vec((0..0x1000u64, len, prop::bool::weighted(0.9)), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is offered and whatever arrives: no panic, every chain comes back at most once, what a
    /// frame is said to fill is no more than its buffers, and a pause leaves the ring where its driver
    /// thinks it is.
    #[test]
    fn whatever_is_offered(
        receive in prop::collection::vec(buffers(), 0..20),
        send in prop::collection::vec(buffers(), 0..20),
        frames in prop::collection::vec(0..3000usize, 0..10),
        merge in any::<bool>(),
    ) {
        let mut card = Card::new(if merge { MERGE } else { 0 });
        let place = |chain: &[(u64, u32, bool)], at: u64| -> Vec<(u64, u32, bool)> {
            let moved = chain.iter().map(|&(a, len, w)| (at + a, len, w));
            let (readable, writable): (Vec<_>, Vec<_>) = moved.partition(|b| !b.2);
            [readable, writable].concat()
        };
        let mut room = std::collections::HashMap::new();
        for chain in &receive {
            let chain = place(chain, BUFFERS);
            let size: u32 = chain.iter().filter(|b| b.2).map(|b| b.1).sum();
            room.insert(card.bench.rings[RX].offer(&chain), size);
        }
        for chain in &send {
            let chain: Vec<_> = place(chain, SENT).iter().map(|&(a, len, w)| (a, len, !w)).collect();
            let (readable, writable): (Vec<_>, Vec<_>) = chain.into_iter().partition(|b| !b.2);
            card.bench.rings[TX].offer(&[readable, writable].concat());
        }
        card.bench.kick(RX);
        card.bench.kick(TX);
        for &len in &frames {
            card.arrive(&frame(len));
        }
        while card.sent().is_some() {
            card.bench.settle();
        }
        prop_assert!(!card.bench.needs_reset());
        prop_assert_eq!(std::iter::from_fn(|| card.bench.rings[TX].take_used()).count(), send.len());
        let mut back = 0;
        while let Some((head, len)) = card.bench.rings[RX].take_used() {
            let size = room.remove(&head);
            prop_assert!(size.is_some_and(|size| len <= size), "{} of {:?}", len, size);
            back += 1;
        }
        card.bench.device.lock().unwrap().pause();
        let state = card.bench.device.lock().unwrap().save();
        prop_assert_eq!((state.rings()[RX].next_avail, state.rings()[RX].next_used), (back, back));
    }
}
