//! The processes of a running machine: which part dies first, and the end of all of them.
//! Knows processes and the console's words; knows no backend.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use futures::future::{FutureExt, join_all, select_all};

use crate::{
    Drives, Exit, Growth, Machine, MachineEnd,
    child::{Child, LineSink},
    socket::Names,
};

/// How long the VMM's own end is waited for after a helper left in order: a helper leaves when its
/// VMM has closed the connection, which is the last thing that a dying VMM does.
const VMM_GRACE: Duration = Duration::from_millis(500);

/// Watches the guest's console for the last words of its kernel.
#[derive(Clone, Debug, Default)]
pub(crate) struct Console {
    panic: Arc<Mutex<Option<String>>>,
}

impl Console {
    /// A watcher, and what feeds it. Each line goes on to `then`.
    pub(crate) fn new(mut then: Option<LineSink>) -> (Self, LineSink) {
        let console = Self::default();
        let panic = console.panic.clone();
        let sink = move |line: &str| {
            if let Some(words) = panic_in(line) {
                // The first one: others may follow from it.
                panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(words.to_owned());
            }
            if let Some(then) = &mut then {
                then(line);
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

/// A VMM and its helpers.
pub(crate) struct Family {
    /// The VMM first.
    parts: Vec<Child>,
    pid: i32,
    console: Console,
    growth: Option<Growth>,
    drives: Option<Arc<dyn Drives>>,
    asked: bool,
    end: Option<MachineEnd>,
    /// Below the parts: dropped when they are dead.
    sockets: Names,
}

impl Family {
    pub(crate) fn new(vmm: Child, helpers: Vec<Child>, console: Console, sockets: Names) -> Self {
        let pid = vmm.pid();
        let parts = std::iter::once(vmm).chain(helpers).collect();
        Self { parts, pid, console, growth: None, drives: None, asked: false, end: None, sockets }
    }

    /// The same with memory that can change.
    pub(crate) fn with_growth(mut self, growth: Option<Growth>) -> Self {
        self.growth = growth;
        self
    }

    /// The same with disks that can come and go.
    pub(crate) fn with_drives(mut self, drives: Option<Arc<dyn Drives>>) -> Self {
        self.drives = drives;
        self
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
impl Machine for Family {
    fn pid(&self) -> i32 {
        self.pid
    }

    fn processes(&self) -> Vec<(String, i32)> {
        let living = self.parts.iter().filter(|p| p.exit().is_none());
        living.map(|p| (p.name().to_owned(), p.pid())).collect()
    }

    fn growth(&self) -> Option<Growth> {
        self.growth.clone()
    }

    fn drives(&self) -> Option<Arc<dyn Drives>> {
        self.drives.clone()
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
        if self.parts.iter_mut().any(|p| p.exited().now_or_never().is_some()) {
            // A part died before: that is the end to report, and it shows only before the others die.
            let _ = self.ended().await;
        } else {
            self.asked = true;
        }
        join_all(self.parts.iter_mut().map(Child::kill)).await;
        self.sockets.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::child::ChildSpec;

    fn part(name: &str, script: &str) -> Child {
        let mut spec = ChildSpec::new(name, "/bin/sh");
        spec.args = vec!["-c".into(), script.into()];
        Child::spawn(spec).unwrap()
    }

    const STAY: &str = "exec cat /dev/zero >/dev/null";

    #[tokio::test]
    async fn the_part_that_failed_is_named_with_its_words() {
        let helpers = vec![part("one", STAY), part("two", "echo broken >&2; exit 4")];
        let mut machine = Family::new(part("vmm", STAY), helpers, Console::default(), Names::default());
        let end = machine.ended().await;
        assert_eq!((end.part.as_str(), end.exit, end.asked), ("two", Exit::Code(4), false));
        assert_eq!(end.messages, ["broken"]);
        machine.kill().await;
        assert_eq!(machine.ended().await, end, "what follows does not change it");
        assert!(machine.processes().is_empty());
    }

    #[tokio::test]
    async fn a_helper_that_leaves_because_its_vmm_dies_is_not_blamed() {
        // The helper sees the end of the VMM as they do: by the end of a connection.
        let (reader, writer) = std::io::pipe().unwrap();
        let mut helper = ChildSpec::new("helper", "/bin/sh");
        helper.args = vec![
            "-c".into(),
            format!("exec cat /dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader)).into(),
        ];
        helper.fds = vec![reader.into()];
        let helper = Child::spawn(helper).unwrap();
        let mut vmm = ChildSpec::new("vmm", "/bin/sh");
        // Closes the connection first and takes its time to die, as a VMM with much memory does.
        let fd = std::os::fd::AsRawFd::as_raw_fd(&writer);
        assert!(fd < 1000);
        vmm.args = vec!["-c".into(), format!("exec bash -c 'exec {fd}>&-; sleep 0.1; kill -SEGV $$'").into()];
        vmm.fds = vec![writer.into()];
        let vmm = Child::spawn(vmm).unwrap();
        let mut machine = Family::new(vmm, vec![helper], Console::default(), Names::default());
        let end = machine.ended().await;
        assert_eq!((end.part.as_str(), end.exit), ("vmm", Exit::Signal(libc::SIGSEGV)));
    }

    #[tokio::test]
    async fn a_helper_that_leaves_alone_is_blamed() {
        let mut machine = Family::new(
            part("vmm", STAY),
            vec![part("helper", "exit 0")],
            Console::default(),
            Names::default(),
        );
        assert_eq!(machine.ended().await.part, "helper");
    }

    #[tokio::test]
    async fn a_kill_is_asked_for_unless_a_part_was_dead_before() {
        let mut machine = Family::new(part("vmm", STAY), Vec::new(), Console::default(), Names::default());
        machine.kill().await;
        assert!(machine.ended().await.asked);

        let helpers = vec![part("helper", "exit 1")];
        let mut machine = Family::new(part("vmm", STAY), helpers, Console::default(), Names::default());
        // The death happened, and nobody asked.
        let _ = machine.parts[1].exited().await;
        machine.kill().await;
        let end = machine.ended().await;
        assert_eq!((end.part.as_str(), end.exit, end.asked), ("helper", Exit::Code(1), false));
    }

    #[test]
    fn a_panic_is_known_with_and_without_a_time_stamp() {
        let words = "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009";
        assert_eq!(panic_in(&format!("[    1.234567] {words}")), Some(words));
        assert_eq!(panic_in(words), Some(words));
        assert_eq!(panic_in("[    1.234567] BUG: unable to handle page fault"), None);
    }
}
