//! Files of the host in a container: what many small ones cost, a large one, and the copy of a tree.

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};

use crate::ctr::Runtime;
use crate::report::{Measure, Unit};
use crate::rounds::{Bench, Times, order};

/// Small files of one round.
const MANY: usize = 10_000;
/// MiB of the large one.
const LARGE: usize = 1024;
/// Folders of the tree that is copied, and files in each.
const TREE: (usize, usize) = (50, 40);

/// A step: its line in the table, and what a shell does in the folder that the host shares.
struct Step {
    line: &'static str,
    script: String,
}

/// In their order: each finds what those before have left. `many` is how many small files there are.
fn steps(many: usize) -> Vec<Step> {
    let step = |line, script: String| Step { line, script };
    vec![
        step(
            "files: create 10,000",
            format!(
                "mkdir many && cd many && awk 'BEGIN {{ while (n++ < {many}) {{ print n >n; close(n) }} }}'"
            ),
        ),
        step("- stat 10,000", "ls -l many | tail -n 1 >/dev/null".into()),
        step("- read 10,000", "cd many && find . -type f | xargs cat | tail -n 1 >/dev/null".into()),
        step("- unlink 10,000", "rm -r many".into()),
        step(
            "- write 1 GiB, to the disk",
            format!("dd if=/dev/zero of=large bs=1M count={LARGE} conv=fsync 2>/dev/null"),
        ),
        step("- read 1 GiB", "dd if=large of=/dev/null bs=1M 2>/dev/null".into()),
        step("- copy a tree of 2,000", "cp -r tree copy".into()),
    ]
}

/// Seconds of each step, one a round.
#[derive(Debug, Default)]
pub(crate) struct Files(Vec<Times>);

impl Files {
    /// The lines of the table; none where nothing was measured.
    pub(crate) fn lines(&self) -> Vec<Measure> {
        let line = |(step, times): (Step, &Times)| {
            Measure::beside(step.line, Unit::Seconds, &times.runc, &times.bulkhead)
        };
        let mut lines: Vec<_> = steps(MANY).into_iter().zip(&self.0).map(line).collect();
        if let Some(first) = lines.first_mut() {
            let note = "a bind mount of the host's disk; by one exec each, which is counted; caches are as the steps \
                        before have left them";
            *first = first.clone().with_note(note);
        }
        lines
    }
}

/// What the tree is made of: a few bytes to some tens of KiB each, as sources are.
fn make_tree(folder: &Path) -> anyhow::Result<()> {
    let (folders, files) = TREE;
    for f in 0..folders {
        let place = folder.join("tree").join(format!("folder-{f}"));
        fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
        for n in 0..files {
            let content = vec![b'x'; (n * n * 29) % 40_000 + 17];
            fs::write(place.join(format!("file-{n}")), content)
                .with_context(|| format!("cannot write to {}", place.display()))?;
        }
    }
    Ok(())
}

/// Measures in containers that stay for all rounds. After a failure `into` holds what was measured before it.
pub(crate) async fn measure(
    bench: &Bench,
    folder: &Path,
    rounds: usize,
    into: &mut Files,
) -> anyhow::Result<()> {
    let result = in_containers(bench, folder, rounds, into).await;
    let removed = fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()));
    result.and(removed)
}

async fn in_containers(bench: &Bench, folder: &Path, rounds: usize, into: &mut Files) -> anyhow::Result<()> {
    let steps = steps(MANY);
    into.0 = steps.iter().map(|_| Times::default()).collect();
    let mut containers = Vec::new();
    for runtime in Runtime::ALL {
        let place = folder.join(runtime.name());
        make_tree(&place)?;
        containers.push((runtime, bench.detached_with_folder(runtime, &place, "/files").await?));
    }
    for round in 0..rounds {
        for runtime in order(round) {
            let id = containers.iter().find(|(other, _)| *other == runtime).map(|(_, id)| id.clone());
            let id = id.context("both runtimes have a container")?;
            for (number, step) in steps.iter().enumerate() {
                let script = format!("cd /files && {}", step.script);
                let run = bench.ctr().exec(&id, &format!("{round}-{number}"), &["sh", "-c", &script]).await?;
                into.0[number].of(runtime).push(run.total.as_secs_f64());
            }
            let left = folder.join(runtime.name());
            ensure!(!left.join("many").exists(), "the files were not removed");
            for name in ["large", "copy"] {
                let path = left.join(name);
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
    }
    // After a failure the bench removes them.
    for (_, id) in containers {
        bench.remove(&id).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_do_what_they_say() {
        let dir = tempfile::tempdir().unwrap();
        make_tree(dir.path()).unwrap();
        let shell = |script: &str| {
            let status =
                std::process::Command::new("sh").args(["-c", script]).current_dir(dir.path()).status();
            assert!(status.unwrap().success(), "{script}");
        };
        for step in steps(100).iter().filter(|step| !step.line.contains("1 GiB")) {
            shell(&step.script);
            if step.line.contains("create") {
                assert_eq!(fs::read_dir(dir.path().join("many")).unwrap().count(), 100);
            }
        }
        assert!(!dir.path().join("many").exists());
        let copied = fs::read_dir(dir.path().join("copy")).unwrap().count();
        assert_eq!(copied * TREE.1, 2000);
    }

    #[test]
    fn what_was_not_measured_has_no_line() {
        assert!(Files::default().lines().is_empty());
    }
}
