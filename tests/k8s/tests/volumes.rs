//! Folders of pods.

use anyhow::{Result, ensure};
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::common("volumes::shared_by_containers_and_node", volumes),
    Test::common("volumes::one_that_outlives_its_pod", persistent),
    Test::common("volumes::a_block_device", block),
    Test::common("volumes::an_image_and_a_limit_that_evicts", image_and_limit),
];

fn volumes(t: &mut Context<'_>) -> Result<()> {
    t.on_node("node-1", &["sh", "-c", "mkdir -p /var/lib/shared; echo from the node >/var/lib/shared/note"])?;
    t.example("volumes.yaml")?;
    t.ready(&["volumes"])?;
    let seen =
        t.in_pod("volumes", "reader", "cat /disk/note /memory/note /part/note /node/note; ls /part")?;
    ensure!(seen == "on the disk\nin memory\na part\nfrom the node\nnote", "{seen}");
    // Made by the user of the one, of the group of both.
    let seen = t.in_pod("volumes", "reader", "stat -c '%u:%g' /disk/note /disk; stat -c %a /disk")?;
    ensure!(seen == "1000:2000\n0:2000\n2777", "{seen}");
    ensure!(t.in_pod("volumes", "writer", "id -G")?.contains("2000"));
    let seen = t.in_pod(
        "volumes",
        "reader",
        "df -k /memory | tail -n 1 | awk '{print $2}'; stat -f -c %T /memory; stat -c '%a %g' /memory; \
         mount | grep -c ' /memory type '",
    )?;
    ensure!(seen == "16384\ntmpfs\n3777 2000\n1", "{seen}");
    let part = "cat /memory/deep/part/note; stat -c '%a %g' /memory/deep/part";
    let seen = t.in_pod("volumes", "reader", part)?;
    ensure!(seen == "a part in memory\n3777 2000", "{seen}");
    let full =
        t.in_pod("volumes", "writer", "dd if=/dev/zero of=/part/much bs=1M count=20 2>&1; rm /part/much")?;
    ensure!(full.contains("No space left on device"), "{full}");
    // What the one may write to the node the other may not, and the node sees it.
    let refused = t.kubectl(&["exec", "volumes", "-c", "writer", "--", "touch", "/node/no"]).output()?;
    refused.expect_failure()?.expect_stderr(&["Read-only file system"])?;
    t.in_pod("volumes", "reader", "echo from the pod >/node/answer")?;
    ensure!(t.on_node("node-1", &["cat", "/var/lib/shared/answer"])? == "from the pod");
    t.on_node("node-1", &["sh", "-c", "echo later >/var/lib/shared/note"])?;
    ensure!(t.in_pod("volumes", "writer", "cat /node/note")? == "later");
    // A container that ends comes again to the same folders.
    t.in_pod("volumes", "reader", "echo kept >/disk/kept; kill -9 -1; kill 1; exit 0").ok();
    t.kubectl_ok(&["exec", "volumes", "-c", "writer", "--", "cat", "/disk/kept"])?;
    t.on_node("node-1", &["rm", "-rf", "/var/lib/shared/note", "/var/lib/shared/answer"])?;
    Ok(())
}

fn persistent(t: &mut Context<'_>) -> Result<()> {
    t.on_node("node-1", &["mkdir", "-p", "/var/lib/persistent"])?;
    t.example("persistent.yaml")?;
    t.ready(&["writer", "reader"])?;
    t.wait("jsonpath={.status.phase}=Bound", &["pvc/folder"])?;
    t.in_pod("writer", "main", "echo of the first >/folder/note; chown 7:8 /folder/note")?;
    t.kubectl_ok(&["delete", "pod", "writer", "--wait", "--timeout=120s"])?;
    let seen = t.in_pod("reader", "main", "cat /folder/note; stat -c %u:%g /folder/note")?;
    ensure!(seen == "of the first\n7:8", "{seen}");
    t.in_pod("reader", "main", "echo of the other >>/folder/note")?;
    // Another one with the same claim.
    t.example("persistent.yaml")?;
    t.ready(&["writer"])?;
    ensure!(t.in_pod("writer", "main", "cat /folder/note")? == "of the first\nof the other");
    t.on_node("node-1", &["rm", "/var/lib/persistent/note"])?;
    Ok(())
}

/// A machine has it although it runs already when the container comes.
fn block(t: &mut Context<'_>) -> Result<()> {
    let make = "truncate -s 16M /var/lib/disk.img; \
                ln -sfn $(losetup --find --show /var/lib/disk.img) /var/lib/disk";
    t.on_node("node-1", &["sh", "-c", make])?;
    let seen = with_device(t);
    // Gone at the latest when the pod is.
    let remove = "losetup --detach $(readlink /var/lib/disk); rm /var/lib/disk /var/lib/disk.img";
    t.on_node("node-1", &["sh", "-c", remove])?;
    seen
}

fn with_device(t: &mut Context<'_>) -> Result<()> {
    t.example("block-volume.yaml")?;
    t.ready(&["block"])?;
    let script =
        "test -b /dev/disk; echo from the pod | dd of=/dev/disk bs=512 seek=9 conv=fsync 2>/dev/null";
    t.in_pod("block", "main", script)?;
    t.kubectl_ok(&["delete", "pod", "block", "--wait", "--timeout=120s"])?;
    let seen = t.on_node("node-1", &["dd", "if=/var/lib/disk.img", "bs=512", "skip=9", "count=1"])?;
    ensure!(seen.starts_with("from the pod\n"), "{seen:?}");
    Ok(())
}

/// Together, for the kubelet looks at the limit when it is time.
fn image_and_limit(t: &mut Context<'_>) -> Result<()> {
    t.example("evicted.yaml")?;
    t.example("image-volume.yaml")?;
    t.ready(&["image-volume"])?;
    let seen =
        t.in_pod("image-volume", "main", "cat /image/data/hello.txt /part/hello.txt; ls -d /image/bin")?;
    ensure!(seen == "hello\nhello\n/image/bin", "{seen}");
    for place in ["/image/new", "/part/hello.txt"] {
        let refused = t.kubectl(&["exec", "image-volume", "--", "touch", place]).output()?;
        refused.expect_failure()?.expect_stderr(&["Read-only file system"])?;
    }
    t.wait("jsonpath={.status.phase}=Failed", &["pod/evicted"])?;
    let seen = t.field("pod/evicted", "{.status.reason}: {.status.message}")?;
    ensure!(
        seen.trim_end() == "Evicted: Usage of EmptyDir volume \"scratch\" exceeds the limit \"16Mi\".",
        "{seen}"
    );
    Ok(())
}
