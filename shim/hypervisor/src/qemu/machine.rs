//! A running machine of this backend: which part dies first, and the end of all of them.
//! Knows processes and the console's words; knows no command line.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use futures::future::{FutureExt, join_all, select_all};

use crate::{
    Exit, Machine, MachineEnd,
    child::{Child, LineSink},
    socket,
};

/// How long the VMM's own end is waited for after a helper left in order: a helper leaves when its
/// VMM has closed the connection, which is the last thing that a dying VMM does.
const VMM_GRACE: Duration = Duration::from_millis(500);

/// Watches the guest's console for the last words of its kernel.
#[derive(Clone, Debug, Default)]
pub(super) struct Console {
    panic: Arc<Mutex<Option<String>>>,
}

impl Console {
    /// A watcher, and what feeds it.
    pub(super) fn new() -> (Self, LineSink) {
        let console = Self::default();
        let panic = console.panic.clone();
        let sink = move |line: &str| {
            if let Some(words) = panic_in(line) {
                // The first one: others may follow from it.
                panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(words.to_owned());
            }
        };
        (console, Box::new(sink))
    }

    fn panic(&self) -> Option<String> {
        self.panic.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The panic that a line of a Linux console tells of, without the time stamp.
fn panic_in(line: &str) -> Option<&str> {
    line.find("Kernel panic - not syncing").map(|at| &line[at..])
}

/// QEMU and its helpers.
pub(super) struct QemuMachine {
    /// The VMM first.
    parts: Vec<Child>,
    pid: i32,
    console: Console,
    sockets: Vec<PathBuf>,
    asked: bool,
    end: Option<MachineEnd>,
}

impl QemuMachine {
    pub(super) fn new(qemu: Child, helpers: Vec<Child>, console: Console, sockets: Vec<PathBuf>) -> Self {
        let pid = qemu.pid();
        let parts = std::iter::once(qemu).chain(helpers).collect();
        Self { parts, pid, console, sockets, asked: false, end: None }
    }

    /// Which part died first.
    async fn first_death(&mut self) -> usize {
        // `select_all` looks at the parts in their order: of two that are dead the VMM counts.
        let (exit, index, _) = select_all(self.parts.iter_mut().map(|p| p.exited().boxed())).await;
        if index != 0
            && exit == Exit::Code(0)
            && tokio::time::timeout(VMM_GRACE, self.parts[0].exited()).await.is_ok()
        {
            return 0;
        }
        index
    }
}

#[async_trait]
impl Machine for QemuMachine {
    fn pid(&self) -> i32 {
        self.pid
    }

    fn processes(&self) -> Vec<(String, i32)> {
        let living = self.parts.iter().filter(|p| p.exit().is_none());
        living.map(|p| (p.name().to_owned(), p.pid())).collect()
    }

    async fn ended(&mut self) -> MachineEnd {
        if let Some(end) = &self.end {
            return end.clone();
        }
        let index = self.first_death().await;
        let asked = self.asked;
        self.parts[index].read_rest().await;
        let part = &self.parts[index];
        let end = MachineEnd {
            part: part.name().to_owned(),
            exit: part.exit().unwrap_or(Exit::Unknown),
            asked,
            panic: self.console.panic(),
            messages: part.last_errors(),
            console: self.parts[0].last_output(),
        };
        tracing::debug!("machine ended: {end}");
        self.end.insert(end).clone()
    }

    async fn kill(&mut self) {
        // A part that died before was not ended by us.
        if self.end.is_none() && self.parts.iter_mut().all(|p| p.exited().now_or_never().is_none()) {
            self.asked = true;
        }
        join_all(self.parts.iter_mut().map(Child::kill)).await;
        for path in &self.sockets {
            if let Err(error) = socket::remove(path) {
                tracing::warn!(%error, "cannot remove {}", path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_known_with_and_without_a_time_stamp() {
        let words = "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009";
        assert_eq!(panic_in(&format!("[    1.234567] {words}")), Some(words));
        assert_eq!(panic_in(words), Some(words));
        assert_eq!(panic_in("[    1.234567] BUG: unable to handle page fault"), None);
    }
}
