//! A real machine with the agent in it: QEMU without hardware virtualisation, virtiofsd, vhost-device-vsock.
//! Knows how to start and to end one; must not know what is tested.

use std::{
    env, fs,
    io::Write,
    os::{fd::OwnedFd, unix::net::UnixListener as StdListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use bulkhead_proto::{
    agent::AgentClient,
    stream::{HELLO_HEADER_LEN, Hello, decode_hello, decode_hello_header},
};
use tempfile::TempDir;
use tokio::{
    io::AsyncReadExt,
    net::UnixListener,
    process::{Child, Command},
    time::timeout,
};

/// No step of a machine's start takes this long, not even on a busy builder.
const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Vm {
    pub(crate) client: AgentClient,
    pub(crate) hello: Hello,
    /// From the start of QEMU to the agent's hello.
    pub(crate) boot: Duration,
    pub(crate) streams: UnixListener,
    /// The directory behind the share, on the host.
    pub(crate) share: PathBuf,
    pub(crate) qemu: Child,
    pub(crate) dir: TempDir,
    /// Killed when dropped.
    pub(crate) daemons: [Child; 2],
}

/// The path in a variable of the environment, which must be set: there is no test without it.
fn part(name: &str) -> PathBuf {
    let path =
        env::var_os(name).unwrap_or_else(|| panic!("{name} is not set; it names a file that the test needs"));
    let path = PathBuf::from(path);
    assert!(path.exists(), "{name}: {} does not exist", path.display());
    path
}

impl Vm {
    pub(crate) async fn start() -> Self {
        let kernel = part("BULKHEAD_TEST_KERNEL");
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let share = at("share");
        fs::create_dir(&share).unwrap();
        // The agent of this build, unless the shipped one is to be looked at.
        let agent =
            env::var_os("BULKHEAD_TEST_AGENT").unwrap_or_else(|| env!("CARGO_BIN_EXE_bulkhead-agent").into());
        fs::write(at("initrd"), initrd(Path::new(&agent))).unwrap();

        let listener = StdListener::bind(at("fs.sock")).unwrap();
        let fs = virtiofsd(listener, &share);
        let vsock = vhost_vsock(&at("vhost.sock"), &at("vsock")).await;
        let control = UnixListener::bind(at("vsock_1024")).unwrap();
        let streams = UnixListener::bind(at("vsock_1025")).unwrap();

        let begin = Instant::now();
        let console = fs::File::create(at("console")).unwrap();
        let socket = |name: &str, file: &str| format!("socket,id={name},path={}", at(file).display());
        let append = format!(
            "console=ttyS0 quiet panic=-1 reboot=t noreplace-smp no_timer_check {}",
            env::var("BULKHEAD_TEST_CMDLINE").unwrap_or_default()
        );
        let mut qemu = Command::new("qemu-system-x86_64")
            .args([
                "-M",
                "microvm,rtc=on,acpi=off,memory-backend=mem",
                "-accel",
                "tcg",
                "-cpu",
                "max,-cx16",
                "-m",
                "512",
            ])
            .args(["-object", "memory-backend-memfd,id=mem,size=512M,share=on"])
            .arg("-kernel")
            .arg(&kernel)
            .arg("-initrd")
            .arg(at("initrd"))
            .args(["-append", &append])
            .args(["-no-reboot", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"])
            .args(["-chardev", &socket("vs", "vhost.sock"), "-device", "vhost-user-vsock-device,chardev=vs"])
            .args([
                "-chardev",
                &socket("fs", "fs.sock"),
                "-device",
                "vhost-user-fs-device,chardev=fs,tag=share",
            ])
            .stdin(Stdio::null())
            .stdout(console.try_clone().unwrap())
            .stderr(console)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let accepted = tokio::select! {
            accepted = timeout(DEADLINE, control.accept()) => accepted.ok(),
            _ = qemu.wait() => None,
        };
        let Some(accepted) = accepted else {
            panic!("the agent has not dialled; console:\n{}", fs::read_to_string(at("console")).unwrap());
        };
        let (mut control, _) = accepted.unwrap();
        let mut header = [0; HELLO_HEADER_LEN];
        control.read_exact(&mut header).await.unwrap();
        let mut body = vec![0; decode_hello_header(&header).unwrap()];
        control.read_exact(&mut body).await.unwrap();
        let boot = begin.elapsed();
        let hello = decode_hello(&body).unwrap();
        let client = AgentClient::new(ttrpc::asynchronous::Client::new(
            ttrpc::asynchronous::transport::Socket::new(control),
        ));
        Self { client, hello, boot, streams, share, qemu, dir, daemons: [fs, vsock] }
    }

    /// What the guest has said on its console so far.
    pub(crate) fn console(&self) -> String {
        fs::read_to_string(self.dir.path().join("console")).unwrap()
    }

    /// A root of busybox below the share; answers its path in the guest.
    pub(crate) fn rootfs(&self, id: &str) -> String {
        let root = self.share.join(id).join("rootfs");
        for dir in ["bin", "etc", "proc", "sys", "dev", "tmp", "root", "home/user"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        let busybox = part("BULKHEAD_TEST_BUSYBOX");
        fs::copy(&busybox, root.join("bin/busybox")).unwrap();
        let applets = std::process::Command::new(&busybox).arg("--list").output().unwrap();
        for applet in String::from_utf8(applets.stdout).unwrap().lines().filter(|name| *name != "busybox") {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .unwrap();
        fs::write(root.join("etc/group"), "root:x:0:\nuser:x:1000:\n").unwrap();
        format!("{}/{id}/rootfs", bulkhead_proto::SHARE_DIR)
    }
}

fn virtiofsd(listener: StdListener, share: &Path) -> Child {
    // The daemon inherits a socket that listens already, so nobody has to wait for it.
    Command::new(part("BULKHEAD_TEST_VIRTIOFSD"))
        .args(["--fd", "0", "--shared-dir"])
        .arg(share)
        .args(["--sandbox", "chroot", "--cache", "auto", "--log-level", "error"])
        .stdin(OwnedFd::from(listener))
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

async fn vhost_vsock(socket: &Path, uds: &Path) -> Child {
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
    let created = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
    created.add_watch(socket.parent().unwrap(), AddWatchFlags::IN_CREATE).unwrap();
    let daemon = Command::new(part("BULKHEAD_TEST_VHOST_VSOCK"))
        .args(["--guest-cid", "3", "--socket"])
        .arg(socket)
        .arg("--uds-path")
        .arg(uds)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let name = socket.file_name().unwrap().to_owned();
    let seen = tokio::task::spawn_blocking(move || {
        while !created.read_events().unwrap().iter().any(|event| event.name.as_ref() == Some(&name)) {}
    });
    timeout(DEADLINE, seen).await.expect("vhost-device-vsock makes its socket").unwrap();
    daemon
}

/// An archive in the format of the kernel (newc) that holds one file: /init.
fn initrd(agent: &Path) -> Vec<u8> {
    let mut archive = Vec::new();
    let program = fs::read(agent).unwrap();
    for (name, mode, content) in [("init", 0o100755, program.as_slice()), ("TRAILER!!!", 0, &[])] {
        let fields = [1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend(b"070701");
        for field in fields {
            write!(archive, "{field:08x}").unwrap();
        }
        for part in [[name.as_bytes(), b"\0"].concat().as_slice(), content] {
            archive.extend(part);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
    }
    archive
}
