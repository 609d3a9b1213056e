//! How processes end, and what is told of it.
//! Knows the kernel's signs of an end; what a container may do next is the parent's affair.

use std::{fs, sync::Arc};

use super::{Sandbox, Status};
use crate::{
    cgroup::{self, Watch},
    events::now_unix_nanos,
    reaper::{End, Outcome},
};

impl Sandbox {
    /// Takes every ended child. Called for each SIGCHLD. Answers true if `vital` was among them.
    pub(crate) fn reap(&self, vital: i32) -> bool {
        let mut lost = false;
        while let Some((pid, status)) = crate::sys::wait_any() {
            lost |= pid == vital;
            let end = End { status: crate::sys::exit_status(status), at_unix_nanos: now_unix_nanos() };
            let outcomes = self.state().reaper.exited(pid, end);
            self.follow(outcomes);
        }
        lost
    }

    pub(super) fn follow(&self, outcomes: Vec<Outcome>) {
        for outcome in outcomes {
            match outcome {
                Outcome::KillRest(id) => {
                    if let Err(e) = cgroup::kill(&cgroup::path(&id)) {
                        tracing::error!("kill what is left of container {id}: {e}");
                    }
                }
                Outcome::Tell((id, exec), end) => self.tell_exit(&id, &exec, end),
            }
        }
    }

    fn tell_exit(&self, id: &str, exec: &str, end: End) {
        if id.is_empty() {
            return self.tell_debug_exit(exec, end);
        }
        // The kernel tells of an OOM kill by another way, which may be slower.
        self.tell_oom(id);
        if let Ok(container) = self.state().container(id) {
            container.processes.remove(exec);
            if exec.is_empty() && !matches!(container.status, Status::Busy(_)) {
                container.status = Status::Stopped;
            }
        }
        self.events.exit(id, exec, end.status, end.at_unix_nanos);
        self.ended.notify_waiters();
    }

    /// Follows the kernel's count of OOM kills in a container until it is deleted.
    pub(super) fn watch_oom(self: &Arc<Self>, id: &str) {
        let watch = match Watch::new(&cgroup::path(id).join("memory.events")) {
            Ok(watch) => watch,
            // Without the memory controller there are no such kills.
            Err(e) => return tracing::warn!("container {id}: watch memory.events: {e}"),
        };
        // What happened before the watch.
        self.tell_oom(id);
        let (sandbox, name) = (Arc::clone(self), id.to_owned());
        let task = tokio::spawn(async move {
            while watch.changed().await.is_ok() {
                sandbox.tell_oom(&name);
            }
        });
        match self.state().container(id) {
            Ok(container) => container.oom_watch = Some(task.abort_handle()),
            Err(_) => task.abort(),
        }
    }

    fn tell_oom(&self, id: &str) {
        let Ok(text) = fs::read_to_string(cgroup::path(id).join("memory.events")) else { return };
        let kills = cgroup::flat_key(&text, "oom_kill").unwrap_or(0);
        let mut state = self.state();
        let Ok(container) = state.container(id) else { return };
        if kills > container.oom_kills {
            container.oom_kills = kills;
            self.events.oom(id);
        }
    }
}
