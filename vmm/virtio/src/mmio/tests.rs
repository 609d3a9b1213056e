use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::{
    rng::Rng,
    testing::{BUFFERS, DriverRing, memory},
};

fn transport() -> Transport {
    let device = Rng::new(|out| {
        out.fill(7);
        Ok(())
    });
    let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
    Transport::new(Arc::new(Mutex::new(device.unwrap())), interrupt, memory())
}

fn get(transport: &mut Transport, register: u32) -> u32 {
    let mut data = [0xff; 4];
    transport.read(u64::from(register), &mut data);
    u32::from_le_bytes(data)
}

fn set(transport: &mut Transport, register: u32, value: u32) {
    transport.write(u64::from(register), &value.to_le_bytes());
}

/// Goes as far as FEATURES_OK with these features.
fn negotiate(t: &mut Transport, features: u64) {
    set(t, VIRTIO_MMIO_STATUS, 0);
    set(t, VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    set(t, VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
    for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
        set(t, VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
        set(t, VIRTIO_MMIO_DRIVER_FEATURES, half);
    }
    set(t, VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

fn set_up(t: &mut Transport, ring: &DriverRing) {
    set(t, VIRTIO_MMIO_QUEUE_SEL, 0);
    set(t, VIRTIO_MMIO_QUEUE_NUM, u32::from(ring.size));
    set(t, VIRTIO_MMIO_QUEUE_DESC_LOW, ring.table as u32);
    set(t, VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring.available as u32);
    set(t, VIRTIO_MMIO_QUEUE_USED_LOW, ring.used as u32);
    set(t, VIRTIO_MMIO_QUEUE_READY, 1);
}

fn go(t: &mut Transport) {
    set(t, VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

#[test]
fn it_says_what_it_is() {
    let mut t = transport();
    assert_eq!(get(&mut t, VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(get(&mut t, VIRTIO_MMIO_VERSION), 2);
    assert_eq!(get(&mut t, VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(get(&mut t, VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
    set(&mut t, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(get(&mut t, VIRTIO_MMIO_DEVICE_FEATURES), 1);
    set(&mut t, VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(get(&mut t, VIRTIO_MMIO_QUEUE_NUM_MAX), 0, "there is one queue");
}

#[test]
fn a_driver_sets_it_up_and_uses_it() {
    let mut t = transport();
    let mut ring = DriverRing::new(&t.memory, 0x1000, 16);
    negotiate(&mut t, VERSION_1);
    set_up(&mut t, &ring);
    go(&mut t);
    assert_eq!(t.metrics().activations.get(), 1);
    ring.offer(&[(BUFFERS, 8, true)]);
    set(&mut t, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    let device = t.device().clone();
    assert!(device.lock().unwrap().kicks()[0].read().is_ok(), "the kick arrived");
    device.lock().unwrap().resume();
    assert_eq!(ring.take_used(), Some((0, 8)));
    assert_eq!(get(&mut t, VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    set(&mut t, VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(get(&mut t, VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    set(&mut t, VIRTIO_MMIO_STATUS, 0);
    assert_eq!(get(&mut t, VIRTIO_MMIO_STATUS), 0);
    assert_eq!(get(&mut t, VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn steps_out_of_order_are_refused() {
    let mut t = transport();
    go(&mut t);
    assert_eq!(get(&mut t, VIRTIO_MMIO_STATUS), 0);
    set(&mut t, VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    set(&mut t, VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(get(&mut t, VIRTIO_MMIO_STATUS), ACKNOWLEDGE);
    assert!(t.metrics().refused.get() >= 2);
    assert_eq!(t.metrics().activations.get(), 0);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for features in [0, VERSION_1 | 1 << 5] {
        let mut t = transport();
        negotiate(&mut t, features);
        assert_eq!(get(&mut t, VIRTIO_MMIO_STATUS), ACKNOWLEDGE | DRIVER, "{features:#x}");
    }
}

#[test]
fn rings_are_out_of_reach_while_the_device_has_them() {
    let mut t = transport();
    let ring = DriverRing::new(&t.memory, 0x1000, 16);
    negotiate(&mut t, VERSION_1);
    set_up(&mut t, &ring);
    let refused = t.metrics().refused.get();
    set(&mut t, VIRTIO_MMIO_QUEUE_NUM, 8);
    assert_eq!(t.metrics().refused.get(), refused + 1, "it is ready");
    go(&mut t);
    set(&mut t, VIRTIO_MMIO_QUEUE_READY, 0);
    set(&mut t, VIRTIO_MMIO_QUEUE_DESC_LOW, 0x8000);
    assert_eq!(t.metrics().refused.get(), refused + 3);
}

#[test]
fn a_ring_outside_of_memory_needs_a_reset() {
    let mut t = transport();
    let mut ring = DriverRing::new(&t.memory, 0x1000, 16);
    ring.table = 1 << 30;
    negotiate(&mut t, VERSION_1);
    set_up(&mut t, &ring);
    go(&mut t);
    assert_ne!(get(&mut t, VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0);
    assert_eq!(get(&mut t, VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    assert_eq!(t.metrics().activation_failures.get(), 1);
    go(&mut t);
    assert_eq!(t.metrics().activations.get(), 0, "only a reset helps");
}

#[test]
fn crooked_accesses_read_zeros() {
    let mut t = transport();
    let mut two = [0xff; 2];
    t.read(0, &mut two);
    assert_eq!(two, [0, 0]);
    let mut four = [0xff; 4];
    t.read(2, &mut four);
    assert_eq!(four, [0; 4]);
    assert_eq!(t.metrics().refused.get(), 2);
}

#[test]
fn saved_and_restored_it_goes_on() {
    let mut t = transport();
    let mut ring = DriverRing::new(&t.memory, 0x1000, 16);
    negotiate(&mut t, VERSION_1);
    set_up(&mut t, &ring);
    go(&mut t);
    t.device().lock().unwrap().pause();
    let state = t.save();
    let mut other = transport();
    other.memory = t.memory.clone();
    other.restore(&state).unwrap();
    assert_eq!(other.save(), state);
    ring.offer(&[(BUFFERS, 4, true)]);
    other.device().lock().unwrap().resume();
    assert_eq!(ring.take_used(), Some((0, 4)));
}

#[test]
fn a_device_that_gave_itself_up_is_saved_and_waits_for_its_reset_elsewhere() {
    let mut t = transport();
    let mut ring = DriverRing::new(&t.memory, 0x1000, 16);
    negotiate(&mut t, VERSION_1);
    set_up(&mut t, &ring);
    go(&mut t);
    ring.offer(&[(u64::MAX, 4, true)]);
    t.device().lock().unwrap().resume();
    assert_ne!(get(&mut t, VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0);
    let state = t.save();
    let mut other = transport();
    other.restore(&state).unwrap();
    assert_eq!(other.save(), state);
    // As in the first place: nothing can be set up but by way of the reset.
    set_up(&mut other, &ring);
    go(&mut other);
    assert_eq!(get(&mut other, VIRTIO_MMIO_QUEUE_READY), 0);
    negotiate(&mut other, VERSION_1);
    set_up(&mut other, &ring);
    go(&mut other);
    assert_eq!(get(&mut other, VIRTIO_MMIO_STATUS), 15);
}

proptest! {
    /// A driver may write anything to any register in any order.
    #[test]
    fn no_register_access_breaks_it(
        accesses in proptest::collection::vec((0..WINDOW, any::<u32>(), any::<bool>(), 0usize..4), 0..200)
    ) {
        let mut t = transport();
        for (offset, value, write, kind) in accesses {
            // Mostly what has a meaning, so that something happens.
            let (offset, value) = match kind {
                0 => (offset, value),
                1 => (u64::from(VIRTIO_MMIO_STATUS), [0, 1, 3, 11, 15, 128, 64, 255][value as usize % 8]),
                2 => (offset & !3, value & 0xfff0),
                _ => (offset & !3, value & 1),
            };
            if write {
                t.write(offset, &value.to_le_bytes());
            } else {
                let mut data = [0; 4];
                t.read(offset, &mut data);
            }
        }
        set(&mut t, VIRTIO_MMIO_STATUS, 0);
        prop_assert_eq!(get(&mut t, VIRTIO_MMIO_STATUS), 0);
    }
}
