//! A machine of a test or a measurement, with its files and its guest (`examples/test_guest.rs`).
//! Used by `tests/machine.rs` and `benches/launch.rs`; each uses a part of it.
#![allow(dead_code, unreachable_pub, missing_docs)]

use std::{
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use bulkhead_hypervisor::{
    Hypervisor, Journal, Machine, MachineEnd,
    builtin::{Builtin, BuiltinConfig, BuiltinMachine, VMM},
    qemu::{QEMU, Qemu, QemuConfig, VSOCK},
    share::VIRTIOFSD,
};
use bulkhead_vmm_spec::{Bindings, Shape, SizeMib};
use nix::unistd::Pid;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixListener,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

/// For every single wait; two loaded cores take a few seconds where two idle ones take one.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// How long a machine whose guest does not answer has for its own end, before we make one.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// A machine of a test with its files.
pub struct Rig {
    pub dir: tempfile::TempDir,
    pub shape: Shape,
    pub bindings: Bindings,
    pub journal: Recorded,
    pub listener: UnixListener,
}

#[derive(Default)]
pub struct Recorded(pub Mutex<Vec<(String, i32)>>);

impl Journal for Recorded {
    fn process(&self, name: &str, pid: i32, _: u64) -> io::Result<()> {
        self.0.lock().unwrap().push((name.into(), pid));
        Ok(())
    }
}

/// The talk with a guest that has said hello.
pub struct Session {
    to_guest: OwnedWriteHalf,
    from_guest: tokio::io::Lines<BufReader<OwnedReadHalf>>,
}

/// A machine whose guest has said hello.
pub struct Running<T: Machine + ?Sized = dyn Machine> {
    pub machine: Box<T>,
    pub session: Session,
    /// How long the launch took to answer.
    pub launched_after: Duration,
    /// From the launch to the hello.
    pub hello_after: Duration,
    /// What the guest's clock said then.
    pub guest_uptime: Duration,
}

pub fn part(variable: &str) -> PathBuf {
    std::env::var_os(variable)
        .unwrap_or_else(|| panic!("{variable} must name a part, see tests/machine.rs"))
        .into()
}

pub fn config() -> QemuConfig {
    QemuConfig {
        virtiofsd: part("BULKHEAD_TEST_VIRTIOFSD"),
        vsock: part("BULKHEAD_TEST_VSOCK"),
        ..QemuConfig::default()
    }
}

/// Whether the machines here are those of KVM (`BULKHEAD_TEST_BACKEND=kvm`), or emulated.
pub fn on_kvm() -> bool {
    match std::env::var("BULKHEAD_TEST_BACKEND").as_deref() {
        Ok("kvm") => true,
        Ok("emulation") | Err(_) => false,
        Ok(other) => panic!("BULKHEAD_TEST_BACKEND is {other:?}: neither kvm nor emulation"),
    }
}

pub fn builtin() -> Builtin {
    let (vmm, virtiofsd) = (part("BULKHEAD_TEST_VMM"), part("BULKHEAD_TEST_VIRTIOFSD"));
    Builtin::new(BuiltinConfig { vmm, virtiofsd })
}

pub fn backend() -> Box<dyn Hypervisor> {
    if on_kvm() {
        return Box::new(builtin());
    }
    Box::new(Qemu::new(config()))
}

/// The programs of a machine, the VMM first.
pub fn parts() -> &'static [&'static str] {
    if on_kvm() { &[VMM, VIRTIOFSD] } else { &[QEMU, VIRTIOFSD, VSOCK] }
}

impl Rig {
    pub fn new() -> Self {
        let guest = std::env::current_exe().unwrap();
        let guest = guest.ancestors().nth(2).unwrap().join("examples/test_guest");
        Self::with_initrd(&initrd(&std::fs::read(&guest).expect("cargo builds the example")))
    }

    /// Files for a machine whose first root file system is this archive.
    pub fn with_initrd(initrd: &[u8]) -> Self {
        // Socket paths are short, and so is this one.
        let dir = tempfile::Builder::new().prefix("bh").tempdir_in("/tmp").unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("share")).unwrap();
        std::fs::write(path("initrd"), initrd).unwrap();
        let listener = UnixListener::bind(path("vsock_1024")).unwrap();
        let shape = Shape {
            vcpus: 1,
            max_vcpus: 1,
            memory: SizeMib(256),
            growth: SizeMib(0),
            cmdline: String::new(),
            share_tag: Some("share".into()),
            blocks: Vec::new(),
            nets: Vec::new(),
            spare_slots: 0,
        };
        let bindings = Bindings {
            kernel: part("BULKHEAD_TEST_KERNEL"),
            initrd: path("initrd"),
            share: Some(path("share")),
            vsock: path("vsock"),
            blocks: Vec::new(),
            nets: Vec::new(),
            netns: None,
            run_dir: dir.path().into(),
        };
        Self { dir, shape, bindings, journal: Recorded::default(), listener }
    }

    pub fn share(&self) -> PathBuf {
        self.dir.path().join("share")
    }

    pub async fn boot(&self) -> Running {
        self.boot_by(&*backend()).await
    }

    pub async fn boot_by(&self, backend: &dyn Hypervisor) -> Running {
        let started = Instant::now();
        let machine = backend.launch(&self.shape, &self.bindings, &self.journal).await.unwrap();
        self.greeted(machine, started).await
    }

    /// As [`Self::boot`], with all that our own VMM can do.
    pub async fn boot_builtin(&self) -> Running<BuiltinMachine> {
        let started = Instant::now();
        let machine = builtin().launch_builtin(&self.shape, &self.bindings, &self.journal).await.unwrap();
        self.greeted(Box::new(machine), started).await
    }

    /// The machine that was launched since `started`, once its guest has said hello.
    pub async fn greeted<T: Machine + ?Sized>(&self, mut machine: Box<T>, started: Instant) -> Running<T> {
        let launched_after = started.elapsed();
        let (session, guest_uptime) = self.hello(&mut *machine).await;
        Running { machine, session, launched_after, hello_after: started.elapsed(), guest_uptime }
    }

    /// Makes the attacker of `tests/hostile.rs` its guest, with a list of attacks; nothing is shared with it.
    pub fn attack(&mut self, attacks: &str) {
        self.bindings.kernel = part("BULKHEAD_TEST_HOSTILE");
        self.shape.cmdline = format!("attack={attacks}");
        self.shape.share_tag = None;
        self.bindings.share = None;
    }

    /// Waits for the guest to say hello; answers what its clock said then, too.
    pub async fn hello<T: Machine + ?Sized>(&self, machine: &mut T) -> (Session, Duration) {
        let socket = tokio::select! {
            dialled = self.listener.accept() => dialled.unwrap().0,
            end = machine.ended() => panic!("no hello: {end}"),
            () = tokio::time::sleep(DEADLINE) => panic!("no hello within {DEADLINE:?}"),
        };
        let (from_guest, to_guest) = socket.into_split();
        let mut from_guest = BufReader::new(from_guest).lines();
        let hello = within(from_guest.next_line()).await.unwrap().unwrap();
        let uptime = hello.strip_prefix("hello ").unwrap().parse().unwrap();
        (Session { to_guest, from_guest }, Duration::from_micros(uptime))
    }

    /// Nothing of the machine may be left: no process, and in its directory only our own files.
    pub fn assert_nothing_left(&self) {
        for (name, pid) in self.journal.0.lock().unwrap().iter() {
            assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{name} {pid} is left");
        }
        for entry in std::fs::read_dir(self.dir.path()).unwrap().flatten() {
            let is_socket = entry.file_type().unwrap().is_socket();
            assert!(!is_socket || entry.file_name() == "vsock_1024", "{:?} is left", entry.path());
        }
    }
}

impl Session {
    async fn send(&mut self, command: &str) -> io::Result<()> {
        self.to_guest.write_all(format!("{command}\n").as_bytes()).await
    }

    async fn answer(&mut self) -> io::Result<String> {
        let line = tokio::time::timeout(DEADLINE, self.from_guest.next_line());
        let Ok(line) = line.await else {
            let text = format!("nothing came within {DEADLINE:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        };
        line?.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed"))
    }
}

impl<T: Machine + ?Sized> Running<T> {
    pub async fn command(&mut self, command: &str) -> String {
        self.send(command).await;
        self.answer().await
    }

    pub async fn send(&mut self, command: &str) {
        let sent = self.session.send(command).await;
        self.told("takes no command", sent).await
    }

    pub async fn answer(&mut self) -> String {
        self.verdict().await.unwrap_or_else(|error| panic!("the guest: {error}"))
    }

    /// An answer, or the guest's error.
    pub async fn verdict(&mut self) -> Result<String, String> {
        let answer = self.session.answer().await;
        let answer = self.told("does not answer", answer).await;
        match answer.strip_prefix("ok") {
            Some(text) => Ok(text.trim_start().replace("\\n", "\n")),
            None => Err(answer),
        }
    }

    /// A guest that has gone silent says nothing of why; its machine does.
    async fn told<R>(&mut self, silence: &str, result: io::Result<R>) -> R {
        match result {
            Ok(told) => told,
            Err(error) => panic!("the guest {silence}: {error}; {}", self.last_words().await),
        }
    }

    /// How the machine ended, and the end of its console. One that goes on is ended.
    async fn last_words(&mut self) -> String {
        let own = tokio::time::timeout(LAST_WORDS, self.machine.ended()).await;
        let (end, fate) = match own {
            Ok(end) => (end, "its machine ended"),
            Err(_) => {
                self.machine.kill().await;
                (self.end().await, "its machine went on until it was killed")
            }
        };
        // The words of an end that was asked for leave it out.
        let console = if end.asked { end.console.join(" | ") } else { String::new() };
        format!("{fate}: {end} {console}")
    }

    pub async fn end(&mut self) -> MachineEnd {
        within(self.machine.ended()).await
    }

    pub fn pid_of(&self, part: &str) -> Pid {
        let parts = self.machine.processes();
        Pid::from_raw(parts.iter().find(|(name, _)| name == part).unwrap().1)
    }
}

pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("in time")
}

/// A root file system with nothing but an init and a console (newc, as in the kernel's
/// Documentation/driver-api/early-userspace/buffer-format.rst).
fn initrd(init: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut entry = |name: &str, mode: u32, (major, minor): (u32, u32), data: &[u8]| {
        out.extend_from_slice(b"070701");
        let fields = [0, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, major, minor, name.len() as u32 + 1, 0];
        for field in fields {
            out.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        for part in [name.as_bytes(), &[0]] {
            out.extend_from_slice(part);
        }
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(4), 0);
    };
    entry("dev", 0o040755, (0, 0), &[]);
    entry("dev/console", 0o020600, (5, 1), &[]);
    entry("init", 0o100755, (0, 0), init);
    entry("TRAILER!!!", 0, (0, 0), &[]);
    out
}
