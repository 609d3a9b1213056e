//! What the kernel tells about processes, and running a program for its answer.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// Every program that is asked here answers at once; one that does not is broken.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a program printed on stdout.
///
/// # Errors
/// A sentence on why there is no answer, without the program's name.
pub(super) fn answer(program: &Path, arguments: &[&str]) -> Result<String, String> {
    answer_within(program, arguments, PATIENCE)
}

/// As [`answer`], of a program that may take longer.
pub(super) fn answer_within(
    program: &Path,
    arguments: &[&str],
    patience: Duration,
) -> Result<String, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot be waited for: {error}"))?;
    let output = runtime.block_on(async {
        let child = Command::new(program).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
        tokio::time::timeout(patience, child).await
    });
    let asked = arguments.join(" ");
    match output {
        Err(_) => Err(format!("does not answer to `{asked}` within {} s", patience.as_secs())),
        Ok(Err(error)) => Err(format!("cannot be started: {error}")),
        Ok(Ok(output)) if !output.status.success() => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().last().map(|line| format!(": {line}")).unwrap_or_default();
            Err(format!("fails on `{asked}` with {}{said}", output.status))
        }
        Ok(Ok(output)) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
    }
}

/// A process and all that descend from it.
pub(super) fn family(pid: u32) -> Vec<u32> {
    let (mut found, mut next) = (Vec::new(), VecDeque::from([pid]));
    while let Some(pid) = next.pop_front() {
        found.push(pid);
        let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        // Children are listed with the thread that made them (proc_pid_task_tid_children(5)).
        for thread in threads.flatten() {
            let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            next.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
    }
    found
}

/// The memory of a process in bytes, shared pages in proportion (PSS); the resident set where the kernel keeps the
/// exact figure from us.
pub(super) fn memory(pid: u32) -> Option<u64> {
    let read = |name: &str, key: &str| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/{name}")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
    };
    read("smaps_rollup", "Pss:").or_else(|| read("status", "VmRSS:"))
}

/// The short name of a process, or nothing if it does not exist.
pub(super) fn name(pid: u32) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).ok().map(|name| name.trim_end().to_owned())
}

/// The arguments of a process.
pub(super) fn arguments(pid: u32) -> Vec<String> {
    strings(pid, "cmdline")
}

/// The value of a variable in the environment with which a process was started.
pub(super) fn variable(pid: u32, name: &str) -> Option<String> {
    strings(pid, "environ")
        .into_iter()
        .find_map(|entry| Some(entry.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
}

fn strings(pid: u32, file: &str) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let parts = bytes.split(|byte| *byte == 0).filter(|part| !part.is_empty());
    parts.map(|part| String::from_utf8_lossy(part).into_owned()).collect()
}

/// A directory or program of a process, such as `cwd` or `exe`, as a path.
pub(super) fn link(pid: u32, name: &str) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/{name}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_what_the_program_prints() {
        assert_eq!(answer(Path::new("/bin/echo"), &["a", "b"]).unwrap(), "a b\n");
    }

    #[test]
    fn a_program_that_fails_is_quoted() {
        let said =
            answer(Path::new("/bin/sh"), &["-c", "echo first >&2; echo last >&2; exit 3"]).unwrap_err();
        assert!(said.ends_with("with exit status: 3: last"), "{said}");
        let said = answer(Path::new("/nonexistent"), &[]).unwrap_err();
        assert!(said.starts_with("cannot be started: No such file"), "{said}");
    }

    #[test]
    fn a_family_has_grandchildren() {
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "exec 3<&0; cat <&3 & echo ready; wait"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // The line says that the grandchild exists.
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line)
            .unwrap();
        let found = family(std::process::id());
        let under = family(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.contains(&std::process::id()) && found.contains(&child.id()));
        assert_eq!(under.len(), 2, "{under:?}");
        assert!(under.iter().all(|pid| found.contains(pid)));
    }

    #[test]
    fn we_have_memory_a_name_and_arguments() {
        let pid = std::process::id();
        assert!(memory(pid).unwrap() > 1 << 20);
        assert!(name(pid).is_some() && !arguments(pid).is_empty());
        assert_eq!(name(u32::MAX), None);
    }
}
