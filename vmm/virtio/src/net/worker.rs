//! Both directions on the event loop's thread.

use std::sync::Arc;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::{ETHERNET, FRAME_LIMIT, HEADER, Metrics, RX, TX, offload, rx::Rx, tx::Tx};
use crate::{
    ActivateError, Activation,
    ring::{Ring, RingState},
};

/// Bytes of a VLAN tag, which an MTU does not count.
const VLAN: usize = 4;
/// The MTU of a link that says nothing.
const USUAL_MTU: u16 = 1500;

pub(super) struct Worker {
    pub(super) rx: Rx,
    pub(super) tx: Tx,
}

impl Worker {
    pub(super) fn new(
        activation: Activation,
        mtu: Option<u16>,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let mut queues = queues.into_iter();
        let mut ring = |number| {
            let queue = queues.next().ok_or(ActivateError::Queue(number))?;
            Ring::new(queue, memory.clone(), interrupt.clone()).ok_or(ActivateError::Queue(number))
        };
        let (rx, tx) = (ring(RX)?, ring(TX)?);
        let ahead = if offload::segments(offload::flags(features)) {
            FRAME_LIMIT
        } else {
            HEADER + ETHERNET + VLAN + usize::from(mtu.unwrap_or(USUAL_MTU))
        };
        let merge = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        Ok(Self {
            rx: Rx::new(rx, merge, ahead, metrics.clone()),
            tx: Tx { ring: tx, blocked: false, metrics: metrics.clone() },
        })
    }

    pub(super) fn save(&self) -> Vec<RingState> {
        vec![self.rx.ring().save(), self.tx.ring.save()]
    }
}
