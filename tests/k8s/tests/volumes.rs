//! Folders of pods.

use anyhow::{Result, ensure};
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] = &[Test::common("volumes::shared_by_containers_and_node", volumes)];

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
        "df -k /memory | tail -n 1 | awk '{print $2}'; mount | grep -c ' /memory type '",
    )?;
    ensure!(seen == "16384\n1", "{seen}");
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
