//! How the machine ended: told once, by whoever sees it first.

use std::sync::{Mutex, PoisonError};

use bulkhead_vmm_spec::wire::Ended;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The end of the machine, when it comes.
#[derive(Debug)]
pub(crate) struct Outcome {
    event: EventFd,
    ended: Mutex<Option<Ended>>,
}

impl Outcome {
    /// Not ended yet.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { event: EventFd::new(EFD_NONBLOCK)?, ended: Mutex::default() })
    }

    /// Becomes readable at the end.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Tells the end; only the first one counts.
    pub(crate) fn end(&self, ended: Ended) {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(ended);
        let _ = self.event.write(1);
    }

    /// The end. What was only announced by the event is the guest's own reset (the keyboard controller).
    pub(crate) fn ended(&self) -> Ended {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or(Ended::Guest)
    }
}
