//! Volumes: what of the host's mounts a container sees and may write, and that the host keeps its own.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use harness::{Context, Test, Toml};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};

use crate::SLEEPER;

pub(crate) const TESTS: &[Test] = &[
    Test::common("volumes::a_read_only_one_leaves_what_is_mounted_below_it_as_it_is", read_only),
    Test::common("volumes::a_recursively_read_only_one_cannot_be_written_below", recursively_read_only),
    Test::common("volumes::the_host_keeps_what_it_has_mounted_below", kept),
    Test::common("volumes::later_mounts_of_the_host_are_seen_where_asked", propagation),
    Test::common("volumes::one_that_is_exchanged_tells_who_watches", exchanged),
    Test::common("volumes::a_socket_of_one_container_is_used_by_another", socket_between),
    Test::common("volumes::a_socket_of_the_host_is_used_by_containers", socket_of_the_host),
    Test::common("volumes::a_read_only_root_gets_the_mount_points_it_lacks", read_only_root),
    Test::common("volumes::one_at_dev_shm_is_the_users", at_dev_shm),
    Test::common("volumes::containers_of_a_pod_meet_in_one", meet),
];

/// A folder on the host with an empty file system mounted on its `below`.
struct Source(PathBuf);

impl Source {
    fn new(t: &Context<'_>) -> Result<Self> {
        let source = Self(t.dir().join("volume"));
        fs::create_dir_all(source.below()).context("make the volume")?;
        source.mount_below()?;
        Ok(source)
    }

    fn below(&self) -> PathBuf {
        self.0.join("below")
    }

    fn mount_below(&self) -> Result<()> {
        mount("tmpfs", self.below(), "tmpfs", MountFlags::empty(), c"size=1m")
            .context("mount below the volume")
    }

    fn is_mounted(&self) -> Result<bool> {
        let table = fs::read_to_string("/proc/thread-self/mountinfo")?;
        let below = self.below();
        Ok(table.lines().any(|line| line.split(' ').nth(4).is_some_and(|point| Path::new(point) == below)))
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        unmount(self.below(), UnmountFlags::DETACH).ok();
    }
}

/// Starts a container with the volume at /m.
fn with_volume(
    t: &Context<'_>,
    pod: &harness::Pod,
    name: &str,
    source: &Source,
    mount: Value,
) -> Result<String> {
    let mut volume = json!({"host_path": source.0, "container_path": "/m"});
    for (key, value) in mount.as_object().into_iter().flatten() {
        volume[key] = value.clone();
    }
    let id = t.create_in(pod, name, SLEEPER, |c| c["mounts"] = json!([volume]))?;
    t.crictl_ok(&["start", &id])?;
    Ok(id)
}

/// What a shell says that tries to make a file.
fn touch(t: &Context<'_>, id: &str, path: &str) -> Result<String> {
    t.exec_in(id, &format!("touch {path} 2>&1; true"))
}

fn read_only(t: &mut Context<'_>) -> Result<()> {
    let source = Source::new(t)?;
    let pod = t.pod("p", |_| {})?;
    let id = with_volume(t, &pod, "a", &source, json!({"readonly": true}))?;
    let said = touch(t, &id, "/m/x")?;
    ensure!(said.contains("Read-only file system"), "the volume itself: {said}");
    let said = touch(t, &id, "/m/below/x")?;
    ensure!(said.is_empty(), "what is mounted below it: {said}");
    ensure!(source.below().join("x").exists(), "the file is not on the host");
    t.remove_pod(&pod)
}

fn recursively_read_only(t: &mut Context<'_>) -> Result<()> {
    // containerd 1 does not know the field, and gives a volume that is read-only by itself.
    if t.settings().is_containerd_1() {
        return Ok(());
    }
    let source = Source::new(t)?;
    let pod = t.pod("p", |_| {})?;
    let id = with_volume(t, &pod, "a", &source, json!({"readonly": true, "recursive_read_only": true}))?;
    for path in ["/m/x", "/m/below/x"] {
        let said = touch(t, &id, path)?;
        ensure!(said.contains("Read-only file system"), "{path}: {said}");
    }
    fs::write(source.below().join("own"), "").context("the host's own mount became read-only")?;
    t.remove_pod(&pod)
}

fn kept(t: &mut Context<'_>) -> Result<()> {
    let source = Source::new(t)?;
    fs::write(source.below().join("x"), "kept")?;
    let pod = t.pod("p", |_| {})?;
    // All of the machine's mounts are shared here, as systemd has them.
    for (name, propagation) in [("private", 0), ("follower", 1)] {
        let id = with_volume(t, &pod, name, &source, json!({"propagation": propagation}))?;
        ensure!(t.exec_in(&id, "cat /m/below/x")? == "kept");
        t.crictl_ok(&["rm", "--force", &id])?;
        ensure!(
            source.is_mounted()?,
            "{name}: removing the container has unmounted what lies below its volume"
        );
    }
    t.remove_pod(&pod)?;
    ensure!(source.is_mounted()?, "removing the pod has unmounted what lies below its volume");
    Ok(())
}

fn propagation(t: &mut Context<'_>) -> Result<()> {
    let source = Source::new(t)?;
    unmount(source.below(), UnmountFlags::DETACH)?;
    let pod = t.pod("p", |_| {})?;
    let private = with_volume(t, &pod, "private", &source, json!({"propagation": 0}))?;
    let follower = with_volume(t, &pod, "follower", &source, json!({"propagation": 1}))?;
    source.mount_below()?;
    fs::write(source.below().join("late"), "")?;
    let seen = t.exec_in(&follower, "ls /m/below")?;
    ensure!(seen == "late", "HostToContainer does not show the host's mount: {seen:?}");
    let seen = t.exec_in(&private, "ls /m/below")?;
    ensure!(seen.is_empty(), "None shows the host's mount: {seen:?}");
    t.remove_pod(&pod)
}

fn read_only_root(t: &mut Context<'_>) -> Result<()> {
    let source = Source::new(t)?;
    let pod = t.pod("p", |_| {})?;
    let id = t.create_in(&pod, "a", SLEEPER, |c| {
        c["linux"]["security_context"] = json!({"readonly_rootfs": true});
        c["mounts"] = json!([{"host_path": source.0, "container_path": "/var/run/made/for/it"}]);
    })?;
    t.crictl_ok(&["start", &id])?;
    let seen = t.exec_in(&id, "ls /var/run/made/for/it; cat /etc/hostname; touch /x 2>&1; true")?;
    ensure!(seen.starts_with("below\np\n"), "{seen}");
    ensure!(seen.contains("Read-only file system"), "{seen}");
    t.remove_pod(&pod)
}

fn at_dev_shm(t: &mut Context<'_>) -> Result<()> {
    // As an emptyDir of this name has it.
    let volume = t.dir().join("shm");
    fs::create_dir(&volume)?;
    fs::write(volume.join("mine"), "mine")?;
    let pod = t.pod("p", |_| {})?;
    let mounts = json!([{"host_path": volume, "container_path": "/dev/shm"}]);
    let id = t.create_in(&pod, "a", SLEEPER, |c| c["mounts"] = mounts)?;
    t.crictl_ok(&["start", &id])?;
    let seen = t.exec_in(&id, "cat /dev/shm/mine; echo from the pod >/dev/shm/yours")?;
    ensure!(seen == "mine", "{seen}");
    ensure!(fs::read_to_string(volume.join("yours"))? == "from the pod\n", "it is not the volume");
    t.remove_pod(&pod)
}

/// A volume of several containers is one file system to them: what needs one kernel to meet does meet.
fn meet(t: &mut Context<'_>) -> Result<()> {
    let watcher =
        std::env::var("BULKHEAD_TEST_WATCHER").context("BULKHEAD_TEST_WATCHER names the watcher")?;
    let volume = t.dir().join("scratch");
    fs::create_dir(&volume)?;
    let pod = t.pod("p", |_| {})?;
    let container = |name: &str, read_only: bool| -> Result<String> {
        let mounts = json!([
            {"host_path": volume, "container_path": "/scratch", "readonly": read_only},
            {"host_path": watcher, "container_path": "/watcher", "readonly": true},
        ]);
        let id = t.create_in(&pod, name, SLEEPER, |c| c["mounts"] = mounts)?;
        t.crictl_ok(&["start", &id])?;
        Ok(id)
    };
    // The one that only reads comes first, as what ships logs does.
    let reader = container("reader", true)?;
    let (one, two) = (container("one", false)?, container("two", false)?);

    let watch = t.crictl()?.args(["exec", &reader, "/watcher", "/scratch"]).spawn()?;
    watch.wait_for_text("watching\n")?;
    t.exec_in(&one, "mkfifo /scratch/new && mv /scratch/new /scratch/fifo")?;
    watch.wait_for_text("fifo")?;

    let pipe = t.crictl()?.args(["exec", &two, "cat", "/scratch/fifo"]).spawn()?;
    t.exec_in(&one, "echo through the pipe >/scratch/fifo")?;
    pipe.wait_for_text("through the pipe\n")?;

    let refused = t.exec_in(&reader, "touch /scratch/x 2>&1; true")?;
    ensure!(refused.contains("Read-only file system"), "{refused}");
    // It goes on without the container that came with it.
    t.crictl_ok(&["rm", "--force", &one])?;
    t.exec_in(&two, "echo still here >/scratch/note")?;
    ensure!(t.exec_in(&reader, "cat /scratch/note")? == "still here");
    ensure!(fs::read_to_string(volume.join("note"))? == "still here\n", "the host does not see it");
    t.remove_pod(&pod)?;
    fs::remove_dir_all(&volume).context("the volume is in use after its pod")?;
    Ok(())
}

/// As Kubernetes writes a ConfigMap: a folder for the version, a link to it, and a link for each file.
fn exchange(volume: &Path, version: &str, files: &[(&str, &str)]) -> Result<()> {
    let folder = volume.join(version);
    fs::create_dir_all(&folder)?;
    for (name, text) in files {
        fs::write(folder.join(name), text)?;
    }
    symlink(version, volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    for entry in fs::read_dir(volume)?.flatten() {
        let name = entry.file_name();
        let is_old = entry.file_type()?.is_dir() && name != version;
        if is_old {
            fs::remove_dir_all(entry.path())?;
        } else if entry.file_type()?.is_symlink() && name != "..data" {
            fs::remove_file(entry.path())?;
        }
    }
    for (name, _) in files {
        symlink(Path::new("..data").join(name), volume.join(name))?;
    }
    Ok(())
}

fn exchanged(t: &mut Context<'_>) -> Result<()> {
    let watcher =
        std::env::var("BULKHEAD_TEST_WATCHER").context("BULKHEAD_TEST_WATCHER names the watcher")?;
    let volume = t.dir().join("settings");
    exchange(&volume, "..1", &[("page", "first"), ("old", "gone soon")])?;
    let pod = t.pod("p", |_| {})?;
    let mounts = json!([
        {"host_path": volume, "container_path": "/settings", "readonly": true},
        {"host_path": watcher, "container_path": "/watcher", "readonly": true},
    ]);
    let mut ids = Vec::new();
    for name in ["a", "b"] {
        let id = t.create_in(&pod, name, SLEEPER, |c| c["mounts"] = mounts.clone())?;
        t.crictl_ok(&["start", &id])?;
        ids.push(id);
    }
    let [a, b] = &ids[..] else { bail!("{ids:?}") };
    ensure!(t.exec_in(a, "cat /settings/page /settings/old")? == "firstgone soon");
    let watch = |id: &str| -> Result<_> {
        let watch = t.crictl()?.args(["exec", id, "/watcher", "/settings"]).spawn()?;
        watch.wait_for_text("watching\n")?;
        Ok(watch)
    };
    let watching = [watch(a)?, watch(b)?];
    let many: Vec<(String, String)> = (0..300).map(|n| (format!("file-{n}"), format!("text {n}"))).collect();
    let mut second = vec![("page", "second")];
    second.extend(many.iter().map(|(name, text)| (name.as_str(), text.as_str())));
    exchange(&volume, "..2", &second)?;
    for (watch, id) in watching.iter().zip([a, b]) {
        watch.wait_for_text("..data\n")?;
        // From this moment on, not a little later.
        let seen = t.exec_in(id, "cat /settings/page /settings/file-299; readlink /settings/..data")?;
        ensure!(seen == "secondtext 299..2", "{seen}");
    }
    exchange(&volume, "..3", &[("page", "third")])?;
    watching[0].wait_until("two exchanges", |said| said.matches("..data\n").count() == 2)?;
    ensure!(touch(t, a, "/settings/x")?.contains("Read-only file system"));
    t.crictl_ok(&["rm", "--force", a])?;
    exchange(&volume, "..4", &[("page", "fourth")])?;
    watching[1].wait_until("three exchanges", |said| said.matches("..data\n").count() == 3)?;
    ensure!(t.exec_in(b, "cat /settings/page")? == "fourth");
    // The links of files that are no more went with the exchange before.
    ensure!(t.exec_in(b, "ls /settings")? == "page");
    t.remove_pod(&pod)
}

/// The client and server of the tests, as a mount.
fn talker() -> Result<Value> {
    let talker = std::env::var("BULKHEAD_TEST_TALKER").context("BULKHEAD_TEST_TALKER names the talker")?;
    Ok(json!({"host_path": talker, "container_path": "/talker", "readonly": true}))
}

fn socket_between(t: &mut Context<'_>) -> Result<()> {
    let volume = t.dir().join("shared");
    fs::create_dir(&volume)?;
    let pod = t.pod("p", |_| {})?;
    let mounts = json!([talker()?, {"host_path": volume, "container_path": "/m"}]);
    // One that is there before the socket is, and one that comes later.
    let start = |name: &str| -> Result<_> {
        let id = t.create_in(&pod, name, SLEEPER, |c| c["mounts"] = mounts.clone())?;
        t.crictl_ok(&["start", &id])?;
        Ok(id)
    };
    let (before, server) = (start("before")?, start("server")?);
    ensure!(t.exec_in(&before, "ls /m")?.is_empty());
    let listening = t.crictl()?.args(["exec", &server, "/talker", "-l", "/m/s.sock"]).spawn()?;
    listening.wait_for_text("listening\n")?;
    let after = start("after")?;
    for (name, id) in [("server", &server), ("before", &before), ("after", &after)] {
        let said = t.exec_in(id, &format!("printf {name} | /talker /m/s.sock"))?;
        ensure!(said == name, "{name}: {said}");
    }
    // What makes the one work makes the other.
    let lock = ["exec", "-i", &before, "/talker", "-k", "/m/lock"];
    let locked = t.crictl()?.args(lock).stdin_open().spawn()?;
    locked.wait_for_text("locked\n")?;
    let again = t.exec_in(&after, "/talker -k /m/lock </dev/null")?;
    ensure!(again == "refused", "the other container said {again:?}");
    // The volume stays with those that are left, and what is in it with the host.
    t.crictl_ok(&["rm", "--force", &before])?;
    let said = t.exec_in(&after, "printf left | /talker /m/s.sock")?;
    ensure!(said == "left", "{said}");
    ensure!(volume.join("lock").exists());
    t.remove_pod(&pod)
}

fn socket_of_the_host(t: &mut Context<'_>) -> Result<()> {
    let volume = t.dir().join("run");
    fs::create_dir(&volume)?;
    let path = volume.join("a.sock");
    let listener = UnixListener::bind(&path)?;
    t.set_config("volumes", "host_sockets", Toml::Array(vec![path.display().to_string().into()]))?;
    let pod = t.pod("p", |_| {})?;
    let mounts = json!([
        talker()?,
        {"host_path": path, "container_path": "/s"},
        {"host_path": volume, "container_path": "/m", "readonly": true},
    ]);
    let mut ids = Vec::new();
    for name in ["a", "b"] {
        let id = t.create_in(&pod, name, SLEEPER, |c| c["mounts"] = mounts.clone())?;
        t.crictl_ok(&["start", &id])?;
        ids.push(id);
    }
    let server = std::thread::spawn(move || -> Result<()> {
        for _ in 0..5 {
            let (mut peer, _) = listener.accept()?;
            let mut question = String::new();
            peer.read_to_string(&mut question)?;
            peer.write_all(format!("{question} is answered").as_bytes())?;
        }
        Ok(())
    });
    let ask = |id: &str, path: &str| -> Result<()> {
        let said = t.exec_in(id, &format!("printf {path} | /talker {path}"))?;
        ensure!(said == format!("{path} is answered"), "{path}: {said}");
        Ok(())
    };
    for id in &ids {
        ask(id, "/s")?;
        ask(id, "/m/a.sock")?;
    }
    // The end of one takes nothing from the other.
    t.crictl_ok(&["rm", "--force", &ids[0]])?;
    ask(&ids[1], "/s")?;
    server.join().map_err(|_| anyhow!("the server has panicked"))??;
    t.remove_pod(&pod)
}
