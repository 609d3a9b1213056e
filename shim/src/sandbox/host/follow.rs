//! Tells the guest of volumes that the host has exchanged.
//! Knows the agent; which volumes those are, and when it happens, is the storage's.
//!
//! ```text
//!  host:  ..data is renamed ──inotify──▶ shim ──FollowVolume──▶ agent: the same in the copy ──inotify──▶ the container
//! ```

use std::sync::Arc;

use bulkhead_proto::agent::FollowedVolume;
use tracing::{debug, warn};

use super::{Host, lock};
use crate::{
    error::Kind,
    guest::Agent,
    ids::ContainerId,
    plan::in_share,
    storage::{Follower, Volume, version},
    tasks,
};

impl Host {
    /// Watches the volumes of a container that is to be made, and answers those that are watched. The others are shared as
    /// any bind mount.
    pub(super) fn follow(&self, id: &ContainerId, mut volumes: Vec<Volume>, agent: &Agent) -> Vec<Volume> {
        if volumes.is_empty() {
            return volumes;
        }
        let follower = match self.follower(agent) {
            Ok(follower) => follower,
            Err(error) => {
                warn!(%id, %error, "changes of its volumes are not told in the guest: they cannot be watched");
                return Vec::new();
            }
        };
        volumes.retain(|volume| {
            let added = follower.add(id, volume.clone());
            if let Err(error) = &added {
                let source = volume.source.display();
                warn!(%id, %error, "changes of {source} are not told in the guest: it cannot be watched");
            }
            added.is_ok()
        });
        volumes
    }

    /// The one of all containers, made for the first of them that needs it.
    fn follower(&self, agent: &Agent) -> std::io::Result<Arc<Follower>> {
        let mut slot = lock(&self.follower);
        if let Some(follower) = slot.as_ref() {
            return Ok(Arc::clone(follower));
        }
        let follower = Arc::new(Follower::new()?);
        tasks::spawn(tell(Arc::clone(&follower), agent.clone()));
        *slot = Some(Arc::clone(&follower));
        Ok(follower)
    }
}

/// The volume as the guest knows it.
pub(super) fn followed(id: &ContainerId, volume: &Volume) -> FollowedVolume {
    let source = in_share(id, volume.slot).display().to_string();
    FollowedVolume { source, version: volume.version.clone(), ..Default::default() }
}

/// Tells what has changed between the look at the volumes and the copies of them.
pub(super) async fn catch_up(id: &ContainerId, volumes: &[Volume], agent: &Agent) {
    for volume in volumes {
        if let Some(version) = version(&volume.source)
            && version != volume.version
        {
            exchange(id, &Volume { version, ..volume.clone() }, agent).await;
        }
    }
}

/// For as long as there is a sandbox.
async fn tell(follower: Arc<Follower>, agent: Agent) {
    loop {
        match follower.changed().await {
            Ok(changed) => {
                for (id, volume) in changed {
                    exchange(&id, &volume, &agent).await;
                }
            }
            Err(error) => {
                warn!(%error, "changes of volumes are not told in the guest any more");
                return;
            }
        }
    }
}

async fn exchange(id: &ContainerId, volume: &Volume, agent: &Agent) {
    let source = volume.source.display();
    match agent.follow_volume(id, followed(id, volume)).await {
        Ok(()) => debug!(%id, "{source} is at {}", volume.version),
        // It is being made, or has gone: then somebody else knows.
        Err(fault) if fault.kind == Kind::NotFound => debug!(%id, "{source}: {fault}"),
        Err(fault) => warn!(%id, "the guest keeps the old files of {source}: {fault}"),
    }
}
