//! Makes a running machine as large as its containers need, and tells the guest their new limits.
//! Knows the machine and the agent; how large it is to be is the plan's.
//!
//! ```text
//!  create   machine up ─▶ container                         ┐ a step that fails
//!  update   machine up ─▶ limits ─▶ machine down            │ takes back those
//!  delete   container ─▶ machine down (nobody waits for it) ┘ before it
//! ```
//! A guest that cannot give all memory back keeps the rest: its limits hold, and the machine is told as large as it is.

use std::{sync::Arc, time::Duration};

use bulkhead_hypervisor::{Growth, Processors, qemu::BLOCK};
use bulkhead_proto::agent::ResizeRequest;
use bulkhead_vmm_spec::SizeMib;
use oci_spec::runtime::LinuxResources;
use tracing::{info, warn};

use super::{Host, lock};
use crate::{
    error::{Fault, Kind},
    ids::ContainerId,
    plan::{Claims, Limits, Size, Sizing, with_descriptions},
};

/// How long a guest may take to use memory that it is asked to have, or to give some back.
const PATIENCE: Duration = Duration::from_secs(20);
/// In what steps a guest takes memory by itself: the blocks of the VMM's memory device.
const STEP: SizeMib = SizeMib(2);

/// What is known of the machine's size. Whoever holds it may change it.
pub(super) struct Book {
    claims: Claims,
    processors: Option<Arc<dyn Processors>>,
    growth: Option<Growth>,
    /// What the guest has now.
    size: Size,
}

impl Book {
    pub(super) fn new(
        sizing: Sizing,
        processors: Option<Arc<dyn Processors>>,
        growth: Option<Growth>,
    ) -> Self {
        let size = Size { vcpus: sizing.vcpus, memory: sizing.memory };
        Self { claims: Claims::new(sizing), processors, growth, size }
    }

    /// Has the VMM let so many processors run.
    async fn allow(&self, vcpus: u32) -> Result<(), Fault> {
        let Some(processors) = &self.processors else { return Ok(()) };
        let allowed = processors.allow(vcpus).await;
        allowed.map_err(|e| Fault::new(Kind::Internal, format!("let {vcpus} processors run: {e}")))
    }

    fn boot(&self) -> SizeMib {
        self.claims.sizing().memory
    }

    /// What has to be added to the memory at boot for so much in all, in whole steps.
    fn added_for(&self, memory: SizeMib, step: SizeMib) -> SizeMib {
        let more = SizeMib(memory.0.saturating_sub(self.boot().0));
        SizeMib(with_descriptions(more).0.next_multiple_of(step.0))
    }
}

impl Host {
    /// Room in the machine for a container that is to be made.
    pub(super) async fn make_room(&self, id: &ContainerId, limits: Limits) -> Result<(), Fault> {
        let mut book = self.size.lock().await;
        let Some(book) = book.as_mut() else { return Ok(()) };
        let claims = book.claims.with(id, limits);
        let target = claims.added(id, book.size)?;
        self.grow(book, target).await?;
        book.claims = claims;
        Ok(())
    }

    /// New limits for a container, and the size of the machine that they ask for.
    pub(super) async fn update(&self, id: &ContainerId, resources: Vec<u8>) -> Result<(), Fault> {
        let asked: LinuxResources = serde_json::from_slice(&resources).map_err(|e| {
            Fault::new(Kind::InvalidArgument, format!("the new limits of container {id}: {e}"))
        })?;
        let agent = self.agent()?;
        let mut book = self.size.lock().await;
        let book = book.as_mut().ok_or_else(|| Fault::new(Kind::Unavailable, "the machine is not up yet"))?;
        let claims = book.claims.updated(id, &asked);
        let (before, target) = (book.claims.nearest(), claims.changed(id, book.size)?);
        fail_point!(ResizeGrow);
        self.grow(book, target).await?;
        let limited = fail_point!(ResizeLimits, agent.update(id, resources).await);
        let undo = match limited {
            Ok(undo) => undo,
            Err(fault) => {
                self.shrink_after_failure(book, before).await;
                return Err(fault);
            }
        };
        if let Err(fault) = fail_point!(ResizeShrink, self.shrink(book, target).await) {
            if !undo.is_empty()
                && let Err(error) = agent.restore(id, undo).await
            {
                warn!(%id, "the old limits are not in force again: {error}");
            }
            self.shrink_after_failure(book, before).await;
            return Err(fault);
        }
        book.claims = claims;
        kill_point!(ResizeDone);
        Ok(())
    }

    /// Gives back what containers had that have gone.
    pub(super) async fn fit(&self) {
        let mut book = self.size.lock().await;
        let Some(book) = book.as_mut() else { return };
        let gone = book.claims.ids().filter(|id| !lock(&self.prepared).contains_key(*id));
        for id in gone.cloned().collect::<Vec<_>>() {
            book.claims = book.claims.without(&id);
        }
        let target = book.claims.nearest();
        if let Err(fault) = self.shrink(book, target).await {
            warn!("the machine stays larger than its containers need: {fault}");
        }
    }

    async fn shrink_after_failure(&self, book: &mut Book, before: Size) {
        if let Err(error) = self.shrink(book, before).await {
            warn!("the machine stays larger than before: {error}");
        }
    }

    fn resized(&self, book: &mut Book, size: Size) {
        if size == book.size {
            return;
        }
        info!("the machine has {} MiB of memory and {} processors", size.memory.0, size.vcpus);
        book.size = size;
        if let Some(ready) = lock(&self.ready).as_mut() {
            (ready.facts.memory_mib, ready.facts.vcpus) = (size.memory.0, size.vcpus);
        }
    }

    /// Gives the guest what `target` has more than it; all or nothing.
    async fn grow(&self, book: &mut Book, target: Size) -> Result<(), Fault> {
        let before = book.size;
        self.add_memory(book, target.memory).await?;
        if target.vcpus > book.size.vcpus
            && let Err(fault) = self.set_vcpus(book, target.vcpus).await
        {
            let lower = Size { vcpus: book.size.vcpus, memory: before.memory };
            self.shrink_after_failure(book, lower).await;
            return Err(fault);
        }
        Ok(())
    }

    /// Takes what the guest has more than `target`. Memory that it cannot give stays with it.
    async fn shrink(&self, book: &mut Book, target: Size) -> Result<(), Fault> {
        let before = book.size.vcpus;
        if target.vcpus < before {
            self.set_vcpus(book, target.vcpus).await?;
        }
        let shrunk = self.take_memory(book, target.memory).await;
        if shrunk.is_err() && target.vcpus < before {
            self.set_vcpus(book, before).await?;
        }
        shrunk
    }

    /// The VMM lets processors run before the guest starts them, and holds them after it has let go of them. A guest
    /// that does not let go loses them too.
    async fn set_vcpus(&self, book: &mut Book, vcpus: u32) -> Result<(), Fault> {
        let before = book.size.vcpus;
        book.allow(vcpus.max(before)).await?;
        let told = self.agent()?.use_machine(ResizeRequest { vcpus, ..Default::default() }).await;
        let now = told.as_ref().map_or(before, |answer| answer.vcpus.clamp(1, vcpus));
        book.allow(now).await?;
        told?;
        self.resized(book, Size { vcpus: now, memory: book.size.memory });
        Ok(())
    }

    /// The guest has so much beyond the memory of its boot.
    fn has_added(&self, book: &mut Book, added: SizeMib) {
        let size = Size { vcpus: book.size.vcpus, memory: SizeMib(book.boot().0 + added.0) };
        self.resized(book, size);
    }

    async fn add_memory(&self, book: &mut Book, memory: SizeMib) -> Result<(), Fault> {
        let now = SizeMib(book.size.memory.0 - book.boot().0);
        match book.growth.clone() {
            None => Ok(()),
            Some(Growth::Asked(machine)) => {
                let added = book.added_for(memory, STEP);
                if added <= now {
                    return Ok(());
                }
                let has = machine.ask(added.bytes(), PATIENCE).await.map_err(refused)?;
                if has != added.bytes() {
                    let back = machine.ask(now.bytes(), PATIENCE).await.map_err(refused)?;
                    self.has_added(book, SizeMib(back >> 20));
                    let text = format!(
                        "the guest has taken {} of {} MiB of memory within {} s",
                        has >> 20,
                        added.0,
                        PATIENCE.as_secs()
                    );
                    return Err(Fault::new(Kind::DeadlineExceeded, text));
                }
                self.has_added(book, added);
                Ok(())
            }
            Some(Growth::Kept(kept)) => {
                let (wanted, given) = (book.added_for(memory, BLOCK).0 / BLOCK.0, kept.given());
                let free = (0..kept.blocks()).filter(|block| !given.contains(block));
                let blocks: Vec<u64> =
                    free.take(wanted.saturating_sub(given.len() as u64) as usize).collect();
                if blocks.is_empty() {
                    return Ok(());
                }
                kept.give(&blocks).map_err(|e| Fault::internal("give the machine memory", &e))?;
                let add = blocks.iter().map(|block| kept.address(*block)).collect();
                let request = ResizeRequest { block_bytes: BLOCK.bytes(), add, ..Default::default() };
                let used = async { self.agent()?.use_machine(request).await }.await;
                if used.is_err()
                    && let Err(error) = kept.take(&blocks)
                {
                    warn!(%error, "memory that the guest does not use is not given back");
                }
                used?;
                self.has_added(book, SizeMib(kept.given().len() as u64 * BLOCK.0));
                Ok(())
            }
        }
    }

    async fn take_memory(&self, book: &mut Book, memory: SizeMib) -> Result<(), Fault> {
        let now = SizeMib(book.size.memory.0 - book.boot().0);
        match book.growth.clone() {
            None => {}
            Some(Growth::Asked(machine)) => {
                let added = book.added_for(memory, STEP);
                if added < now {
                    let has = machine.ask(added.bytes(), PATIENCE).await.map_err(refused)?;
                    self.has_added(book, SizeMib(has >> 20));
                }
            }
            Some(Growth::Kept(kept)) => {
                let (wanted, given) = (book.added_for(memory, BLOCK).0 / BLOCK.0, kept.given());
                let surplus = (given.len() as u64).saturating_sub(wanted);
                if surplus == 0 {
                    return Ok(());
                }
                let remove = given.iter().rev().map(|block| kept.address(*block)).collect();
                let request = ResizeRequest {
                    block_bytes: BLOCK.bytes(),
                    remove,
                    remove_count: surplus as u32,
                    ..Default::default()
                };
                let removed = self.agent()?.use_machine(request).await?.removed;
                let free: Vec<u64> =
                    given.into_iter().filter(|block| removed.contains(&kept.address(*block))).collect();
                let freed =
                    tokio::task::spawn_blocking(move || kept.take(&free).map(|()| kept.given().len()));
                let left = freed.await.unwrap_or_else(|e| Err(std::io::Error::other(e)));
                let left = left.map_err(|e| Fault::internal("take memory from the machine", &e))?;
                self.has_added(book, SizeMib(left as u64 * BLOCK.0));
            }
        }
        Ok(())
    }
}

fn refused(error: Box<dyn std::error::Error + Send + Sync>) -> Fault {
    Fault::new(Kind::Internal, format!("cannot change the machine's memory: {error}"))
}
