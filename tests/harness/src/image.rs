//! The test image: a static busybox, users and groups, as an OCI archive that `ctr image import` reads.
//! Made here because no registry is reachable; the same bytes come out each time.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// Its name in containerd.
pub const IMAGE: &str = "bulkhead.test/busybox:1";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
    daemon:x:1:1:daemon:/:/bin/false\n\
    alice:x:1000:1000:Alice:/home/alice:/bin/sh\n\
    nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n";

const GROUP: &str = "root:x:0:\n\
    daemon:x:1:\n\
    alice:x:1000:\n\
    sailors:x:2000:alice\n\
    divers:x:2001:alice\n\
    nogroup:x:65534:\n";

/// Writes the archive to `to`, from the static busybox at `busybox`.
pub(crate) fn write_archive(busybox: &Path, to: &Path) -> Result<()> {
    let layer = layer(busybox)?;
    let layer_digest = digest(&layer);
    let config = serde_json::to_vec(&json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": ["sh"],
        },
        "rootfs": { "type": "layers", "diff_ids": [layer_digest] },
    }))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    }))?;
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["annotations"] = json!({ "io.containerd.image.name": IMAGE });
    let index = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    }))?;

    let mut archive = Builder::new(File::create(to).with_context(|| format!("create {}", to.display()))?);
    file(&mut archive, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    file(&mut archive, "index.json", 0o644, &index)?;
    for blob in [&layer, &config, &manifest] {
        let name = digest(blob).replace("sha256:", "blobs/sha256/");
        file(&mut archive, &name, 0o644, blob)?;
    }
    archive.into_inner().context("finish the archive")?;
    Ok(())
}

/// Unpacks the image's one layer to the directory `to`: a root file system of a test's own.
pub(crate) fn unpack(busybox: &Path, to: &Path) -> Result<()> {
    let layer = layer(busybox)?;
    let mut archive = tar::Archive::new(layer.as_slice());
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.unpack(to).with_context(|| format!("unpack the image to {}", to.display()))
}

/// The static busybox of the machine.
pub(crate) fn busybox() -> std::path::PathBuf {
    std::env::var_os("BULKHEAD_TEST_BUSYBOX").map_or_else(|| "/bin/busybox".into(), Into::into)
}

fn layer(busybox: &Path) -> Result<Vec<u8>> {
    let program =
        fs::read(busybox).with_context(|| format!("read {} (package busybox-static)", busybox.display()))?;
    let applets = Command::new(busybox).arg("--list").output().context("list busybox's applets")?;
    if !applets.status.success() {
        bail!("{} --list failed", busybox.display());
    }
    let mut tar = Builder::new(Vec::new());
    for (dir, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("home", 0o755),
        ("proc", 0o755),
        ("root", 0o700),
        ("run", 0o755),
        ("sys", 0o755),
        ("tmp", 0o1777),
        ("var", 0o755),
    ] {
        entry(&mut tar, EntryType::Directory, dir, mode, 0, &[])?;
    }
    entry(&mut tar, EntryType::Directory, "home/alice", 0o755, 1000, &[])?;
    file(&mut tar, "bin/busybox", 0o755, &program)?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|a| *a != "busybox") {
        let mut header = header(EntryType::Symlink, 0o777, 0, 0);
        tar.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    file(&mut tar, "etc/passwd", 0o644, PASSWD.as_bytes())?;
    file(&mut tar, "etc/group", 0o644, GROUP.as_bytes())?;
    file(&mut tar, "etc/not-a-program", 0o644, b"no magic number here\n")?;
    Ok(tar.into_inner()?)
}

fn header(kind: EntryType, mode: u32, owner: u64, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(owner);
    header.set_gid(owner);
    header.set_size(size);
    // A fixed time keeps the digest the same from run to run.
    header.set_mtime(1_700_000_000);
    header
}

fn entry<W: std::io::Write>(
    tar: &mut Builder<W>,
    kind: EntryType,
    path: &str,
    mode: u32,
    owner: u64,
    bytes: &[u8],
) -> Result<()> {
    let mut header = header(kind, mode, owner, bytes.len() as u64);
    tar.append_data(&mut header, path, bytes).with_context(|| format!("add {path} to the archive"))
}

fn file<W: std::io::Write>(tar: &mut Builder<W>, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
    entry(tar, EntryType::Regular, path, mode, 0, bytes)
}

fn digest(bytes: &[u8]) -> String {
    let mut text = String::from("sha256:");
    for byte in Sha256::digest(bytes) {
        write!(text, "{byte:02x}").ok();
    }
    text
}

fn descriptor(kind: &str, bytes: &[u8]) -> serde_json::Value {
    json!({ "mediaType": kind, "digest": digest(bytes), "size": bytes.len() })
}
