//! A step of the shim fails, or the shim is killed there: at each place, by each way of making a pod. Run it with
//! `tests/run failures`.
//!
//! `BULKHEAD_TEST_WAY` chooses the way: `ctr`, or the handler of a pod: `bulkhead` (by the sandbox API) or
//! `bulkhead-podsandbox` (with a pause container). The places come from the shim under test itself; with
//! `BULKHEAD_TEST_EVERY` each is tried in every way that passes it, else the ways take turns.

mod container;
mod pod;

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use harness::{Context, Output, Run, Test};

const WHY: &str = "runc has no such places";

fn main() -> ExitCode {
    match tests() {
        Ok((way, tests)) if way == "ctr" => harness::run_suite("failures", &tests),
        Ok((_, tests)) => harness::run_suite_with_pods("failures", &tests),
        Err(error) => {
            eprintln!("failures: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn variable(name: &str) -> Result<String> {
    std::env::var(name).with_context(|| format!("{name} is not set: use tests/run failures"))
}

/// The way, and a test for each place and each thing that can happen there.
fn tests() -> Result<(String, Vec<Test>)> {
    let (way, every) =
        (variable("BULKHEAD_TEST_WAY")?, std::env::var("BULKHEAD_TEST_EVERY").is_ok_and(|v| !v.is_empty()));
    let shim = variable("BULKHEAD_TEST_FAILING_SHIM")?;
    let (body, mut tests): (fn(&mut Context<'_>) -> Result<()>, _) = match way.as_str() {
        "ctr" => (container::life, vec![Test::bulkhead("shipped::has_no_such_places", WHY, shipped)]),
        "bulkhead" | "bulkhead-podsandbox" => (pod::life, Vec::new()),
        other => bail!("BULKHEAD_TEST_WAY={other}: use ctr, bulkhead or bulkhead-podsandbox"),
    };
    let list = Run::new(shim).arg("failpoints").output()?.ok()?.out();
    for (row, line) in list.lines().enumerate() {
        let mut words = line.split(' ').map(|word| word.split(',').collect::<Vec<_>>());
        let (Some(name), Some(actions), Some(ways)) = (words.next(), words.next(), words.next()) else {
            bail!("the shim lists {line:?}, which is no place")
        };
        for (column, action) in actions.iter().enumerate() {
            let turn = ways[(row + column) % ways.len()];
            if turn == way || every && ways.contains(&way.as_str()) {
                let name = format!("{way}::{}::{action}", name[0]);
                tests.push(Test::bulkhead(String::leak(name), WHY, body));
            }
        }
    }
    Ok((way, tests))
}

/// What a test is about, from its name: the place and what happens there.
fn case<'a>(t: &Context<'a>) -> Result<(&'static str, &'static str)> {
    let mut parts = t.name().split("::").skip(1);
    parts.next().zip(parts.next()).context("a test of places is called WAY::PLACE::ACTION")
}

fn shipped(_: &mut Context<'_>) -> Result<()> {
    let has_places = |program: &str| -> Result<bool> {
        let bytes = std::fs::read(program).with_context(|| format!("read {program}"))?;
        let mark = b"BULKHEAD_FAILPOINT";
        Ok(bytes.windows(mark.len()).any(|window| window == mark))
    };
    ensure!(has_places(&variable("BULKHEAD_TEST_FAILING_SHIM")?)?, "the mark is not what tells them apart");
    ensure!(!has_places(&variable("BULKHEAD_TEST_SHIPPED_SHIM")?)?, "the shipped shim can be made to fail");
    Ok(())
}

/// What the user was told on the way: every command that failed.
#[derive(Default)]
struct Told(Vec<String>);

impl Told {
    /// What a command that succeeded has said; nothing of one that failed, which is kept.
    fn answer(&mut self, output: Output) -> Option<String> {
        match output.exit {
            harness::Exit::Code(0) => Some(output.out()),
            _ => {
                self.0.push(output.to_string());
                None
            }
        }
    }

    /// Fails unless a step that failed is named where the user looks, or nothing was seen of it at all.
    fn names(&self, place: &str) -> Result<()> {
        let words = format!("failpoint {place}");
        ensure!(
            self.0.is_empty() || self.0.iter().any(|text| text.contains(&words)),
            "no error says {words:?}:\n{}",
            self.0.join("\n")
        );
        Ok(())
    }
}

/// No command of a user may take longer, in seconds: else something hangs.
const PATIENCE: u64 = 60;
/// What the container says when its file is there and it can be ended.
const READY: &str = "the file says 42";
/// Says what it was given, ends when it is told to, and with a status that nothing else has: zero would be a lie.
const COMMAND: &str = "trap 'exit 23' TERM; echo the file says $(cat /mnt/file); sleep 1000 & wait";
const STATUS: i32 = 23;

/// A directory for the container, with a file.
fn directory(t: &Context<'_>) -> Result<String> {
    let dir = t.dir().join("given");
    std::fs::create_dir(&dir)?;
    std::fs::write(dir.join("file"), "42\n")?;
    Ok(dir.display().to_string())
}
