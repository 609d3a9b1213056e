//! What several tests of this crate need.

use std::{
    io,
    sync::{Mutex, PoisonError},
};

use bulkhead_vmm_spec::{Bindings, Shape, SizeMib};

use crate::Journal;

/// A journal that a test can read, or that refuses.
#[derive(Default)]
pub(crate) struct Journaled {
    pub(crate) seen: Mutex<Vec<(String, i32, u64)>>,
    pub(crate) refuses: bool,
}

impl Journaled {
    pub(crate) fn processes(&self) -> Vec<(String, i32, u64)> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Journal for Journaled {
    fn process(&self, name: &str, pid: i32, ticks: u64) -> io::Result<()> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).push((name.into(), pid, ticks));
        if self.refuses { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(()) }
    }
}

/// A machine with a share and nothing else; none of its files exist.
pub(crate) fn shape_and_bindings() -> (Shape, Bindings) {
    let shape = Shape {
        vcpus: 2,
        max_vcpus: 2,
        memory: SizeMib(256),
        growth: SizeMib(0),
        cmdline: "agent.log=debug".into(),
        share_tag: Some("share".into()),
        blocks: Vec::new(),
        nets: Vec::new(),
        spare_slots: 0,
    };
    let bindings = Bindings {
        kernel: "/k/vmlinux".into(),
        initrd: "/k/initrd".into(),
        share: Some("/run/bulkhead/0123/share".into()),
        vsock: "/run/bulkhead/0123/vsock".into(),
        blocks: Vec::new(),
        nets: Vec::new(),
        netns: None,
        run_dir: "/run/bulkhead/0123".into(),
    };
    (shape, bindings)
}
