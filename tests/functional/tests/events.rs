//! The order of events, as `ctr events` shows it.

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Events, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::common("events::order_of_a_life", order_of_a_life),
    Test::common("events::order_of_an_instant_exit", order_of_an_instant_exit),
    Test::bulkhead(
        "events::none_is_lost_when_deleted_at_once",
        "runc's shim may end before it has sent its last events",
        none_is_lost_when_deleted_at_once,
    ),
    Test::common("events::order_of_an_exec", order_of_an_exec),
    Test::common("events::init_exits_last", init_exits_last),
    Test::common("events::paused_and_resumed", paused_and_resumed),
];

/// What happened to tasks so far.
fn topics(events: &Events) -> Vec<String> {
    let tasks = events.seen.iter().filter(|e| e.topic.starts_with("/tasks/"));
    tasks.map(|e| e.topic.trim_start_matches("/tasks/").to_string()).collect()
}

fn order_of_a_life(t: &mut Context) -> Result<()> {
    let mut events = t.events()?;
    t.start_detached(&[], "c", &["sh", "-c", "exit 17"])?;
    events.wait_exit("c", 30)?;
    ensure!(topics(&events) == ["create", "start", "exit"], "saw {:?}", topics(&events));
    let create = events.seen.iter().find(|e| e.topic == "/tasks/create").context("no create")?;
    ensure!(create.text("bundle").ends_with("/c") && create.number("pid") > 0, "{create:?}");
    let exit = events.seen.iter().find(|e| e.topic == "/tasks/exit").context("no exit")?;
    ensure!(exit.number("exit_status") == 17 && exit.number("pid") == create.number("pid"), "{exit:?}");
    ensure!(!exit.body["exited_at"].is_null(), "{exit:?}");
    t.remove("c")
}

/// Three lives of the shortest kind: an exit may never come before its start.
fn order_of_an_instant_exit(t: &mut Context) -> Result<()> {
    for _ in 0..3 {
        let mut events = t.events()?;
        t.start_detached(&[], "c", &["true"])?;
        events.wait_exit("c", 30)?;
        ensure!(topics(&events) == ["create", "start", "exit"], "saw {:?}", topics(&events));
        t.remove("c")?;
    }
    Ok(())
}

fn none_is_lost_when_deleted_at_once(t: &mut Context) -> Result<()> {
    for _ in 0..3 {
        let mut events = t.events()?;
        t.run_ok(&[], &["true"])?;
        let end = |e: &harness::Event| e.topic == "/tasks/delete" && e.text("container_id") == "c";
        events.wait(30, "/tasks/delete", end)?;
        ensure!(topics(&events) == ["create", "start", "exit", "delete"], "saw {:?}", topics(&events));
    }
    Ok(())
}

fn order_of_an_exec(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let mut events = t.events()?;
    t.exec("c", "e", &["sh", "-c", "exit 18"]).output()?.expect_code(18)?;
    let exit = events.wait(30, "the exit of e", |e| e.topic == "/tasks/exit" && e.text("id") == "e")?;
    ensure!(exit.number("exit_status") == 18 && exit.text("container_id") == "c", "{exit:?}");
    let topics: Vec<String> = events.topics().into_iter().filter(|t| t.starts_with("/tasks/")).collect();
    ensure!(topics == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"], "saw {topics:?}");
    t.remove("c")
}

fn init_exits_last(t: &mut Context) -> Result<()> {
    let mut events = t.events()?;
    t.start_sleeper(&[], "c")?;
    let exec = t.exec("c", "e", &["sh", "-c", "echo up; sleep 1000"]).spawn()?;
    exec.wait_for_text("up")?;
    t.ctr_ok(&["task", "kill", "-s", "KILL", "c"])?;
    events.wait_exit("c", 30)?;
    exec.wait()?.expect_code(137)?;
    let exits: Vec<&str> =
        events.seen.iter().filter(|e| e.topic == "/tasks/exit").map(|e| e.text("id")).collect();
    ensure!(exits == ["e", "c"], "the exits came as {exits:?}");
    t.remove("c")
}

fn paused_and_resumed(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let mut events = t.events()?;
    t.ctr_ok(&["task", "pause", "c"])?;
    t.ctr_ok(&["task", "resume", "c"])?;
    for topic in ["/tasks/paused", "/tasks/resumed"] {
        events.wait(10, topic, |e| e.topic == topic && e.text("container_id") == "c")?;
    }
    t.remove("c")
}
