//! Programs that run in the namespaces of the guest itself, by which an operator looks at the guest.
//! Knows who may ask, and whose files they use; how one gets there is the launcher's.
//!
//! Such a program belongs to no container: in the books it has the empty id of a container. When it ends, all that it
//! has started ends too; so it does when the container is deleted whose files it uses.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
    sync::Arc,
};

use bulkhead_proto::agent::{DebugExecRequest, SignalRequest};

use super::{DEADLINE, Process, Sandbox, terminal_of};
use crate::{
    cgroup,
    error::{Doing, Error, Result},
    launcher::{Debug, LastMile},
    reaper::{End, Key},
    spec,
};

/// The programs that run now.
#[derive(Default)]
pub(super) struct Programs {
    allowed: bool,
    running: HashMap<String, Program>,
}

struct Program {
    process: Process,
    /// The container whose files it uses.
    root: String,
    /// It was killed before it was there.
    killed: bool,
}

/// Whether the process is one of these.
pub(super) fn is_key(key: &Key) -> bool {
    key.0.is_empty()
}

fn name(exec: &str) -> String {
    format!("program {exec} in the guest")
}

impl Programs {
    /// What the host has decided.
    pub(super) fn allow(&mut self, allowed: bool) {
        self.allowed = allowed;
    }

    pub(super) fn process(&self, exec: &str) -> Result<&Process> {
        let program = self.running.get(exec).map(|program| &program.process);
        program.filter(|process| process.pid != 0).ok_or_else(|| not_running(exec))
    }

    /// One that is wanted has become a process.
    pub(super) fn launched(&mut self, exec: &str, process: Process) {
        if let Some(program) = self.running.get_mut(exec) {
            program.process = process;
        }
    }
}

fn not_running(exec: &str) -> Error {
    Error::NotFound(format!("{} is not running", name(exec)))
}

/// The container named so, of these with their roots: by its id, the beginning of one, or by nothing where there is
/// only one.
fn choose<'a>(roots: &BTreeMap<&'a str, &'a Path>, wanted: &str) -> Result<(&'a str, &'a Path)> {
    let begin = || roots.iter().filter(|(id, _)| id.starts_with(wanted)).map(|(id, root)| (*id, *root));
    let found = match roots.get_key_value(wanted) {
        Some((id, root)) => vec![(*id, *root)],
        None => begin().collect(),
    };
    match found[..] {
        [one] => Ok(one),
        [] if roots.is_empty() => Err(Error::NotFound(
            "the pod has no container, and the guest has no programs of its own: start a container that has them"
                .into(),
        )),
        [] => Err(Error::NotFound(format!(
            "the pod has no container {wanted:?} whose programs could be used: there are {}",
            roots.keys().copied().collect::<Vec<_>>().join(", ")
        ))),
        _ => Err(Error::Invalid(format!(
            "say which container's programs are to be used, with --root: there are {}",
            found.iter().map(|(id, _)| *id).collect::<Vec<_>>().join(", ")
        ))),
    }
}

impl Sandbox {
    /// Runs a program in the guest's own namespaces. Answers its pid.
    pub(crate) async fn debug_exec(self: &Arc<Self>, request: &DebugExecRequest) -> Result<u32> {
        let exec = &request.exec_id;
        spec::check_id(exec)?;
        if request.args.is_empty() {
            return Err(Error::Invalid("args: there is no program to run".into()));
        }
        let cgroup = cgroup::debug_path(exec);
        let debug = {
            let mut state = self.state();
            if !state.debug.allowed {
                return Err(Error::State("the host has not allowed programs in the guest itself".into()));
            }
            if state.debug.running.contains_key(exec) {
                return Err(Error::Exists(format!("{} exists already", name(exec))));
            }
            let roots =
                state.containers.iter().map(|(id, container)| (id.as_str(), container.root.as_path()));
            let (id, root) = choose(&roots.collect(), &request.root)?;
            let (id, root) = (id.to_owned(), root.to_owned());
            let process = Process { pid: 0, terminal: None };
            state.debug.running.insert(exec.clone(), Program { process, root: id, killed: false });
            let last_mile = LastMile {
                init: false,
                args: request.args.clone(),
                env: request.env.clone(),
                cwd: "/".into(),
                uid: 0,
                linux32: false,
                capabilities: None,
                seccomp: None,
                no_new_privileges: false,
                terminal: terminal_of(&request.stdio),
            };
            Debug { root, cgroup: cgroup.clone(), last_mile }
        };
        let key = (String::new(), exec.clone());
        let launched = match fs::create_dir_all(&cgroup).doing(|| format!("create {}", cgroup.display())) {
            Ok(()) => self.launch(&key, &request.stdio, |stdio| self.launcher.debug(debug, stdio)).await,
            Err(e) => Err(e),
        };
        match launched {
            Ok(pid) => {
                // What came in time to be for it, but too early to hit it.
                if self.state().debug.running.get(exec).is_some_and(|program| program.killed) {
                    cgroup::kill(&cgroup).doing(|| format!("end {}", name(exec)))?;
                }
                Ok(pid)
            }
            Err(e) => {
                self.state().debug.running.remove(exec);
                let _ = cgroup::remove(&cgroup);
                Err(e)
            }
        }
    }

    /// Sends a signal to one of these programs, or to all that it has started too.
    pub(super) fn signal_debug(&self, request: &SignalRequest) -> Result<()> {
        let (exec, signal) = (&request.exec_id, request.signal);
        let mut state = self.state();
        let what = || format!("send signal {signal} to {}", name(exec));
        if !request.all {
            return crate::sys::kill(state.debug.process(exec)?.pid, signal).doing(what);
        }
        if signal != libc::SIGKILL as u32 {
            return Err(Error::Invalid(format!(
                "{}: all of it can be killed, by signal {}",
                name(exec),
                libc::SIGKILL
            )));
        }
        let program = state.debug.running.get_mut(exec).ok_or_else(|| not_running(exec))?;
        program.killed = true;
        cgroup::kill(&cgroup::debug_path(exec)).doing(what)
    }

    /// Ends the programs that use the files of a container.
    pub(super) async fn end_debug_of(&self, id: &str) -> Result<()> {
        let ended: Vec<String> = {
            let mut state = self.state();
            let of_it = state.debug.running.iter_mut().filter(|(_, program)| program.root == id);
            of_it
                .map(|(exec, program)| {
                    program.killed = true;
                    exec.clone()
                })
                .collect()
        };
        for exec in ended {
            let cgroup = cgroup::debug_path(&exec);
            cgroup::kill(&cgroup).doing(|| format!("end {}", name(&exec)))?;
            cgroup::emptied(&cgroup, DEADLINE)
                .await
                .doing(|| format!("wait for the end of {}", name(&exec)))?;
        }
        Ok(())
    }

    /// What it has started goes with it, and has gone when the end is told.
    pub(super) fn tell_debug_exit(&self, exec: &str, end: End) {
        let (cgroup, name) = (cgroup::debug_path(exec), name(exec));
        if let Err(e) = cgroup::kill(&cgroup) {
            tracing::error!("kill what is left of {name}: {e}");
        }
        self.state().debug.running.remove(exec);
        let (events, exec) = (self.events.clone(), exec.to_owned());
        tokio::spawn(async move {
            let emptied = cgroup::emptied(&cgroup, DEADLINE).await;
            if let Err(e) = emptied.and_then(|()| cgroup::remove(&cgroup)) {
                tracing::warn!("remove the cgroup of {name}: {e}");
            }
            events.exit("", &exec, end.status, end.at_unix_nanos);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(ids: &[&str], wanted: &str) -> std::result::Result<String, String> {
        let roots = ids.iter().map(|id| (*id, Path::new("/share").join(id))).collect::<Vec<_>>();
        let roots = roots.iter().map(|(id, root)| (*id, root.as_path())).collect();
        choose(&roots, wanted).map(|(id, root)| format!("{id} {}", root.display())).map_err(|e| e.to_string())
    }

    #[test]
    fn programs_come_from_the_container_that_is_named() {
        assert_eq!(chosen(&["web"], "").unwrap(), "web /share/web");
        assert_eq!(chosen(&["web", "web2"], "web").unwrap(), "web /share/web");
        assert_eq!(chosen(&["0a1b", "0c2d"], "0c").unwrap(), "0c2d /share/0c2d");
        assert_eq!(
            chosen(&["b", "a"], "").unwrap_err(),
            "say which container's programs are to be used, with --root: there are a, b"
        );
        assert_eq!(
            chosen(&["a"], "x").unwrap_err(),
            "the pod has no container \"x\" whose programs could be used: there are a"
        );
        assert!(chosen(&[], "").unwrap_err().starts_with("the pod has no container, and"));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let programs = Programs::default();
        assert_eq!(programs.process("7").err().unwrap().to_string(), "program 7 in the guest is not running");
    }
}
