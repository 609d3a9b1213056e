//! What no honest driver does, and hosts that take the ground away.

use super::*;

#[test]
fn each_lie_has_its_status_and_its_counter() {
    type Lie = (&'static str, u32, u64, &'static [(u64, u32, bool)], u32);
    let lies: &[Lie] = &[
        ("out_of_range", VIRTIO_BLK_T_IN, SECTORS, &[(DATA, 512, true)], VIRTIO_BLK_S_IOERR),
        ("out_of_range", VIRTIO_BLK_T_IN, SECTORS - 1, &[(DATA, 1024, true)], VIRTIO_BLK_S_IOERR),
        ("out_of_range", VIRTIO_BLK_T_OUT, SECTORS, &[(DATA, 512, false)], VIRTIO_BLK_S_IOERR),
        ("out_of_range", VIRTIO_BLK_T_OUT, u64::MAX, &[(DATA, 512, false)], VIRTIO_BLK_S_IOERR),
        ("out_of_range", VIRTIO_BLK_T_IN, 1 << 55, &[(DATA, 512, true)], VIRTIO_BLK_S_IOERR),
        ("malformed", VIRTIO_BLK_T_IN, 0, &[], VIRTIO_BLK_S_IOERR),
        ("malformed", VIRTIO_BLK_T_OUT, 0, &[], VIRTIO_BLK_S_IOERR),
        ("malformed", VIRTIO_BLK_T_IN, 0, &[(DATA, 511, true)], VIRTIO_BLK_S_IOERR),
        ("malformed", VIRTIO_BLK_T_OUT, 0, &[(DATA, 513, false)], VIRTIO_BLK_S_IOERR),
        ("malformed", VIRTIO_BLK_T_IN, 0, &[(DATA, 512, false)], VIRTIO_BLK_S_IOERR),
        ("malformed", VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, true)], VIRTIO_BLK_S_IOERR),
        ("malformed", VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 19, true)], VIRTIO_BLK_S_IOERR),
        ("malformed", VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 15, false)], VIRTIO_BLK_S_IOERR),
        ("malformed", VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 17, false)], VIRTIO_BLK_S_IOERR),
        ("oversized", VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 32, false)], VIRTIO_BLK_S_IOERR),
        ("unsupported", 0x1234, 0, &[(DATA, 512, true)], VIRTIO_BLK_S_UNSUPP),
        ("unsupported", VIRTIO_BLK_T_SECURE_ERASE, 0, &[(DATA, 16, false)], VIRTIO_BLK_S_UNSUPP),
    ];
    for engine in ENGINES {
        for (counter, kind, sector, data, status) in lies {
            let mut disk = Disk::new(engine);
            assert_eq!(
                disk.request(*kind, *sector, data),
                (*status, 1),
                "{counter} {kind} {sector} {data:?}"
            );
            assert_eq!(disk.counted(counter), 1, "{counter} {kind} {sector} {data:?}");
            assert!(!disk.bench.needs_reset());
        }
    }
}

#[test]
fn lying_ranges_are_refused() {
    let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    let lies = [
        (VIRTIO_BLK_T_DISCARD, range(0, 1, unmap), "unsupported"),
        (VIRTIO_BLK_T_DISCARD, range(0, 1, 2), "unsupported"),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(0, 1, 2), "unsupported"),
        (VIRTIO_BLK_T_DISCARD, range(0, 0, 0), "malformed"),
        (VIRTIO_BLK_T_DISCARD, range(SECTORS, 1, 0), "out_of_range"),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(SECTORS - 1, 2, unmap), "out_of_range"),
        (VIRTIO_BLK_T_DISCARD, range(u64::MAX, 1, 0), "out_of_range"),
        (VIRTIO_BLK_T_DISCARD, range(0, RANGE_SECTORS + 1, 0), "oversized"),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(0, u32::MAX, 0), "oversized"),
    ];
    for (kind, range, counter) in lies {
        let mut disk = Disk::new(EngineChoice::Auto);
        disk.bench.fill(DATA, &range);
        assert_ne!(disk.request(kind, 0, &[(DATA, 16, false)]).0, VIRTIO_BLK_S_OK);
        assert_eq!(disk.counted(counter), 1, "{range:?}");
        assert_eq!(disk.stored(1, 512), [1; 512]);
    }
    // What was not agreed on is not there.
    let mut disk = Disk::with(1 << VIRTIO_BLK_F_FLUSH, EngineChoice::Auto, false);
    disk.bench.fill(DATA, &range(0, 1, 0));
    assert_eq!(disk.request(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16, false)]).0, VIRTIO_BLK_S_UNSUPP);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    for engine in ENGINES {
        let mut disk = Disk::with(1 << VIRTIO_BLK_F_FLUSH, engine, true);
        let features = disk.bench.device.lock().unwrap().features();
        assert_ne!(features & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(features & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
        let answer = disk.request(VIRTIO_BLK_T_OUT, 1, &[(DATA, 512, false)]);
        assert_eq!(answer, (VIRTIO_BLK_S_IOERR, 1));
        assert_eq!(disk.counted("read_only"), 1);
        assert_eq!(disk.stored(1, 512), [1; 512]);
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, 1, &[(DATA, 512, true)]).0, VIRTIO_BLK_S_OK);
    }
}

#[test]
fn without_a_status_byte_or_a_header_nothing_is_done() {
    let mut disk = Disk::new(EngineChoice::Auto);
    disk.bench.fill(HEADER, &header(VIRTIO_BLK_T_OUT, 1));
    disk.bench.fill(DATA, &[0xee; 512]);
    for chain in [&[(HEADER, 16, false), (DATA, 512, false)][..], &[(HEADER, 0, false)], &[(DATA, 0, true)]] {
        let head = disk.bench.rings[0].offer(chain);
        disk.bench.kick(0);
        assert_eq!(disk.answer(), (head, 0));
    }
    assert_eq!(disk.counted("no_status"), 3);
    for header in [&[][..], &[(HEADER, 15, false)]] {
        let chain = [header, &[(STATUS, 1, true)]].concat();
        let head = disk.bench.rings[0].offer(&chain);
        disk.bench.kick(0);
        assert_eq!(disk.answer(), (head, 1));
        assert_eq!(disk.bench.bytes(STATUS, 1), [VIRTIO_BLK_S_IOERR as u8]);
    }
    assert_eq!(disk.counted("malformed"), 2);
    assert_eq!(disk.stored(1, 512), [1; 512]);
}

#[test]
fn more_than_the_disk_allows_is_refused_at_once() {
    let mut disk = Disk::new(EngineChoice::Auto);
    disk.file.set_len(1 << 30).unwrap();
    disk.bench.device.lock().unwrap().resize_to_file().unwrap();
    // 127 MiB in memory of 16 MiB: the same buffer again and again, through an indirect table.
    let pieces = 127 * 1024 * 1024 / (4 << 20) + 1;
    let buffers: Vec<_> = (0..pieces).map(|_| (BUFFERS, 4 << 20, true)).collect();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &buffers).0, VIRTIO_BLK_S_IOERR);
    // Many pieces.
    let table = DATA;
    let mut entries = Vec::new();
    let descriptors: u16 = 600;
    for n in 0..descriptors {
        let (address, len, flags) = match n {
            0 => (HEADER, 16u32, crate::testing::NEXT),
            n if n == descriptors - 1 => (STATUS, 1, crate::testing::WRITE),
            _ => (DATA + 0x10000, 512, crate::testing::NEXT | crate::testing::WRITE),
        };
        entries.extend(u64::to_le_bytes(address));
        entries.extend(len.to_le_bytes());
        entries.extend(flags.to_le_bytes());
        entries.extend((n + 1).to_le_bytes());
    }
    disk.bench.fill(table, &entries);
    disk.bench.fill(HEADER, &header(VIRTIO_BLK_T_IN, 0));
    disk.bench.rings[0].descriptor(100, table, entries.len() as u32, crate::testing::INDIRECT, 0);
    disk.bench.rings[0].offer_head(100);
    disk.bench.kick(0);
    assert_eq!(disk.answer(), (100, 1));
    assert_eq!(disk.counted("oversized"), 2);
}

#[test]
fn one_chain_offered_without_end_is_served_within_bounds() {
    for engine in ENGINES {
        let mut disk = Disk::new(engine);
        let head = disk.offer(VIRTIO_BLK_T_IN, 2, &[(DATA, 512, true)]);
        for _ in 1..QUEUE_SIZE {
            disk.bench.rings[0].offer_head(head);
        }
        disk.bench.kick(0);
        for _ in 0..QUEUE_SIZE {
            assert!(disk.in_flight() <= usize::from(QUEUE_SIZE));
            assert_eq!(disk.answer(), (head, 513));
        }
        assert_eq!(disk.counted("requests"), u64::from(QUEUE_SIZE));
    }
}

#[test]
fn more_than_can_be_in_flight_waits_and_is_served() {
    let depth = u64::from(QUEUE_SIZE);
    for _ in 0..100 {
        let mut disk = Disk::new(EngineChoice::Auto);
        // A flush takes its time. A driver that does not wait for answers offers twice what there is.
        let head = disk.offer(VIRTIO_BLK_T_FLUSH, 0, &[]);
        for n in 1..2 * depth {
            if n == depth {
                disk.bench.device.lock().unwrap().run();
            }
            disk.bench.rings[0].offer_head(head);
        }
        disk.bench.device.lock().unwrap().run();
        assert!(disk.in_flight() as u64 <= depth);
        let full = disk.counted("full") > 0;
        // Nobody kicks any more.
        for _ in 0..2 * depth {
            assert_eq!(disk.answer(), (head, 1));
        }
        assert_eq!((disk.counted("flushes"), disk.counted("io_errors")), (2 * depth, 0));
        if full {
            return;
        }
    }
    panic!("io_uring was never full");
}

#[test]
fn a_lying_ring_stops_the_device_until_its_reset() {
    for engine in ENGINES {
        let mut disk = Disk::new(engine);
        disk.offer(VIRTIO_BLK_T_IN, 2, &[(DATA, 512, true)]);
        disk.bench.rings[0].offer(&[(u64::MAX - 8, 64, true)]);
        disk.bench.kick(0);
        assert!(disk.bench.needs_reset());
        assert_eq!(disk.counted("faults"), 1);
        disk.bench.device.lock().unwrap().reset();
        assert_eq!(disk.in_flight(), 0);
        disk.bench.settle();
        disk.bench.rings[0] = DriverRing::new(&disk.bench.memory, 0x10_0000, QUEUE_SIZE);
        disk.bench.activate(ALL).unwrap();
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, 2, &[(DATA, 512, true)]).0, VIRTIO_BLK_S_OK);
    }
}

#[test]
fn a_reset_waits_for_what_writes_to_memory() {
    let mut disk = Disk::new(EngineChoice::Auto);
    for n in 0..8 {
        disk.offer(VIRTIO_BLK_T_IN, n, &[(DATA, 512 << 10, true)]);
    }
    disk.bench.device.lock().unwrap().kicks()[0].write(1).unwrap();
    disk.bench.turn(0);
    disk.bench.device.lock().unwrap().reset();
    assert_eq!(disk.in_flight(), 0);
    disk.bench.fill(DATA, &[0xcc; 4096]);
    disk.bench.settle();
    assert_eq!(disk.bench.bytes(DATA, 4096), [0xcc; 4096]);
}

#[test]
fn a_file_that_shrank_is_an_error_of_the_disk() {
    for engine in ENGINES {
        let mut disk = Disk::new(engine);
        disk.file.set_len(10 * SECTOR).unwrap();
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, 9, &[(DATA, 1024, true)]).0, VIRTIO_BLK_S_IOERR);
        assert_eq!(disk.counted("io_errors"), 1);
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, 9, &[(DATA, 512, true)]).0, VIRTIO_BLK_S_OK);
    }
}

fn buffer() -> impl Strategy<Value = (u64, u32, bool)> {
    let len = prop_oneof![Just(0u32), Just(1), Just(16), Just(512), Just(1024), 0..5000u32];
    (0..0x8000u64, len, any::<bool>()).prop_map(|(at, len, writable)| (DATA + at, len, writable))
}

fn any_header() -> impl Strategy<Value = [u8; 16]> {
    let kind = prop_oneof![0..16u32, any::<u32>()];
    let sector = prop_oneof![0..SECTORS + 2, any::<u64>()];
    (kind, sector).prop_map(|(kind, sector)| header(kind, sector))
}

fn any_range() -> impl Strategy<Value = [u8; 16]> {
    let sector = prop_oneof![0..SECTORS + 2, any::<u64>()];
    let count = prop_oneof![0..40u32, any::<u32>()];
    (sector, count, 0..4u32).prop_map(|(sector, count, flags)| range(sector, count, flags))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever is offered is answered or stops the device, and the file keeps its size and what lies
    /// behind the disk's last whole sector.
    #[test]
    fn nothing_gets_behind_the_end(
        headers in prop::collection::vec((any_header(), any_range()), 1..6),
        chains in prop::collection::vec((any::<prop::sample::Index>(), prop::collection::vec(buffer(), 0..6), any::<bool>()), 1..12),
        plain in any::<bool>(),
    ) {
        let file = image();
        file.write_all_at(&[0xee; 100], SECTORS * SECTOR).unwrap();
        let engine = ENGINES[usize::from(plain)];
        let block = Block::new(config(&file, engine)).unwrap();
        let mut disk = Disk::of(block, file, ALL);
        for (n, (header, range)) in headers.iter().enumerate() {
            disk.bench.fill(HEADER + 32 * n as u64, &[*header, *range].concat());
        }
        let mut offered = 0;
        for (n, (header, buffers, status)) in chains.iter().enumerate() {
            let mut chain: Vec<_> = vec![(HEADER + 32 * header.index(headers.len()) as u64, 16, false)];
            if buffers.len() == 3 {
                chain[0].1 = 32;
            }
            let (readable, writable): (Vec<(u64, u32, bool)>, Vec<_>) =
                buffers.iter().copied().partition(|b| !b.2);
            chain.extend(readable);
            chain.extend(writable);
            if *status {
                chain.push((STATUS + 0x800 + n as u64, 1, true));
            }
            disk.bench.rings[0].offer(&chain);
            offered += 1;
        }
        disk.bench.kick(0);
        for _ in 0..offered {
            disk.answer();
        }
        prop_assert_eq!(disk.counted("requests"), offered);
        prop_assert!(!disk.bench.needs_reset());
        prop_assert_eq!(disk.file.metadata().unwrap().len(), SECTORS * SECTOR + 100);
        prop_assert_eq!(disk.stored(SECTORS, 100), [0xee; 100]);
    }
}
