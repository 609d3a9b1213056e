use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::testing::{BUFFERS, DriverRing, INDIRECT, MEMORY, NEXT, WRITE, memory};

fn rings(size: u16) -> (DriverRing, Ring) {
    let memory = memory();
    let driver = DriverRing::new(&memory, 0x1000, size);
    let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
    let ring = Ring::new(driver.queue(size), memory, interrupt).unwrap();
    (driver, ring)
}

#[test]
fn a_ring_outside_of_memory_is_none() {
    let memory = memory();
    let driver = DriverRing::new(&memory, MEMORY as u64 - 64, 16);
    let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
    assert!(Ring::new(driver.queue(16), memory, interrupt).is_none());
}

#[test]
fn requests_come_in_order_with_their_buffers() {
    let (mut driver, mut ring) = rings(8);
    driver.offer(&[(BUFFERS, 4, false), (BUFFERS + 64, 8, true)]);
    driver.offer(&[(BUFFERS + 128, 1, true)]);
    let first = ring.pop().unwrap().unwrap();
    assert_eq!((first.head, total(&first.readable), total(&first.writable)), (0, 4, 8));
    assert_eq!(ring.pop().unwrap().unwrap().head, 2);
    assert_eq!(ring.pop(), Ok(None));
}

#[test]
fn bytes_cross_buffers() {
    let (mut driver, mut ring) = rings(8);
    driver.offer(&[
        (BUFFERS, 3, false),
        (BUFFERS + 64, 3, false),
        (BUFFERS + 128, 2, true),
        (BUFFERS, 9, true),
    ]);
    let chain = ring.pop().unwrap().unwrap();
    let memory = ring.memory();
    memory.write_slice(b"abc", GuestAddress(BUFFERS)).unwrap();
    memory.write_slice(b"def", GuestAddress(BUFFERS + 64)).unwrap();
    let mut out = [0; 4];
    assert_eq!(chain.read(memory, 1, &mut out), Ok(4));
    assert_eq!(&out, b"bcde");
    assert_eq!(chain.read(memory, 4, &mut out), Ok(2), "no more than there is");
    assert_eq!(chain.write(memory, 1, b"xyz"), Ok(3));
    let mut byte = [0; 1];
    memory.read_slice(&mut byte, GuestAddress(BUFFERS + 129)).unwrap();
    assert_eq!(&byte, b"x");
}

fn error_of(lie: impl FnOnce(&mut DriverRing)) -> RingError {
    let (mut driver, mut ring) = rings(8);
    lie(&mut driver);
    ring.pop().unwrap_err()
}

#[test]
fn every_lie_is_an_error() {
    assert_eq!(error_of(|d| d.set_available_index(9)), RingError::Index);
    assert_eq!(error_of(|d| d.offer_head(8)), RingError::Chain);
    let outside = |d: &mut DriverRing| {
        d.offer(&[(MEMORY as u64 - 1, 2, true)]);
    };
    assert_eq!(error_of(outside), RingError::Chain);
    let looping = |d: &mut DriverRing| {
        d.descriptor(0, BUFFERS, 1, NEXT, 0);
        d.offer_head(0);
    };
    assert_eq!(error_of(looping), RingError::Chain);
    let leaving = |d: &mut DriverRing| {
        d.descriptor(0, BUFFERS, 1, NEXT, 500);
        d.offer_head(0);
    };
    assert_eq!(error_of(leaving), RingError::Chain);
    let disordered = |d: &mut DriverRing| {
        d.offer(&[(BUFFERS, 1, true), (BUFFERS, 1, false)]);
    };
    assert_eq!(error_of(disordered), RingError::Order);
    let crooked_table = |d: &mut DriverRing| {
        d.descriptor(0, BUFFERS, 17, INDIRECT, 0);
        d.offer_head(0);
    };
    assert_eq!(error_of(crooked_table), RingError::Chain);
}

#[test]
fn an_indirect_table_is_followed_and_a_nested_one_is_not() {
    let (mut driver, mut ring) = rings(8);
    let table = DriverRing::new(ring.memory(), BUFFERS, 8);
    table.descriptor(0, BUFFERS + 4096, 5, NEXT, 1);
    table.descriptor(1, BUFFERS + 8192, 6, WRITE, 0);
    driver.descriptor(0, BUFFERS, 32, INDIRECT, 0);
    driver.offer_head(0);
    let chain = ring.pop().unwrap().unwrap();
    assert_eq!((total(&chain.readable), total(&chain.writable)), (5, 6));
    table.descriptor(1, BUFFERS, 32, INDIRECT, 0);
    driver.offer_head(0);
    assert_eq!(ring.pop(), Err(RingError::Chain));
}

#[test]
fn a_table_of_any_length_is_followed_so_far_only() {
    for (descriptors, fine) in [(CHAIN_LIMIT, true), (CHAIN_LIMIT + 1, false), (65_535, false)] {
        let (mut driver, mut ring) = rings(8);
        for n in 0..descriptors {
            let table = DriverRing::new(ring.memory(), BUFFERS, 8);
            let flags = if n + 1 == descriptors { WRITE } else { WRITE | NEXT };
            table.descriptor(n as u16, 0x8000, 1, flags, n as u16 + 1);
        }
        driver.descriptor(0, BUFFERS, 16 * descriptors as u32, INDIRECT, 0);
        driver.offer_head(0);
        assert_eq!(ring.pop().is_ok(), fine, "{descriptors}");
    }
}

#[test]
fn empty_buffers_are_left_out() {
    let (mut driver, mut ring) = rings(8);
    driver.offer(&[(BUFFERS, 0, false), (BUFFERS, 2, true)]);
    let chain = ring.pop().unwrap().unwrap();
    assert_eq!((chain.readable.len(), chain.writable.len()), (0, 1));
}

#[test]
fn a_request_put_back_comes_again() {
    let (mut driver, mut ring) = rings(8);
    driver.offer(&[(BUFFERS, 2, true)]);
    let chain = ring.pop().unwrap();
    ring.unpop();
    assert_eq!(ring.pop().unwrap(), chain);
}

#[test]
fn a_saved_ring_goes_on_where_it_was() {
    let (mut driver, mut ring) = rings(8);
    driver.offer(&[(BUFFERS, 2, true)]);
    let chain = ring.pop().unwrap().unwrap();
    ring.complete(chain.head, 2).unwrap();
    driver.offer(&[(BUFFERS, 3, true)]);
    let text = format!("{:?}", ring.save());
    let queue = ring.save().queue().unwrap();
    let mut again = Ring::new(queue, ring.memory().clone(), ring.interrupt().clone()).unwrap();
    assert_eq!(format!("{:?}", again.save()), text);
    assert_eq!(total(&again.pop().unwrap().unwrap().writable), 3);
    let bad = RingState { size: 3, ..ring.save() };
    assert!(bad.queue().is_err());
}

proptest! {
    /// Whatever a guest writes into its rings: every request that is accepted lies in memory, and no more of
    /// them come than the ring has room for.
    #[test]
    fn nothing_leaves_memory(
        table in proptest::collection::vec(any::<(u32, u32, u16, u16)>(), 8),
        heads in proptest::collection::vec(any::<u16>(), 8),
        index in any::<u16>(),
    ) {
        let (mut driver, mut ring) = rings(8);
        for (n, &(address, len, flags, next)) in table.iter().enumerate() {
            // Half of the addresses and lengths are in reach.
            driver.descriptor(n as u16, u64::from(address) >> 7, len >> 8, flags & 7, next % 16);
        }
        for head in heads {
            driver.offer_head(head % 16);
        }
        driver.set_available_index(index % 16);
        let mut popped = 0;
        while let Ok(Some(chain)) = ring.pop() {
            popped += 1;
            for span in chain.readable.iter().chain(&chain.writable) {
                prop_assert!(span.len > 0 && span.address.0 + u64::from(span.len) <= MEMORY as u64);
            }
        }
        prop_assert!(popped <= 8);
    }
}

#[test]
fn several_are_given_back_with_one_index() {
    for event_idx in [false, true] {
        let memory = memory();
        let mut driver = DriverRing::new(&memory, 0x1000, 4);
        let mut queue = driver.queue(4);
        queue.set_event_idx(event_idx);
        let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let mut ring = Ring::new(queue, memory.clone(), interrupt.clone()).unwrap();
        // The driver waits for the second of three, across the end of the ring.
        for round in 0..5u16 {
            let heads: Vec<u16> = (0..3).map(|_| driver.offer(&[(BUFFERS, 8, true)])).collect();
            let event = GuestAddress(driver.available + 4 + 2 * 4);
            memory.write_obj((round * 3 + 1).to_le(), event).unwrap();
            for _ in 0..3 {
                ring.pop().unwrap().unwrap();
            }
            let requests: Vec<_> = heads.iter().map(|&head| (head, u32::from(head) + 1)).collect();
            ring.complete_together(&requests).unwrap();
            ring.notify().unwrap();
            assert!(interrupt.line().read().is_ok(), "round {round}");
            ring.notify().unwrap();
            assert!(interrupt.line().read().is_err(), "told once");
            for request in requests {
                assert_eq!(driver.take_used(), Some(request));
            }
            assert_eq!(driver.take_used(), None);
        }
    }
}
