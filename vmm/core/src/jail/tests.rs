use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Read, Write},
    process::{Child, Command, Stdio},
};

use super::*;

/// Set in the process that enters the jail.
const ROLE: &str = "BULKHEAD_TEST_ROLE";
const ID: u32 = 1_900_000_001;

/// In the jail: says so, then waits until the outside has looked.
fn prisoner() {
    enter(Identity { uid: ID, gid: ID, in_pod_network: false }).expect("enter the jail");
    println!("\njailed");
    let _ = std::io::stdin().read(&mut [0]);
    for path in ["/proc/self", "/etc/passwd", "/new"] {
        assert!(std::fs::File::create(path).is_err() && std::fs::File::open(path).is_err(), "{path}");
    }
    assert!(setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).is_err(), "no way back");
    println!("\nheld");
}

fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).expect(name);
    line.trim().to_owned()
}

fn wait_for(prisoner: &mut BufReader<std::process::ChildStdout>, word: &str) {
    let found = prisoner.lines().map_while(Result::ok).any(|line| line == word);
    assert!(found, "the prisoner never said {word:?}");
}

fn start() -> Child {
    Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "jail::tests::whoever_enters_is_nobody_and_sees_nothing", "--nocapture"])
        .env(ROLE, "prisoner")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start this test again")
}

#[test]
fn whoever_enters_is_nobody_and_sees_nothing() {
    if std::env::var_os(ROLE).is_some() {
        return prisoner();
    }
    assert!(Uid::effective().is_root(), "a jail is made by root");
    let mut child = start();
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    wait_for(&mut out, "jailed");

    // The tests run on a thread of their own: it is the one that entered.
    let task = format!("/proc/{}/task", child.id());
    let jailed = std::fs::read_dir(task)
        .expect("its threads")
        .flatten()
        .map(|t| t.path())
        .find(|t| field(&std::fs::read_to_string(t.join("status")).expect("status"), "NoNewPrivs") == "1")
        .expect("a jailed thread");
    let status = std::fs::read_to_string(jailed.join("status")).expect("status");
    for ids in ["Uid", "Gid"] {
        let ids = field(&status, ids);
        let ids: BTreeSet<&str> = ids.split_whitespace().collect();
        assert_eq!(ids, BTreeSet::from([ID.to_string().as_str()]));
    }
    assert_eq!(field(&status, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(&status, set), "0000000000000000", "{set}");
    }
    for name in ["mnt", "net", "ipc", "uts", "cgroup"] {
        let namespace = |dir: &Path| std::fs::read_link(dir.join("ns").join(name)).expect(name);
        assert_ne!(namespace(&jailed), namespace(Path::new("/proc/self")), "{name}");
    }
    assert_eq!(std::fs::read_dir(jailed.join("root/")).expect("its root").count(), 0);

    child.stdin.take().expect("piped").write_all(b"x").expect("let it go on");
    wait_for(&mut out, "held");
    assert!(child.wait().expect("its end").success());
}

#[test]
fn root_is_refused() {
    for identity in [(0, 1), (1, 0)].map(|(uid, gid)| Identity { uid, gid, in_pod_network: false }) {
        assert!(matches!(enter(identity), Err(JailError::Root(..))));
    }
}
