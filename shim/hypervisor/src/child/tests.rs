use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use super::*;

fn sh(script: &str) -> ChildSpec {
    let mut spec = ChildSpec::new("test", "/bin/sh");
    spec.args = vec!["-c".into(), script.into()];
    spec
}

/// A program that only a signal ends.
fn endless() -> Child {
    Child::spawn(sh("exec cat /dev/zero > /dev/null")).unwrap()
}

/// Makes grandchildren whose parent ended ours to reap, whatever the first process of this machine does.
fn adopt_orphans() {
    nix::sys::prctl::set_child_subreaper(true).unwrap();
}

fn exists(pid: i32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test]
async fn exit_codes_are_exact() {
    for code in [0, 1, 42, 255] {
        let mut child = Child::spawn(sh(&format!("exit {code}"))).unwrap();
        assert_eq!(child.exited().await, Exit::Code(code));
        assert_eq!(child.exited().await, Exit::Code(code), "the answer stays");
    }
}

#[tokio::test]
async fn a_signal_is_told_from_a_code() {
    let mut child = Child::spawn(sh("kill -TERM $$")).unwrap();
    assert_eq!(child.exited().await, Exit::Signal(libc::SIGTERM));
    assert_eq!(Exit::Signal(libc::SIGTERM).to_string(), "was ended by SIGTERM");
}

#[tokio::test]
async fn a_missing_program_is_an_error_of_spawn() {
    let error = Child::spawn(ChildSpec::new("test", "/no/such/program")).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    let error = Child::spawn(ChildSpec::new("test", "/etc/passwd")).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}

#[tokio::test]
async fn kill_reaps_and_may_be_repeated() {
    let mut child = endless();
    let pid = child.pid();
    assert!(exists(pid));
    assert_eq!(child.kill().await, Some(Exit::Signal(libc::SIGKILL)));
    assert!(!exists(pid), "no zombie is left");
    assert_eq!(child.kill().await, Some(Exit::Signal(libc::SIGKILL)));
}

#[tokio::test]
async fn drop_kills_and_reaps() {
    let child = endless();
    let pid = child.pid();
    drop(child);
    assert!(!exists(pid));
}

#[tokio::test]
async fn a_wait_can_be_given_up_and_taken_up_again() {
    let mut child = endless();
    assert!(tokio::time::timeout(Duration::from_millis(20), child.exited()).await.is_err());
    child.signal(libc::SIGTERM);
    assert_eq!(child.exited().await, Exit::Signal(libc::SIGTERM));
    child.signal(libc::SIGKILL);
}

#[tokio::test]
async fn output_is_kept_in_full_until_the_last_line() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = seen.clone();
    let mut spec =
        sh("i=0; while [ $i -lt 1000 ]; do echo line $i; i=$((i+1)); done; printf last; echo bad >&2");
    spec.stdout = Box::new(move |line| sink.lock().unwrap().push(line.to_owned()));
    let mut child = Child::spawn(spec).unwrap();
    child.exited().await;
    child.read_rest().await;
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 1001);
    assert_eq!(seen[999], "line 999");
    assert_eq!(child.last_output().last().unwrap(), "last");
    assert!(child.last_output().len() < 100, "what is kept is bounded");
    assert_eq!(child.last_errors(), ["bad"]);
}

#[tokio::test]
async fn a_grandchild_that_holds_the_pipe_does_not_hold_us() {
    adopt_orphans();
    let mut child = Child::spawn(sh("cat /dev/zero >/dev/null & echo $!; exit 0")).unwrap();
    assert_eq!(child.exited().await, Exit::Code(0));
    let started = Instant::now();
    child.read_rest().await;
    assert!(started.elapsed() < Duration::from_secs(5));
    let grandchild = nix::unistd::Pid::from_raw(child.last_output()[0].parse().unwrap());
    nix::sys::signal::kill(grandchild, nix::sys::signal::SIGKILL).unwrap();
    waitid(Id::Pid(grandchild), WaitPidFlag::WEXITED).unwrap();
}

#[tokio::test]
async fn only_named_descriptors_are_inherited() {
    let (mut reader, writer) = io::pipe().unwrap();
    // One that an earlier program left open for every child.
    let leaked = nix::unistd::dup(&writer).unwrap();
    nix::fcntl::fcntl(&leaked, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let number = writer.as_raw_fd();
    let mut spec = sh(&format!("ls /proc/self/fd >&2; echo hello >/dev/fd/{number}"));
    spec.fds = vec![writer.into()];
    let mut child = Child::spawn(spec).unwrap();
    assert_eq!(child.exited().await, Exit::Code(0));
    child.read_rest().await;
    drop(leaked);
    let mut text = String::new();
    io::Read::read_to_string(&mut reader, &mut text).unwrap();
    assert_eq!(text, "hello\n");
    // 0, 1, 2, the one that was given, and the one by which ls reads the directory.
    let fds = child.last_errors();
    assert_eq!(fds.len(), 5, "{fds:?}");
    assert!(fds.contains(&number.to_string()));
}

#[tokio::test]
async fn a_child_leads_its_own_session_and_inherits_no_variables() {
    let mut spec = sh("cut -d' ' -f1,6 /proc/$$/stat; env");
    spec.env = vec![("GIVEN".into(), "yes".into())];
    let mut child = Child::spawn(spec).unwrap();
    let pid = child.pid().to_string();
    child.exited().await;
    child.read_rest().await;
    let lines = child.last_output();
    assert_eq!(lines[0], format!("{pid} {pid}"));
    assert!(lines.contains(&"GIVEN=yes".into()));
    assert!(!lines.iter().any(|l| l.starts_with("CARGO")), "{lines:?}");
}

#[tokio::test]
async fn it_is_named_by_pid_and_start_time() {
    let mut child = endless();
    assert_eq!(start_time_ticks(child.pid()).unwrap(), child.start_time_ticks());
    let me = start_time_ticks(std::process::id() as i32).unwrap();
    assert!(child.start_time_ticks() >= me && me > 0);
    child.kill().await;
}

#[test]
fn a_command_with_parentheses_does_not_confuse() {
    let rest = (3..=52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
    assert_eq!(parse_start_time(&format!("7 (a) b (c)) {rest}\n")), Some(22));
    assert_eq!(parse_start_time("7 (a) S 1"), None);
    assert_eq!(parse_start_time(""), None);
}

/// Names the test that runs as another process, and is set in that process only.
const ROLE: &str = "BULKHEAD_TEST_ROLE";

#[test]
fn a_child_dies_with_us_even_by_sigkill() {
    const TEST: &str = "child::tests::a_child_dies_with_us_even_by_sigkill";
    if std::env::var_os(ROLE).is_some() {
        return parent_that_is_killed();
    }
    use std::io::BufRead;
    adopt_orphans();
    let mut parent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", TEST, "--nocapture"])
        .env(ROLE, "parent")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = io::BufReader::new(parent.stdout.take().unwrap()).lines();
    let pid = lines.map_while(Result::ok).find_map(|l| l.strip_prefix("child ")?.parse::<i32>().ok());
    let pid = pid.expect("the other process names its child");
    let child = crate::sys::pidfd_open(pid).unwrap();
    let mut ready = [PollFd::new(child.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut ready, PollTimeout::ZERO), Ok(0), "it lives as long as its parent");
    parent.kill().unwrap();
    parent.wait().unwrap();
    assert_eq!(poll(&mut ready, 10_000u16), Ok(1), "it ends with its parent");
    waitid(Id::PIDFd(child.as_fd()), WaitPidFlag::WEXITED).unwrap();
}

fn parent_that_is_killed() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let child = endless();
        // On a line of its own, whatever the test runner has begun to print.
        println!("\nchild {}", child.pid());
        std::future::pending::<()>().await;
    });
}
