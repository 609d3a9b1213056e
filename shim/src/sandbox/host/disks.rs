//! Gives a container the block devices of the host that its specification names: those that the machine has, and
//! others by its spare slots; and takes from the machine what nobody uses any more.
//! Knows the machine and the agent; which devices there are is the storage's.

use tracing::{info, warn};

use super::{Host, blocking, lock};
use crate::{
    error::{Fault, Kind},
    ids::ContainerId,
    plan::Disk,
    storage::{DiskError, binding, shape},
};

impl Host {
    /// What the guest has to know of a container's devices, all of which the machine has then.
    pub(super) async fn give_disks(
        &self,
        id: &ContainerId,
        wanted: &[Disk],
    ) -> Result<Vec<bulkhead_proto::agent::Disk>, Fault> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        // One device for two containers at once is one disk.
        let mut disks = self.disks.lock().await;
        let mut told = Vec::new();
        for disk in wanted {
            let known = match disks.used_by(id, disk) {
                Some(known) => known,
                None => {
                    let refused = |e: &DiskError| Fault::of(Kind::InvalidArgument, e);
                    let drives = lock(&self.ready).as_ref().and_then(|ready| ready.running.drives());
                    let drives = drives.ok_or_else(|| refused(&DiskError::late(disk)))?;
                    let at = disk.clone();
                    let found = blocking("look for a block device", move || {
                        binding(&at).map_err(|e| Fault::of(Kind::InvalidArgument, &e))
                    });
                    let found = found.await?;
                    let given = drives.attach(&found, &shape(disk)).await;
                    let drive = given.map_err(|e| refused(&DiskError::refused(disk, e.to_string())))?;
                    info!(%id, device = %found.path.display(), serial = drive.serial, "the machine has another disk");
                    disks.add(disk.clone(), found.path, drive);
                    disks.used_by(id, disk).ok_or_else(|| {
                        Fault::new(Kind::Internal, "a disk that was attached a moment ago is not there")
                    })?
                }
            };
            told.push(known);
        }
        Ok(told)
    }

    /// A container is gone, or never came to be: the machine gives back what it alone had. Nobody waits for that, and
    /// what cannot be given back goes with the machine.
    pub(super) async fn take_disks(&self, id: &ContainerId, guest: bool) {
        let mut disks = self.disks.lock().await;
        let left = disks.left_by(id);
        if left.is_empty() || !guest {
            return;
        }
        let serials = left.iter().map(|drive| drive.serial.clone()).collect();
        if let Ok(agent) = self.agent()
            && let Err(fault) = agent.leave_disks(serials).await
        {
            warn!(%id, "the guest does not let go of its disks: {fault}");
        }
        let drives = lock(&self.ready).as_ref().and_then(|ready| ready.running.drives());
        for drive in left {
            if let Some(drives) = &drives
                && let Err(error) = drives.detach(drive.slot).await
            {
                warn!(%id, serial = drive.serial, "the machine keeps a disk: {error}");
            }
        }
    }
}
