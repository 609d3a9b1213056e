//! Statements E: the order of events, also when containerd takes them badly.

use anyhow::{Result, ensure};
use harness::{Context, Test};

use crate::fake::{Fake, Shim, Trouble};
use crate::task::sleeper;

pub(crate) const TESTS: &[Test] = &[
    Test::common("e1_order_of_a_life", e1_order_of_a_life),
    Test::common("e2_exit_never_before_start", e2_exit_never_before_start),
    Test::common("e3_execs_exit_before_their_init", e3_execs_exit_before_their_init),
    Test::common("e4_paused_and_resumed", e4_paused_and_resumed),
    Test::common("e5_events_survive_a_restart_of_containerd", e5_events_survive_a_restart_of_containerd),
    Test::common("e6_order_holds_when_events_are_refused", e6_order_holds_when_events_are_refused),
    Test::common("e6_order_holds_when_answers_do_not_come", e6_order_holds_when_answers_do_not_come),
    Test::common("e6_order_holds_over_a_cut_connection", e6_order_holds_over_a_cut_connection),
];

/// A whole life: created, started, ended by itself, deleted.
fn live(t: &Context, fake: &Fake, id: &str, script: &str) -> Result<()> {
    let bundle = fake.bundle(id, &t.spec(id, &["sh", "-c", script])?)?;
    let shim = fake.shim(id, &bundle)?;
    shim.create(id, &bundle)?;
    shim.start(id, "")?;
    shim.wait(id, "")?;
    shim.delete(id, "")?;
    shim.shutdown(id);
    Ok(())
}

fn check(fake: &Fake, wanted: &[&str], seconds: u64) -> Result<()> {
    let last = wanted.last().copied().unwrap_or_default();
    fake.wait_event(last, seconds)?;
    ensure!(fake.story() == wanted, "the events were {:?}", fake.story());
    Ok(())
}

fn e1_order_of_a_life(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    live(t, &fake, "c", "exit 5")?;
    check(&fake, &["create c", "start c", "exit c 5", "delete c"], 10)?;
    for envelope in fake.envelopes() {
        ensure!(envelope.namespace == t.node().namespace(), "{envelope:?}");
        let of = envelope.event.type_url.clone();
        ensure!(of.starts_with("containerd.events.Task"), "the type is {of}");
        ensure!(envelope.timestamp.seconds > 1_600_000_000, "{envelope:?}");
    }
    Ok(())
}

fn e2_exit_never_before_start(t: &mut Context) -> Result<()> {
    for _ in 0..3 {
        let fake = Fake::start(t)?;
        live(t, &fake, "c", "exit 0")?;
        check(&fake, &["create c", "start c", "exit c 0", "delete c"], 10)?;
    }
    // Execs that end at once, one after another in one container.
    let fake = Fake::start(t)?;
    running(t, &fake, |shim| {
        for n in 0..10 {
            let exec = format!("e{n}");
            shim.exec("c", &exec, &["true"])?;
            shim.start("c", &exec)?;
            shim.wait("c", &exec)?;
            shim.delete("c", &exec)?;
        }
        Ok(())
    })?;
    fake.wait_event("delete c", 10)?;
    let story = fake.story();
    for n in 0..10 {
        let place = |word: String| story.iter().position(|w| *w == word);
        let added = place(format!("exec-added c/e{n}"));
        let started = place(format!("exec-started c/e{n}"));
        let ended = place(format!("exit c/e{n} 0"));
        ensure!(added.is_some() && added < started && started < ended, "exec {n} in {story:?}");
    }
    Ok(())
}

fn running(t: &Context, fake: &Fake, work: impl FnOnce(&Shim) -> Result<()>) -> Result<()> {
    let bundle = fake.bundle("c", &sleeper(t, "c")?)?;
    let shim = fake.shim("c", &bundle)?;
    shim.create("c", &bundle)?;
    shim.start("c", "")?;
    work(&shim)?;
    shim.end("c")
}

fn e3_execs_exit_before_their_init(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    running(t, &fake, |shim| {
        for exec in ["a", "b"] {
            shim.exec("c", exec, &["sleep", "1000"])?;
            shim.start("c", exec)?;
        }
        Ok(())
    })?;
    fake.wait_event("exit c", 10)?;
    let story = fake.story();
    let exits: Vec<&String> = story.iter().filter(|w| w.starts_with("exit ")).collect();
    ensure!(exits.len() == 3, "{story:?}");
    ensure!(exits[2] == "exit c 137", "the init is not the last: {story:?}");
    Ok(())
}

fn e4_paused_and_resumed(t: &mut Context) -> Result<()> {
    use containerd_shim_protos::api::{Empty, PauseRequest, ResumeRequest};
    let fake = Fake::start(t)?;
    running(t, &fake, |shim| {
        shim.call::<Empty>("Pause", &PauseRequest { id: "c".into(), ..Default::default() })?;
        shim.call::<Empty>("Resume", &ResumeRequest { id: "c".into(), ..Default::default() })?;
        Ok(())
    })?;
    check(&fake, &["create c", "start c", "paused c", "resumed c", "exit c 137", "delete c"], 10)
}

/// containerd is away while a container ends; what happened then is told when it is back.
fn e5_events_survive_a_restart_of_containerd(t: &mut Context) -> Result<()> {
    let mut fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &sleeper(t, "c")?)?;
    let address = {
        let shim = fake.shim("c", &bundle)?;
        shim.create("c", &bundle)?;
        shim.start("c", "")?;
        fake.wait_event("start c", 10)?;
        shim.address.clone()
    };
    fake.hang_up();
    {
        let shim = fake.connect(&address)?;
        shim.exec("c", "e", &["sh", "-c", "exit 3"])?;
        shim.start("c", "e")?;
        shim.wait("c", "e")?;
        shim.kill("c", "", 9)?;
        shim.wait("c", "")?;
    }
    fake.listen()?;
    fake.wait_event("exit c", 30)?;
    let wanted = ["create c", "start c", "exec-added c/e", "exec-started c/e", "exit c/e 3", "exit c 137"];
    ensure!(fake.story() == wanted, "the events were {:?}", fake.story());
    let shim = fake.connect(&address)?;
    shim.delete("c", "")?;
    shim.shutdown("c");
    Ok(())
}

fn e6_order_holds_when_events_are_refused(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    // The first meets it twice, then one of those that follow.
    fake.make_trouble(&[Trouble::Refuse, Trouble::Refuse]);
    live(t, &fake, "c", "exit 5")?;
    check(&fake, &["create c", "start c", "exit c 5", "delete c"], 30)?;
    let troubled = fake.troubled();
    ensure!(troubled == ["/tasks/create", "/tasks/create"], "refused were {troubled:?}");
    Ok(())
}

fn e6_order_holds_when_answers_do_not_come(t: &mut Context) -> Result<()> {
    let fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &t.spec("c", &["sh", "-c", "exit 5"])?)?;
    let shim = fake.shim("c", &bundle)?;
    shim.create("c", &bundle)?;
    fake.wait_event("create c", 10)?;
    fake.make_trouble(&[Trouble::Silence]);
    shim.start("c", "")?;
    shim.wait("c", "")?;
    fake.wait_troubled(1, 10)?;
    ensure!(fake.troubled() == ["/tasks/start"], "met by {:?}", fake.troubled());
    check(&fake, &["create c", "start c", "exit c 5"], 30)?;
    shim.delete("c", "")?;
    shim.shutdown("c");
    check(&fake, &["create c", "start c", "exit c 5", "delete c"], 10)
}

fn e6_order_holds_over_a_cut_connection(t: &mut Context) -> Result<()> {
    let mut fake = Fake::start(t)?;
    let bundle = fake.bundle("c", &sleeper(t, "c")?)?;
    let address = {
        let shim = fake.shim("c", &bundle)?;
        shim.create("c", &bundle)?;
        fake.wait_event("create c", 10)?;
        shim.address.clone()
    };
    fake.hang_up();
    fake.connect(&address)?.start("c", "")?;
    fake.listen()?;
    let shim = fake.connect(&address)?;
    shim.kill("c", "", 9)?;
    shim.wait("c", "")?;
    check(&fake, &["create c", "start c", "exit c 137"], 30)?;
    shim.delete("c", "")?;
    shim.shutdown("c");
    Ok(())
}
