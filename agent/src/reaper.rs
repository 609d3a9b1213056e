//! Which ended pid was whose process, and when its end may be told.
//! Pure bookkeeping: no clock, no lock, no system call.
//!
//! ```text
//!             begin            launched(pid)            exited(pid)
//!   nothing ────────▶ launching ─────────────▶ running ─────────────▶ told
//!                         │  exited(pid) before launched(pid) is kept ──▲
//!                         └── failed ──▶ nothing
//! ```
//! The end of a container's init is told last: after the ends of all its execs, those still launching too.

use std::collections::HashMap;

/// Whose process: container id and exec id; an empty exec id is the container's init.
pub(crate) type Key = (String, String);

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct End {
    /// 0-255, 128+n for signals.
    pub(crate) status: u32,
    /// Guest wall clock, nanoseconds since the epoch.
    pub(crate) at_unix_nanos: u64,
}

/// What follows from something that happened, in the order in which it is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Init is gone, so all else in the container must go.
    KillRest(String),
    /// To be told to the host.
    Tell(Key, End),
}

#[derive(Default)]
pub(crate) struct Reaper {
    /// Launches without an answer yet, over all containers.
    launching: usize,
    /// Ends of pids that may turn out to belong to a launch.
    early: HashMap<i32, End>,
    running: HashMap<i32, Key>,
    containers: HashMap<String, Tally>,
}

#[derive(Default)]
struct Tally {
    /// Execs that run or are being launched.
    execs: usize,
    /// The end of init, while execs are left.
    init_end: Option<End>,
}

impl Reaper {
    /// A launch begins: from now on an unknown pid may be its process.
    pub(crate) fn begin(&mut self, key: &Key) {
        self.launching += 1;
        let tally = self.containers.entry(key.0.clone()).or_default();
        if !key.1.is_empty() {
            tally.execs += 1;
        }
    }

    /// The launch of `key` has given `pid`.
    pub(crate) fn launched(&mut self, key: Key, pid: i32) -> Vec<Outcome> {
        let early = self.early.remove(&pid);
        self.end_launch();
        match early {
            Some(end) => self.ended(key, end),
            None => {
                self.running.insert(pid, key);
                Vec::new()
            }
        }
    }

    /// The launch of `key` has failed: there is no process to tell of.
    pub(crate) fn failed(&mut self, key: &Key) -> Vec<Outcome> {
        self.end_launch();
        if key.1.is_empty() {
            self.containers.remove(&key.0);
            return Vec::new();
        }
        self.exec_gone(&key.0)
    }

    /// A child has ended.
    pub(crate) fn exited(&mut self, pid: i32, end: End) -> Vec<Outcome> {
        match self.running.remove(&pid) {
            Some(key) => self.ended(key, end),
            None => {
                // An orphan, unless one of the launches under way answers with this pid.
                if self.launching > 0 {
                    self.early.insert(pid, end);
                }
                Vec::new()
            }
        }
    }

    fn end_launch(&mut self) {
        self.launching -= 1;
        if self.launching == 0 {
            self.early.clear();
        }
    }

    fn ended(&mut self, key: Key, end: End) -> Vec<Outcome> {
        if !key.1.is_empty() {
            let mut outcomes = vec![Outcome::Tell(key.clone(), end)];
            outcomes.extend(self.exec_gone(&key.0));
            return outcomes;
        }
        let mut outcomes = vec![Outcome::KillRest(key.0.clone())];
        match self.containers.get_mut(&key.0) {
            Some(tally) if tally.execs > 0 => tally.init_end = Some(end),
            _ => {
                self.containers.remove(&key.0);
                outcomes.push(Outcome::Tell(key, end));
            }
        }
        outcomes
    }

    fn exec_gone(&mut self, container: &str) -> Vec<Outcome> {
        let Some(tally) = self.containers.get_mut(container) else { return Vec::new() };
        tally.execs -= 1;
        if tally.execs > 0 {
            return Vec::new();
        }
        let Some(end) = tally.init_end else { return Vec::new() };
        self.containers.remove(container);
        vec![Outcome::Tell((container.to_owned(), String::new()), end)]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(container: &str, exec: &str) -> Key {
        (container.into(), exec.into())
    }

    fn end(status: u32) -> End {
        End { status, at_unix_nanos: 1 }
    }

    #[test]
    fn an_instant_exit_is_kept_until_its_launch_has_answered() {
        let mut reaper = Reaper::default();
        reaper.begin(&key("c", ""));
        assert_eq!(reaper.exited(7, end(3)), []);
        assert_eq!(
            reaper.launched(key("c", ""), 7),
            [Outcome::KillRest("c".into()), Outcome::Tell(key("c", ""), end(3))]
        );
    }

    #[test]
    fn orphans_are_forgotten() {
        let mut reaper = Reaper::default();
        assert_eq!(reaper.exited(9, end(0)), []);
        reaper.begin(&key("c", ""));
        assert_eq!(reaper.exited(10, end(0)), []);
        assert_eq!(reaper.launched(key("c", ""), 11), []);
        assert!(reaper.early.is_empty());
    }

    #[test]
    fn init_is_told_after_its_execs() {
        let mut reaper = Reaper::default();
        for (exec, pid) in [("", 1), ("e", 2)] {
            reaper.begin(&key("c", exec));
            assert_eq!(reaper.launched(key("c", exec), pid), []);
        }
        assert_eq!(reaper.exited(1, end(0)), [Outcome::KillRest("c".into())]);
        assert_eq!(
            reaper.exited(2, end(137)),
            [Outcome::Tell(key("c", "e"), end(137)), Outcome::Tell(key("c", ""), end(0))]
        );
    }

    #[test]
    fn init_waits_for_an_exec_that_is_still_launching() {
        let mut reaper = Reaper::default();
        reaper.begin(&key("c", ""));
        reaper.launched(key("c", ""), 1);
        reaper.begin(&key("c", "e"));
        assert_eq!(reaper.exited(1, end(0)), [Outcome::KillRest("c".into())]);
        assert_eq!(reaper.failed(&key("c", "e")), [Outcome::Tell(key("c", ""), end(0))]);
    }

    proptest! {
        /// Whatever the order in which launches answer and pids end: each process is told once, init last.
        #[test]
        fn every_end_is_told_once_and_init_last(
            execs in 0usize..5,
            fails in prop::collection::vec(any::<bool>(), 5),
            order in prop::collection::vec(any::<prop::sample::Index>(), 40),
        ) {
            let mut reaper = Reaper::default();
            let mut told = Vec::new();
            // Steps still to be done, per process: its launch's answer and its end are free to swap.
            reaper.begin(&key("c", ""));
            told.extend(reaper.launched(key("c", ""), 100));
            let mut steps: Vec<(usize, bool)> = Vec::new();
            for (exec, fails) in fails.iter().enumerate().take(execs) {
                reaper.begin(&key("c", &format!("e{exec}")));
                steps.push((exec, true));
                if !fails {
                    steps.push((exec, false));
                }
            }
            steps.push((usize::MAX, false));
            for index in order {
                if steps.is_empty() { break }
                let (exec, answer) = steps.remove(index.index(steps.len()));
                let name = format!("e{exec}");
                let pid = 200 + exec as i32 % 100;
                told.extend(match (exec, answer) {
                    (usize::MAX, _) => reaper.exited(100, end(1)),
                    (_, true) if fails[exec] => reaper.failed(&key("c", &name)),
                    (_, true) => reaper.launched(key("c", &name), pid),
                    (_, false) => reaper.exited(pid, end(2)),
                });
            }
            prop_assert!(steps.is_empty());
            let told: Vec<_> = told.into_iter().filter_map(|o| match o {
                Outcome::Tell(key, end) => Some((key.1, end.status)),
                Outcome::KillRest(_) => None,
            }).collect();
            let mut names: Vec<_> = told.iter().map(|(name, _)| name.clone()).collect();
            prop_assert_eq!(names.pop(), Some(String::new()));
            prop_assert_eq!(told.last().map(|t| t.1), Some(1));
            names.sort();
            let expected: Vec<_> = (0..execs).filter(|e| !fails[*e]).map(|e| format!("e{e}")).collect();
            prop_assert_eq!(names, expected);
            prop_assert!(reaper.running.is_empty() && reaper.early.is_empty() && reaper.containers.is_empty());
        }
    }
}
