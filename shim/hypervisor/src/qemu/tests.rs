use bulkhead_vmm_spec::{BlockBinding, BlockShape};

use super::*;
use crate::testing::{Journaled, shape_and_bindings};

fn refusal(change: impl FnOnce(&mut Shape, &mut Bindings)) -> String {
    let (mut shape, mut bindings) = shape_and_bindings();
    check(&shape, &bindings).expect("the machine is possible before the change");
    change(&mut shape, &mut bindings);
    check(&shape, &bindings).expect_err("the change makes it impossible").to_string()
}

#[test]
fn too_little_memory_is_refused_with_the_figure() {
    let text = refusal(|shape, _| shape.memory = SizeMib(MINIMUM_MEMORY.0 - 1));
    assert!(text.contains(&format!("at least {} MiB", MINIMUM_MEMORY.0)), "{text}");
    assert!(text.contains(&format!("{} MiB were asked for", MINIMUM_MEMORY.0 - 1)), "{text}");
}

#[test]
fn impossible_shapes_are_refused_by_name() {
    assert!(refusal(|s, _| s.vcpus = 0).contains("0 to 2 processors"));
    assert!(refusal(|s, _| s.max_vcpus = 256).contains("1 to 255"));
    assert!(refusal(|s, _| s.cmdline = "x".repeat(2000)).contains("there is room for 1472"));
    assert!(refusal(|s, _| s.share_tag = Some(String::new())).contains("1 to 36 bytes"));
    assert!(refusal(|s, _| s.share_tag = None).contains("a tag and a directory"));
    assert!(refusal(|_, b| b.share = None).contains("a tag and a directory"));
    let block = || BlockShape { serial: "s".into(), read_only: true };
    assert!(refusal(|s, _| s.blocks.push(block())).contains("1 block devices on 0 files"));
    let path = || BlockBinding { path: "/x".into() };
    assert!(
        refusal(|s, b| {
            s.blocks = (0..30).map(|_| block()).collect();
            b.blocks = (0..30).map(|_| path()).collect();
        })
        .contains("32 devices")
    );
}

/// Bindings whose files exist in a directory of the test's own.
fn real_files(dir: &Path) -> (Shape, Bindings) {
    let (shape, mut bindings) = shape_and_bindings();
    bindings.kernel = dir.join("vmlinux");
    bindings.initrd = dir.join("initrd");
    bindings.share = Some(dir.join("share"));
    bindings.vsock = dir.join("vsock");
    bindings.run_dir = dir.into();
    std::fs::write(&bindings.kernel, "").unwrap();
    std::fs::write(&bindings.initrd, "").unwrap();
    std::fs::create_dir(dir.join("share")).unwrap();
    (shape, bindings)
}

/// A program of the test's own.
fn program(dir: &Path, name: &str, script: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

async fn launch_error(config: QemuConfig, dir: &Path, journal: &Journaled) -> LaunchError {
    let (shape, bindings) = real_files(dir);
    match Qemu::new(config).launch(&shape, &bindings, journal).await {
        Ok(_) => panic!("nothing here can be a machine"),
        Err(error) => error,
    }
}

/// A configuration whose programs are all scripts: a QEMU of a fixed version and two that stay.
fn scripts(dir: &Path) -> QemuConfig {
    QemuConfig {
        qemu: program(dir, "qemu", "echo QEMU emulator version 7.2.0"),
        virtiofsd: program(dir, "virtiofsd", "exec cat /dev/zero >/dev/null"),
        vsock: program(dir, "vsock", "exec cat /dev/zero >/dev/null"),
        ..QemuConfig::default()
    }
}

fn is_gone(pid: i32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test]
async fn missing_files_are_named_with_their_role() {
    let dir = tempfile::tempdir().unwrap();
    let (shape, mut bindings) = real_files(dir.path());
    bindings.kernel = dir.path().join("no-kernel");
    let launched = Qemu::default().launch(&shape, &bindings, &Journaled::default()).await;
    let text = launched.err().expect("there is no kernel").to_string();
    assert!(text.starts_with("cannot open kernel /") && text.contains("no-kernel: No such file"), "{text}");

    bindings.kernel = dir.path().into();
    let launched = Qemu::default().launch(&shape, &bindings, &Journaled::default()).await;
    let text = launched.err().expect("a directory is no kernel").to_string();
    assert!(text.contains("not a regular file"), "{text}");
}

#[tokio::test]
async fn a_missing_program_is_named_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journaled::default();
    let config = QemuConfig { vsock: dir.path().join("no-vsock"), ..scripts(dir.path()) };
    let text = launch_error(config, dir.path(), &journal).await.to_string();
    assert!(text.starts_with("cannot execute vhost-device-vsock at /"), "{text}");
    assert!(text.contains("no-vsock: No such file") && text.contains("install it"), "{text}");
    let recorded = journal.processes();
    assert_eq!(recorded.len(), 1, "only virtiofsd ran: {recorded:?}");
    assert!(is_gone(recorded[0].1));
}

#[tokio::test]
async fn a_helper_that_ends_early_is_reported_with_its_words() {
    let dir = tempfile::tempdir().unwrap();
    let vsock = program(dir.path(), "vsock-bad", "echo no such option >&2; exit 3");
    let config = QemuConfig { vsock, ..scripts(dir.path()) };
    let text = launch_error(config, dir.path(), &Journaled::default()).await.to_string();
    assert!(text.contains("vhost-device-vsock") && text.contains("exited with status 3"), "{text}");
    assert!(text.contains("no such option"), "{text}");
}

#[tokio::test]
async fn a_program_that_is_not_qemu_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let config = QemuConfig { qemu: program(dir.path(), "other", "echo busybox"), ..scripts(dir.path()) };
    let text = launch_error(config, dir.path(), &Journaled::default()).await.to_string();
    assert!(text.contains("names no version") && text.contains("busybox"), "{text}");
}

#[tokio::test]
async fn a_process_that_cannot_be_recorded_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journaled { refuses: true, ..Journaled::default() };
    let text = launch_error(scripts(dir.path()), dir.path(), &journal).await.to_string();
    assert!(text.starts_with("cannot record process"), "{text}");
    assert!(journal.processes().iter().all(|&(_, pid, _)| is_gone(pid)));
}

#[tokio::test]
async fn a_failed_launch_leaves_no_socket() {
    let dir = tempfile::tempdir().unwrap();
    // Makes both names (--guest-cid 3 --socket $4 --uds-path $6), then fails.
    let vsock = program(dir.path(), "vsock-files", ": > \"$4\"; : > \"$6\"; exit 1");
    let config = QemuConfig { vsock, ..scripts(dir.path()) };
    launch_error(config, dir.path(), &Journaled::default()).await;
    assert!(!dir.path().join("vsock").exists());
    assert!(!dir.path().join(VSOCK_DEVICE_SOCKET).exists());
    assert!(!dir.path().join("virtiofs").exists());
}
