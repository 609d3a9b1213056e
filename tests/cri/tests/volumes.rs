//! Volumes: what of the host's mounts a container sees and may write, and that the host keeps its own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Test};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};

use crate::SLEEPER;

pub(crate) const TESTS: &[Test] = &[
    Test::common("volumes::a_read_only_one_leaves_what_is_mounted_below_it_as_it_is", read_only),
    Test::common("volumes::a_recursively_read_only_one_cannot_be_written_below", recursively_read_only),
    Test::common("volumes::the_host_keeps_what_it_has_mounted_below", kept),
    Test::common("volumes::later_mounts_of_the_host_are_seen_where_asked", propagation),
    Test::common("volumes::a_read_only_root_gets_the_mount_points_it_lacks", read_only_root),
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
