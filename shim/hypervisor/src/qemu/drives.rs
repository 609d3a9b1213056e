//! Disks of a running machine. A `microvm` has no device that comes or goes, so it is launched with disks that are
//! nothing: they have no size until something of the host is put behind them.
//!
//! ```text
//!  guest ── virtio-blk "spare0" ── node spare0 (raw) ──┬── node nothing0 (null-co, 0 bytes)     at first, and after
//!                                                      └── node drive0 (a device of the host)   in between
//! ```
//! Whether a disk may be written to is settled when its device is made (QEMU then has the right to write, or has not),
//! so the last of them is one that may not. What the guest sees of a change is what it reads when its driver looks anew.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;
use bulkhead_vmm_spec::{BlockBinding, BlockShape, Shape};
use serde_json::{Value, json};

use super::{MAX_DEVICES, devices, driver_of, qmp::Qmp};
use crate::{Drive, Drives};

/// The disks that a machine of this shape is launched with for later: whether each may only be read. As many as it has
/// slots left, for they are of use to few.
pub(super) fn spares(shape: &Shape) -> Vec<bool> {
    let left = MAX_DEVICES.saturating_sub(devices(shape));
    let writable = (shape.spare_slots as usize).min(left);
    let read_only = usize::from(writable > 0 && writable < left);
    std::iter::repeat_n(false, writable).chain(std::iter::repeat_n(true, read_only)).collect()
}

/// The name of a spare disk: of its node, and its serial number.
fn name(slot: usize) -> String {
    format!("spare{slot}")
}

/// The node without size that is behind it at first. Each has one of its own: who may write shares with nobody.
fn nothing(slot: usize) -> String {
    format!("nothing{slot}")
}

/// The disks of one machine.
pub(super) struct Spares {
    qmp: tokio::sync::Mutex<Qmp>,
    taken: Mutex<Vec<Spare>>,
}

#[derive(Clone, Copy, Debug)]
struct Spare {
    read_only: bool,
    taken: bool,
}

/// Why a disk cannot come.
#[derive(Debug, thiserror::Error)]
#[error(
    "none of the machine's disks for later is free: it was made with {of_kind} that can be {kind} (storage.spare_disks, as far as an emulated machine has slots)"
)]
struct Full {
    of_kind: usize,
    kind: &'static str,
}

impl Spares {
    /// The disks of a machine that was launched with `spares`, whose QEMU is spoken with by `qmp`.
    pub(super) fn new(spares: &[bool], qmp: Qmp) -> Self {
        let spare = |&read_only: &bool| Spare { read_only, taken: false };
        Self { qmp: qmp.into(), taken: Mutex::new(spares.iter().map(spare).collect()) }
    }

    fn take(&self, read_only: bool) -> Result<usize, Full> {
        let mut spares = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let free =
            spares.iter_mut().enumerate().find(|(_, spare)| spare.read_only == read_only && !spare.taken);
        if let Some((slot, spare)) = free {
            spare.taken = true;
            return Ok(slot);
        }
        let of_kind = spares.iter().filter(|spare| spare.read_only == read_only).count();
        Err(Full { of_kind, kind: if read_only { "read only" } else { "written to" } })
    }

    fn give_back(&self, slot: usize) {
        if let Some(spare) = self.taken.lock().unwrap_or_else(PoisonError::into_inner).get_mut(slot) {
            spare.taken = false;
        }
    }

    /// Puts the node `behind` a spare disk.
    async fn put(
        qmp: &mut Qmp,
        slot: usize,
        behind: &str,
        read_only: bool,
    ) -> Result<(), super::qmp::QmpError> {
        let mut options = node(slot, read_only);
        options["file"] = behind.into();
        qmp.command("blockdev-reopen", json!({ "options": [options] })).await
    }

    async fn exchange(&self, slot: usize, path: &Path, shape: &BlockShape) -> Result<(), DriveError> {
        let driver = driver_of(path)?;
        let drive = drive(slot);
        let mut qmp = self.qmp.lock().await;
        let added = json!({
            "driver": driver,
            "node-name": drive,
            "filename": path.to_str().ok_or(DriveError::Name)?,
            "read-only": shape.read_only,
            "discard": "unmap",
        });
        qmp.command("blockdev-add", added).await?;
        let put = Self::put(&mut qmp, slot, &drive, shape.read_only).await;
        if put.is_err() {
            let _ = qmp.command("blockdev-del", json!({ "node-name": drive })).await;
        }
        Ok(put?)
    }
}

/// The node of a spare disk, but for what is behind it: what is said at the launch and at each change has to agree.
fn node(slot: usize, read_only: bool) -> Value {
    json!({ "driver": "raw", "node-name": name(slot), "read-only": read_only, "discard": "unmap" })
}

fn drive(slot: usize) -> String {
    format!("drive{slot}")
}

/// Why a file cannot be behind a disk.
#[derive(Debug, thiserror::Error)]
enum DriveError {
    #[error(transparent)]
    Launch(#[from] crate::LaunchError),
    #[error(transparent)]
    Qmp(#[from] super::qmp::QmpError),
    #[error("its name is not UTF-8")]
    Name,
}

#[async_trait]
impl Drives for Spares {
    async fn attach(
        &self,
        binding: &BlockBinding,
        shape: &BlockShape,
    ) -> Result<Drive, Box<dyn std::error::Error + Send + Sync>> {
        let slot = self.take(shape.read_only)?;
        if let Err(error) = self.exchange(slot, &binding.path, shape).await {
            self.give_back(slot);
            return Err(error.into());
        }
        Ok(Drive { slot: slot as u32, serial: name(slot) })
    }

    async fn detach(&self, slot: u32) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let slot = slot as usize;
        let spare = self.taken.lock().unwrap_or_else(PoisonError::into_inner).get(slot).copied();
        let Some(Spare { read_only, taken: true }) = spare else {
            return Err(format!("slot {slot} holds no disk").into());
        };
        let mut qmp = self.qmp.lock().await;
        Self::put(&mut qmp, slot, &nothing(slot), read_only).await?;
        qmp.command("blockdev-del", json!({ "node-name": drive(slot) })).await?;
        self.give_back(slot);
        Ok(())
    }
}

/// What QEMU is told of them when it is launched: a node without size for each, and its own with the device.
pub(super) fn words(spares: &[bool]) -> Vec<(&'static str, String)> {
    let words = |(slot, read_only): (usize, &bool)| {
        let (name, nothing) = (name(slot), nothing(slot));
        let read_only = if *read_only { "on" } else { "off" };
        [
            ("-blockdev", format!("driver=null-co,node-name={nothing},size=0")),
            (
                "-blockdev",
                format!("driver=raw,node-name={name},read-only={read_only},discard=unmap,file={nothing}"),
            ),
            ("-device", format!("virtio-blk-device,drive={name},serial={name}")),
        ]
    };
    spares.iter().enumerate().flat_map(words).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::shape_and_bindings;

    #[test]
    fn there_are_as_many_as_the_machine_has_slots_left() {
        let (mut shape, _) = shape_and_bindings();
        let used = devices(&shape);
        assert_eq!(spares(&shape), [] as [bool; 0]);
        shape.spare_slots = 2;
        assert_eq!(spares(&shape), [false, false, true]);
        shape.spare_slots = 99;
        assert_eq!(spares(&shape), vec![false; MAX_DEVICES - used], "none is left for one to be read only");
    }

    #[tokio::test]
    async fn a_kind_that_is_used_up_is_named() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let spares = Spares::new(&[false, true], Qmp::new(ours).unwrap());
        assert_eq!((spares.take(true).unwrap(), spares.take(false).unwrap()), (1, 0));
        let full = spares.take(false).unwrap_err().to_string();
        assert!(full.contains("made with 1 that can be written to (storage.spare_disks"), "{full}");
        spares.give_back(0);
        assert_eq!(spares.take(false).unwrap(), 0);
        assert!(spares.detach(7).await.unwrap_err().to_string().contains("slot 7"));
    }
}
