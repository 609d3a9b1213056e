//! Which work on frames is left to the other side: features of virtio, and flags of a tap.
//! Pure; the flags are the kernel's (linux/if_tun.h).

use virtio_bindings::virtio_net::*;

const CSUM: u32 = 0x01;
const TSO4: u32 = 0x02;
const TSO6: u32 = 0x04;
const UFO: u32 = 0x10;
const USO4: u32 = 0x20;
const USO6: u32 = 0x40;

/// The sets that a tap is asked for, best first. The last one is what every tap has.
pub(super) const WISHES: [u32; 4] =
    [CSUM | TSO4 | TSO6 | UFO | USO4 | USO6, CSUM | TSO4 | TSO6 | UFO, CSUM | TSO4 | TSO6, 0];

/// A flag of the tap, and the features of both directions that need it.
const PAIRS: [(u32, u32, u32); 6] = [
    (CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_CSUM),
    (TSO4, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4),
    (TSO6, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO6),
    (UFO, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_UFO),
    (USO4, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_HOST_USO),
    (USO6, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_USO),
];

/// What can be offered to a driver with a tap that has these flags.
pub(super) fn features(flags: u32) -> u64 {
    let had = PAIRS.iter().filter(|(flag, ..)| flags & flag != 0);
    had.fold(0, |all, (_, guest, host)| all | 1 << guest | 1 << host)
}

/// What the tap may leave undone for a driver that agreed on these features.
pub(super) fn flags(features: u64) -> u32 {
    let agreed = PAIRS.iter().filter(|(_, guest, _)| features & 1 << guest != 0);
    let mut flags = agreed.fold(0, |all, (flag, ..)| all | flag);
    // 5.1.3.1: segments need checksums. A driver that forgot gets neither. And a tap has both or none of
    // what splits datagrams (set_offload of tun.c).
    if flags & CSUM == 0 {
        return 0;
    }
    if flags & (USO4 | USO6) != USO4 | USO6 {
        flags &= !(USO4 | USO6);
    }
    flags
}

/// Whether frames may come that are larger than the link's.
pub(super) fn segments(flags: u32) -> bool {
    flags & !CSUM != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_offered_is_what_the_tap_has() {
        assert_eq!(features(0), 0);
        assert_eq!(features(CSUM), 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_GUEST_CSUM);
        for wish in WISHES {
            assert_eq!(flags(features(wish)), wish, "everything offered can be asked for");
        }
    }

    #[test]
    fn what_depends_on_another_does_not_come_alone() {
        assert_eq!(flags(1 << VIRTIO_NET_F_GUEST_TSO4), 0);
        assert_eq!(flags(1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_USO4), CSUM);
        let large = flags(1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4);
        assert!(segments(large) && !segments(CSUM) && !segments(0));
    }
}
