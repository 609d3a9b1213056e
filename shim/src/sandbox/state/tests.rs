//! Attacks the state machine: no order of requests, results, exits and deadlines may hang a caller, lose or
//! repeat an exit, or let a dead machine look like a success.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use proptest::prelude::*;

use super::*;

fn id(name: &str) -> ContainerId {
    ContainerId::parse(name).unwrap()
}

fn key(container: &str, exec: &str) -> ProcessKey {
    ProcessKey::parse(container, exec).unwrap()
}

fn io() -> Io {
    Io { stdout: "/fifo".into(), ..Io::default() }
}

fn create(name: &str) -> Request {
    Request::Create(Box::new(CreateRequest {
        id: id(name),
        bundle: "/bundle".into(),
        rootfs: Vec::new(),
        io: io(),
        options: None,
    }))
}

fn exit(status: u32) -> ExitInfo {
    ExitInfo { status, at: SystemTime::UNIX_EPOCH }
}

fn ended() -> MachineEnd {
    MachineEnd { reason: "qemu was killed".into(), status: 137, oom: false, at: SystemTime::UNIX_EPOCH }
}

fn fault() -> Fault {
    Fault::new(Kind::Internal, "no")
}

/// A sandbox with everything around it that keeps its side of the contract.
#[derive(Default)]
struct World {
    sandbox: Sandbox,
    tickets: u64,
    waiting: BTreeSet<Ticket>,
    replies: BTreeMap<Ticket, Result<Reply, Fault>>,
    jobs: Vec<Job>,
    deadlines: Vec<Deadline>,
    events: Vec<Event>,
    machine_lives: bool,
    quit: bool,
}

impl World {
    fn ask(&mut self, request: Request) -> Ticket {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.waiting.insert(ticket);
        self.feed(Input::Request(ticket, request));
        ticket
    }

    fn feed(&mut self, input: Input) {
        assert!(!self.quit, "an input after the end");
        for effect in self.sandbox.handle(input) {
            match effect {
                Effect::Reply(ticket, reply) => {
                    assert!(self.waiting.remove(&ticket), "{ticket:?} was answered twice");
                    self.replies.insert(ticket, reply);
                }
                Effect::Start(job) => self.jobs.push(job),
                Effect::Arm(deadline) => self.deadlines.push(deadline),
                Effect::Publish(event) => self.events.push(event),
                Effect::KillMachine(_) => {
                    if std::mem::take(&mut self.machine_lives) {
                        self.feed(Input::MachineEnded(ended()));
                    }
                }
                Effect::CloseStdin(_) => {}
                Effect::Quit => self.quit = true,
            }
        }
    }

    /// Ends the n-th job, well or badly.
    fn finish(&mut self, n: usize, well: bool) {
        if self.jobs.is_empty() {
            return;
        }
        let job = self.jobs.remove(n % self.jobs.len());
        // A guest that is gone answers nobody well.
        let guest = if well && self.machine_lives { Ok(()) } else { Err(fault()) };
        let done = match job {
            Job::PlanPod(_) => Done::PlanPod(if well { Ok(()) } else { Err(fault()) }),
            Job::Halt => {
                if std::mem::take(&mut self.machine_lives) {
                    self.feed(Input::MachineEnded(ended()));
                }
                Done::Halt
            }
            Job::Boot(_) | Job::BootPod => {
                self.machine_lives = well;
                Done::Boot(if well { Ok(42) } else { Err(fault()) })
            }
            Job::Prepare(request) => {
                // The one that is called "a" stands for the pod.
                let role = if request.id == id("a") { Role::Sandbox } else { Role::Member };
                Done::Prepare(request.id, if well { Ok(role) } else { Err(fault()) })
            }
            Job::GuestCreate(id) => Done::GuestCreate(id, guest.map(|()| 43)),
            Job::GuestStart(id) => Done::GuestStart(id, guest),
            Job::GuestExec { key, .. } => Done::GuestExec(key, guest),
            Job::Release { container, .. } => Done::Release(container),
            Job::Fit => Done::Fit,
            Job::Ask(ticket, ask) => Done::Ask(ticket, ask, guest.map(|()| Reply::Empty)),
            Job::Teardown => Done::Teardown(Ok(())),
        };
        self.feed(Input::Done(done));
    }

    /// Whatever is under way ends, the machine too; then every caller must have been answered.
    fn wind_up(&mut self) {
        for _ in 0..200 {
            if self.quit {
                return;
            }
            if !self.jobs.is_empty() {
                self.finish(0, true);
            } else if let Some(deadline) = self.deadlines.pop() {
                self.feed(Input::Expired(deadline));
            } else if std::mem::take(&mut self.machine_lives) {
                self.feed(Input::MachineEnded(ended()));
            } else {
                return;
            }
        }
        panic!("never at rest: jobs {:?}, deadlines {:?}", self.jobs, self.deadlines);
    }

    fn reply(&self, ticket: Ticket) -> &Result<Reply, Fault> {
        self.replies.get(&ticket).unwrap_or_else(|| panic!("{ticket:?} has no answer"))
    }

    /// A sandbox with one running container.
    fn running(name: &str) -> Self {
        let mut world = Self::default();
        let created = world.ask(create(name));
        while !world.jobs.is_empty() {
            world.finish(0, true);
        }
        assert_eq!(world.reply(created), &Ok(Reply::Pid(43)));
        let started = world.ask(Request::Start(key(name, "")));
        world.finish(0, true);
        assert_eq!(world.reply(started), &Ok(Reply::Pid(43)));
        world
    }

    fn exec(&mut self, name: &str, exec: &str) {
        let request = Request::Exec {
            container: id(name),
            exec: ExecId::parse(exec).unwrap(),
            io: io(),
            process: b"{}".to_vec().into(),
        };
        self.ask(request);
        self.ask(Request::Start(key(name, exec)));
        self.finish(0, true);
    }

    fn exits(&self) -> Vec<(String, u32)> {
        let exits = self.events.iter().filter_map(|event| match event {
            Event::Exit(key, _, exit) => Some((key.exec_str().to_owned(), exit.status)),
            _ => None,
        });
        exits.collect()
    }
}

#[test]
fn an_exit_that_overtakes_the_answer_to_start_is_told_after_it() {
    let mut world = World::default();
    world.ask(create("c"));
    while !world.jobs.is_empty() {
        world.finish(0, true);
    }
    let started = world.ask(Request::Start(key("c", "")));
    world.feed(Input::GuestExit(key("c", ""), exit(3)));
    world.feed(Input::StreamsClosed(key("c", "")));
    assert!(world.exits().is_empty());
    world.finish(0, true);
    assert_eq!(world.reply(started), &Ok(Reply::Pid(43)));
    let order: Vec<_> = world.events.iter().map(std::mem::discriminant).collect();
    let wanted = [
        Event::Create(
            Box::new(CreateRequest {
                id: id("c"),
                bundle: "/".into(),
                rootfs: vec![],
                io: io(),
                options: None,
            }),
            0,
        ),
        Event::Start(id("c"), 0),
        Event::Exit(key("c", ""), 0, exit(0)),
    ];
    assert_eq!(order, wanted.iter().map(std::mem::discriminant).collect::<Vec<_>>());
    assert_eq!(world.exits(), [(String::new(), 3)]);
}

#[test]
fn the_exit_of_an_init_waits_for_its_execs_and_its_output() {
    let mut world = World::running("c");
    world.exec("c", "e");
    world.feed(Input::GuestExit(key("c", ""), exit(0)));
    world.feed(Input::StreamsClosed(key("c", "")));
    assert!(world.exits().is_empty(), "an exec is still running");
    world.feed(Input::GuestExit(key("c", "e"), exit(137)));
    assert!(world.exits().is_empty(), "its output is still coming");
    world.feed(Input::StreamsClosed(key("c", "e")));
    assert_eq!(world.exits(), [("e".to_owned(), 137), (String::new(), 0)]);
}

#[test]
fn a_machine_that_dies_is_never_a_success() {
    let mut world = World::running("c");
    world.exec("c", "e");
    let wait = world.ask(Request::Wait(key("c", "")));
    world.machine_lives = false;
    world.feed(Input::MachineEnded(MachineEnd { status: 0, ..ended() }));
    world.wind_up();
    assert!(matches!(world.reply(wait), Ok(Reply::Exit(exit)) if exit.status != 0));
    assert!(world.exits().iter().all(|(_, status)| *status != 0));
}

#[test]
fn a_guest_that_does_not_take_sigkill_loses_its_machine() {
    let mut world = World::running("c");
    let kill = world.ask(Request::Kill { key: key("c", ""), signal: SIGKILL, all: false });
    world.finish(0, false);
    assert_eq!(world.reply(kill), &Ok(Reply::Empty));
    assert!(!world.machine_lives);
    world.wind_up();
    assert_eq!(world.exits(), [(String::new(), 137)]);
}

#[test]
fn a_machine_that_ends_while_a_signal_is_under_way_took_the_process_with_it() {
    for signal in [15, 9] {
        let mut world = World::running("c");
        let kill = world.ask(Request::Kill { key: ProcessKey::init(&id("c")), signal, all: false });
        world.machine_lives = false;
        world.feed(Input::MachineEnded(ended()));
        world.finish(0, false);
        assert_eq!(world.reply(kill).as_ref().map_err(|fault| fault.kind), Err(Kind::NotFound));
    }
}

#[test]
fn a_container_that_survives_sigkill_is_ended_with_its_machine() {
    let mut world = World::running("c");
    world.ask(Request::Kill { key: key("c", ""), signal: SIGKILL, all: false });
    world.finish(0, true);
    assert!(world.machine_lives);
    world.feed(Input::Expired(Deadline::Killed(id("c"))));
    assert!(!world.machine_lives);
}

#[test]
fn a_failed_create_takes_everything_back_before_it_is_told() {
    let mut world = World::default();
    let created = world.ask(create("c"));
    let prepare = world.jobs.iter().position(|job| matches!(job, Job::Prepare(_))).unwrap();
    world.finish(prepare, false);
    assert!(world.waiting.contains(&created), "not told before it is taken back");
    let release = world.jobs.iter().position(|job| matches!(job, Job::Release { .. })).unwrap();
    world.finish(release, true);
    assert_eq!(world.reply(created), &Err(fault()));
    let state = world.ask(Request::State(key("c", "")));
    assert_eq!(world.reply(state).as_ref().unwrap_err().kind, Kind::NotFound);
}

#[test]
fn a_machine_that_fails_waits_for_the_preparation_under_way() {
    let mut world = World::default();
    let created = world.ask(create("c"));
    world.finish(0, false);
    assert!(
        !world.jobs.iter().any(|job| matches!(job, Job::Release { .. })),
        "it would make things afterwards"
    );
    world.finish(0, true);
    world.finish(0, true);
    assert_eq!(world.reply(created), &Err(fault()));
}

#[test]
fn t7_connect_knows_strangers_and_nothing_else_does() {
    let mut world = World::default();
    let connect = world.ask(Request::Connect(id("x")));
    assert_eq!(world.reply(connect), &Ok(Reply::Connect(0)));
    let stranger = key("x", "");
    for request in [
        Request::State(stranger.clone()),
        Request::Start(stranger.clone()),
        Request::Kill { key: stranger.clone(), signal: 9, all: false },
        Request::Wait(stranger.clone()),
        Request::Delete(stranger),
        Request::Pids(id("x")),
        Request::Stats(id("x")),
    ] {
        let ticket = world.ask(request.clone());
        assert_eq!(world.reply(ticket).as_ref().unwrap_err().kind, Kind::NotFound, "{request:?}");
    }
}

#[test]
fn t10_the_wrong_moment_has_its_own_answer() {
    let mut world = World::running("c");
    let kind = |world: &mut World, request| {
        let ticket = world.ask(request);
        world.reply(ticket).as_ref().unwrap_err().kind
    };
    assert_eq!(kind(&mut world, Request::Delete(key("c", ""))), Kind::FailedPrecondition);
    world.exec("c", "e");
    let again = Request::Exec {
        container: id("c"),
        exec: ExecId::parse("e").unwrap(),
        io: io(),
        process: vec![1].into(),
    };
    assert_eq!(kind(&mut world, again.clone()), Kind::AlreadyExists);
    for process in ["e", ""] {
        world.feed(Input::GuestExit(key("c", process), exit(0)));
        world.feed(Input::StreamsClosed(key("c", process)));
    }
    assert_eq!(kind(&mut world, again), Kind::AlreadyExists);
    let late = Request::Exec {
        container: id("c"),
        exec: ExecId::parse("f").unwrap(),
        io: io(),
        process: vec![1].into(),
    };
    assert_eq!(kind(&mut world, late), Kind::FailedPrecondition);
    assert_eq!(kind(&mut world, Request::Kill { key: key("c", ""), signal: 15, all: false }), Kind::NotFound);
}

#[test]
fn t4_shutdown_is_ignored_while_a_container_remains() {
    let mut world = World::running("c");
    let early = world.ask(Request::Shutdown);
    assert_eq!(world.reply(early), &Ok(Reply::Empty));
    assert!(world.jobs.is_empty() && !world.quit);
    world.feed(Input::GuestExit(key("c", ""), exit(0)));
    world.feed(Input::StreamsClosed(key("c", "")));
    world.ask(Request::Delete(key("c", "")));
    world.finish(0, true);
    world.ask(Request::Shutdown);
    world.finish(0, true);
    assert!(world.quit);
}

#[test]
fn t4_a_shutdown_after_the_pod_was_deleted_ends_it_with_its_last_container() {
    let mut world = World::running("a");
    world.ask(create("b"));
    while !world.jobs.is_empty() {
        world.finish(0, true);
    }
    world.feed(Input::GuestExit(key("a", ""), exit(137)));
    world.feed(Input::StreamsClosed(key("a", "")));
    world.ask(Request::Delete(key("a", "")));
    world.finish(0, true);
    assert_eq!(world.jobs, [Job::Fit], "what it had goes back, and nobody waits for that");
    let shutdown = world.ask(Request::Shutdown);
    assert_eq!(world.reply(shutdown), &Ok(Reply::Empty));
    assert!(!world.quit, "a container remains");
    world.finish(0, true);
    world.feed(Input::GuestExit(key("b", ""), exit(0)));
    world.feed(Input::StreamsClosed(key("b", "")));
    world.ask(Request::Delete(key("b", "")));
    world.finish(0, true);
    world.finish(0, true);
    assert!(world.quit);
}

impl World {
    fn pod(&mut self, request: PodRequest) -> Ticket {
        self.ask(Request::Pod(request))
    }

    /// A pod of the sandbox API whose machine runs.
    fn with_pod() -> Self {
        let mut world = Self::default();
        let created = world.pod(pod_create());
        world.finish(0, true);
        assert_eq!(world.reply(created), &Ok(Reply::Empty));
        let started = world.pod(PodRequest::Start);
        world.finish(0, true);
        assert_eq!(world.reply(started), &Ok(Reply::Pid(42)));
        world
    }

    fn ready(&mut self) -> bool {
        let status = self.pod(PodRequest::Status);
        matches!(self.reply(status), Ok(Reply::PodStatus { ready: true, pid: 42, exit: None }))
    }
}

#[test]
fn c4_a_pod_lives_without_containers_until_it_is_shut_down() {
    let mut world = World::with_pod();
    assert!(world.ready());
    let shutdown = world.ask(Request::Shutdown);
    assert_eq!(world.reply(shutdown), &Ok(Reply::Empty), "the task service's own means nothing");
    assert!(world.ready());
    let wait = world.pod(PodRequest::Wait);
    let stop = world.pod(PodRequest::Stop { at: SystemTime::UNIX_EPOCH });
    assert!(world.waiting.contains(&stop), "not told before the machine has ended");
    world.finish(0, true);
    assert_eq!(world.reply(stop), &Ok(Reply::Empty));
    assert!(matches!(world.reply(wait), Ok(Reply::Exit(ExitInfo { status: 0, .. }))), "it was asked for");
    assert!(!world.ready() && !world.quit);
    world.pod(PodRequest::Shutdown);
    world.finish(0, true);
    assert!(world.quit);
}

#[test]
fn c5_a_pod_whose_machine_dies_is_not_ready_and_never_a_success() {
    let mut world = World::with_pod();
    let wait = world.pod(PodRequest::Wait);
    world.machine_lives = false;
    world.feed(Input::MachineEnded(MachineEnd { status: 0, ..ended() }));
    assert!(matches!(world.reply(wait), Ok(Reply::Exit(exit)) if exit.status != 0));
    assert!(!world.ready());
}

#[test]
fn c5_a_shutdown_takes_every_container_with_it() {
    let mut world = World::with_pod();
    world.ask(create("c"));
    while !world.jobs.is_empty() {
        world.finish(0, true);
    }
    let shutdown = world.pod(PodRequest::Shutdown);
    world.wind_up();
    assert!(world.quit);
    assert_eq!(world.reply(shutdown), &Ok(Reply::Empty));
    assert_eq!(world.exits(), [(String::new(), 137)]);
}

#[test]
fn a_pod_that_is_refused_can_be_shut_down() {
    let mut world = World::default();
    let created = world.pod(pod_create());
    world.finish(0, false);
    assert_eq!(world.reply(created), &Err(fault()));
    world.pod(PodRequest::Shutdown);
    world.finish(0, true);
    assert!(world.quit);
}

#[test]
fn t8_a_silent_guest_still_has_a_process() {
    let mut world = World::running("c");
    let pids = world.ask(Request::Pids(id("c")));
    world.finish(0, false);
    assert_eq!(world.reply(pids), &Ok(Reply::Pids(vec![(43, String::new())])));
}

#[test]
fn a_container_that_is_deleted_while_it_is_created_is_taken_back() {
    let mut world = World::default();
    let created = world.ask(create("c"));
    let pids = world.ask(Request::Pids(id("c")));
    assert_eq!(world.reply(pids), &Ok(Reply::Pids(Vec::new())));
    let deleted = world.ask(Request::Delete(key("c", "")));
    world.wind_up();
    assert_eq!(world.reply(created).as_ref().unwrap_err().kind, Kind::FailedPrecondition);
    assert_eq!(world.reply(deleted).as_ref().unwrap_err().kind, Kind::NotFound);
    assert!(world.sandbox.containers.is_empty());
}

#[test]
fn a_signal_to_the_stand_in_is_one_to_the_container_while_it_lives() {
    let mut world = World::running("c");
    world.feed(Input::Signalled(id("other"), 15));
    assert!(world.jobs.is_empty(), "there is nobody");
    world.feed(Input::Signalled(id("c"), 15));
    let asked = |job: &Job| matches!(job, Job::Ask(_, Ask::Signal { signal: 15, all: false, .. }));
    assert!(world.jobs.iter().any(asked), "{:?}", world.jobs);
    world.finish(0, true);
    world.feed(Input::GuestExit(key("c", ""), exit(0)));
    world.feed(Input::StreamsClosed(key("c", "")));
    world.feed(Input::Signalled(id("c"), 9));
    assert!(world.jobs.is_empty(), "it has ended");
}

#[test]
fn a_container_that_has_ended_is_not_one_without_pids() {
    let mut world = World::running("c");
    world.feed(Input::GuestExit(key("c", ""), exit(23)));
    let draining = world.ask(Request::Pids(id("c")));
    assert_eq!(world.reply(draining), &Ok(Reply::Pids(vec![(43, String::new())])));
    world.feed(Input::StreamsClosed(key("c", "")));
    let stopped = world.ask(Request::Pids(id("c")));
    assert_eq!(world.reply(stopped).as_ref().unwrap_err().kind, Kind::FailedPrecondition);
}

#[derive(Clone, Debug)]
enum Step {
    Ask(Request),
    Finish(usize, bool),
    Exit(ProcessKey, u32),
    Streams(ProcessKey),
    Expire(usize),
    Oom(ContainerId),
    Signalled(ContainerId, u32),
    MachineEnds,
    AgentLost,
}

fn processes() -> impl Strategy<Value = ProcessKey> {
    (prop_oneof![Just("a"), Just("b")], prop_oneof![3 => Just(""), 1 => Just("e"), 1 => Just("f")])
        .prop_map(|(c, e)| key(c, e))
}

fn requests() -> impl Strategy<Value = Request> {
    let container = || prop_oneof![Just(id("a")), Just(id("b"))];
    prop_oneof![
        3 => prop_oneof![Just("a"), Just("b")].prop_map(create),
        4 => processes().prop_map(Request::Start),
        2 => (container(), prop_oneof![Just("e"), Just("f")]).prop_map(|(container, exec)| Request::Exec {
            container,
            exec: ExecId::parse(exec).unwrap(),
            io: io(),
            process: b"{}".to_vec().into(),
        }),
        1 => processes().prop_map(Request::State),
        1 => container().prop_map(Request::Pids),
        1 => container().prop_map(Request::Pause),
        1 => container().prop_map(Request::Resume),
        2 => (processes(), prop_oneof![Just(9u32), Just(15)], any::<bool>())
            .prop_map(|(key, signal, all)| Request::Kill { key, signal, all }),
        1 => processes().prop_map(|key| Request::ResizePty { key, width: 80, height: 24 }),
        1 => processes().prop_map(Request::CloseIo),
        1 => container().prop_map(|container| Request::Update { container, resources: Vec::new() }),
        2 => processes().prop_map(Request::Wait),
        1 => container().prop_map(Request::Stats),
        1 => container().prop_map(Request::Connect),
        3 => processes().prop_map(Request::Delete),
        1 => Just(Request::Shutdown),
        3 => pod_requests().prop_map(Request::Pod),
    ]
}

fn pod_create() -> PodRequest {
    PodRequest::Create(Box::new(CreatePod { config: Opaque::default(), netns: "/netns".into() }))
}

fn pod_requests() -> impl Strategy<Value = PodRequest> {
    prop_oneof![
        4 => Just(pod_create()),
        4 => Just(PodRequest::Start),
        2 => Just(PodRequest::Stop { at: SystemTime::UNIX_EPOCH }),
        2 => Just(PodRequest::Wait),
        1 => Just(PodRequest::Status),
        1 => Just(PodRequest::Stats),
        1 => Just(PodRequest::Shutdown),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => requests().prop_map(Step::Ask),
        8 => (any::<usize>(), prop::bool::weighted(0.8)).prop_map(|(n, well)| Step::Finish(n, well)),
        4 => (processes(), 0u32..256).prop_map(|(key, status)| Step::Exit(key, status)),
        3 => processes().prop_map(Step::Streams),
        1 => any::<usize>().prop_map(Step::Expire),
        1 => Just(Step::Oom(id("a"))),
        1 => Just(Step::Signalled(id("b"), 9)),
        1 => Just(Step::MachineEnds),
        1 => Just(Step::AgentLost),
    ];
    prop::collection::vec(step, 0..80)
}

/// Creates come before starts, starts before exits, exits come once and before the delete; the exit of an
/// init comes after those of its execs that were told to have started.
fn check_events(events: &[Event]) -> Result<(), TestCaseError> {
    let mut begun: BTreeSet<ProcessKey> = BTreeSet::new();
    let mut created: BTreeSet<ContainerId> = BTreeSet::new();
    for event in events {
        match event {
            Event::Create(request, _) => prop_assert!(created.insert(request.id.clone())),
            Event::Start(id, _) => {
                prop_assert!(created.contains(id), "started before it was created");
                prop_assert!(begun.insert(ProcessKey::init(id)), "started twice");
            }
            Event::ExecStarted(key, _) => {
                prop_assert!(begun.contains(&ProcessKey::init(&key.container)), "exec without its init");
                prop_assert!(begun.insert(key.clone()), "started twice");
            }
            Event::Exit(key, _, _) if key.exec.is_some() => {
                prop_assert!(begun.remove(key), "an exec's exit without its start, or told twice");
            }
            Event::Exit(key, _, _) => {
                prop_assert!(created.contains(&key.container), "an exit that was told twice or of nobody");
                begun.remove(key);
                let late = begun.iter().find(|k| k.container == key.container);
                prop_assert!(late.is_none(), "the exit of an init before that of {late:?}");
                created.remove(&key.container);
            }
            _ => {}
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_things_hangs_a_caller_or_loses_an_exit(steps in steps()) {
        let mut world = World::default();
        for step in steps {
            if world.quit {
                break;
            }
            match step {
                Step::Ask(request) => { world.ask(request); }
                Step::Finish(n, well) => world.finish(n, well),
                Step::Exit(key, status) => world.feed(Input::GuestExit(key, exit(status))),
                Step::Streams(key) => world.feed(Input::StreamsClosed(key)),
                Step::Expire(n) if !world.deadlines.is_empty() => {
                    let deadline = world.deadlines.remove(n % world.deadlines.len());
                    world.feed(Input::Expired(deadline));
                }
                Step::Expire(_) => {}
                Step::Oom(id) => world.feed(Input::GuestOom(id)),
                Step::Signalled(id, signal) => world.feed(Input::Signalled(id, signal)),
                Step::MachineEnds if std::mem::take(&mut world.machine_lives) => {
                    world.feed(Input::MachineEnded(ended()));
                }
                Step::AgentLost if world.machine_lives => world.feed(Input::AgentLost),
                Step::MachineEnds | Step::AgentLost => {}
            }
        }
        world.wind_up();
        if !world.quit {
            // A pod that was never started has nothing to end.
            let end = world.ask(Request::Pod(PodRequest::Stop { at: SystemTime::UNIX_EPOCH }));
            world.wind_up();
            prop_assert!(world.replies.contains_key(&end));
            // Execs that were never started have nothing to end; everybody else has been answered.
            let idle: BTreeSet<Ticket> = world
                .sandbox
                .containers
                .values()
                .flat_map(|c| c.execs.values())
                .filter(|p| matches!(p.phase, Phase::Added { .. }))
                .flat_map(|p| p.waiters.iter().copied())
                .collect();
            prop_assert_eq!(&world.waiting, &idle, "callers that hang: {:?}", world.sandbox);
            for container in world.sandbox.containers.values() {
                prop_assert!(container.init.phase == Phase::Stopped, "{:?}", container.init.phase);
            }
        }
        check_events(&world.events)?;
    }
}
