//! A backend without a VMM, for tests of what drives machines.
//! Knows nothing of the host: its processes are numbers.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bulkhead_vmm_spec::{Bindings, Shape};
use tokio::sync::watch;

use crate::{Exit, Hypervisor, Journal, LaunchError, Machine, MachineEnd};

/// The VMM's name in a fake machine.
pub const FAKE: &str = "fake";

/// Makes fake machines; a clone shares their fate, so that a test can keep one.
#[derive(Clone, Debug, Default)]
pub struct FakeHypervisor {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    next_error: Option<LaunchError>,
    launched: Vec<FakeHandle>,
}

/// A test's hand on one fake machine.
#[derive(Clone, Debug)]
pub struct FakeHandle {
    /// What it was launched with.
    pub shape: Shape,
    /// What it was launched with.
    pub bindings: Bindings,
    /// Its pid; no such process exists.
    pub pid: i32,
    end: watch::Sender<Option<MachineEnd>>,
    killed: watch::Sender<bool>,
}

impl FakeHandle {
    /// Ends the machine as if the part had died; the first end counts.
    pub fn end(&self, part: &str, exit: Exit) {
        self.finish(MachineEnd {
            part: part.into(),
            exit,
            asked: false,
            panic: None,
            messages: Vec::new(),
            console: Vec::new(),
        });
    }

    /// Ends the machine in any way; the first end counts.
    pub fn finish(&self, end: MachineEnd) {
        self.end.send_if_modified(|slot| {
            let first = slot.is_none();
            if first {
                *slot = Some(end);
            }
            first
        });
    }

    /// Whether [`Machine::kill`] was called, or the machine dropped.
    pub fn is_killed(&self) -> bool {
        *self.killed.borrow()
    }

    /// Waits for [`Machine::kill`] or the machine's drop.
    pub async fn killed(&self) {
        // The sender is our own, so the channel is open.
        let _ = self.killed.subscribe().wait_for(|killed| *killed).await;
    }
}

impl FakeHypervisor {
    /// A backend that has made no machine yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets the next launch fail.
    pub fn fail_next(&self, error: LaunchError) {
        self.lock().next_error = Some(error);
    }

    /// The machines launched so far, the oldest first.
    pub fn launched(&self) -> Vec<FakeHandle> {
        self.lock().launched.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Hypervisor for FakeHypervisor {
    fn name(&self) -> &'static str {
        FAKE
    }

    async fn launch(
        &self,
        shape: &Shape,
        bindings: &Bindings,
        journal: &dyn Journal,
    ) -> Result<Box<dyn Machine>, LaunchError> {
        let handle = {
            let mut shared = self.lock();
            if let Some(error) = shared.next_error.take() {
                return Err(error);
            }
            // Beyond the largest pid of Linux (2^22): whoever signals it by mistake hits nobody.
            let pid = (1 << 23) + shared.launched.len() as i32;
            let handle = FakeHandle {
                shape: shape.clone(),
                bindings: bindings.clone(),
                pid,
                end: watch::Sender::new(None),
                killed: watch::Sender::new(false),
            };
            shared.launched.push(handle.clone());
            handle
        };
        journal.process(FAKE, handle.pid, 0).map_err(|source| LaunchError::Journal {
            name: FAKE.into(),
            pid: handle.pid,
            source,
        })?;
        Ok(Box::new(FakeMachine(handle)))
    }
}

struct FakeMachine(FakeHandle);

#[async_trait]
impl Machine for FakeMachine {
    fn pid(&self) -> i32 {
        self.0.pid
    }

    fn processes(&self) -> Vec<(String, i32)> {
        if self.0.is_killed() { Vec::new() } else { vec![(FAKE.into(), self.0.pid)] }
    }

    async fn ended(&mut self) -> MachineEnd {
        let mut end = self.0.end.subscribe();
        // The sender is our own, so the channel is open and the value is there.
        let end = end.wait_for(Option::is_some).await.expect("the sender lives");
        end.clone().expect("waited for")
    }

    async fn kill(&mut self) {
        self.0.finish(MachineEnd {
            part: FAKE.into(),
            exit: Exit::Signal(libc::SIGKILL),
            asked: true,
            panic: None,
            messages: Vec::new(),
            console: Vec::new(),
        });
        self.0.killed.send_replace(true);
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        self.0.killed.send_replace(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Journaled, shape_and_bindings};

    #[tokio::test]
    async fn a_test_ends_the_machine_and_the_first_end_counts() {
        let fake = FakeHypervisor::new();
        let (shape, bindings) = shape_and_bindings();
        let mut machine = fake.launch(&shape, &bindings, &Journaled::default()).await.unwrap();
        let handle = fake.launched().remove(0);
        assert!(!handle.is_killed());
        handle.end("virtiofsd", Exit::Signal(9));
        handle.end(FAKE, Exit::Code(0));
        machine.kill().await;
        handle.killed().await;
        let end = machine.ended().await;
        assert_eq!((end.part.as_str(), end.exit, end.asked), ("virtiofsd", Exit::Signal(9), false));
    }

    #[tokio::test]
    async fn a_kill_is_an_end_that_was_asked_for() {
        let fake = FakeHypervisor::new();
        let (shape, bindings) = shape_and_bindings();
        let mut machine = fake.launch(&shape, &bindings, &Journaled::default()).await.unwrap();
        machine.kill().await;
        assert!(machine.ended().await.asked);
        assert!(machine.processes().is_empty());
    }
}
