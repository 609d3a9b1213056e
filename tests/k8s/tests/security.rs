//! What a container may, and as whom.

use anyhow::{Result, ensure};
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::common("security::a_user_with_little", little),
    Test::common("security::a_user_namespace", user_namespace),
];

fn little(t: &mut Context<'_>) -> Result<()> {
    t.example("security.yaml")?;
    t.ready(&["security"])?;
    let seen = t.in_pod("security", "main", "id -u; id -g; id -G")?;
    ensure!(seen.starts_with("1000\n3000\n3000") && seen.contains("4000"), "{seen}");
    let script = "grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t'";
    let seen = t.in_pod("security", "main", script)?;
    ensure!(seen == "CapEff:0000000000000000\nNoNewPrivs:1\nSeccomp:2", "{seen}");
    let seen = t.in_pod("security", "main", "touch /no 2>&1; unshare -U true 2>&1; true")?;
    ensure!(seen.contains("Read-only file system") && seen.contains("Operation not permitted"), "{seen}");
    let script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced; \
                  httpd -p 79 -h /etc && wget -q -O - http://127.0.0.1:79/hostname";
    let seen = t.in_pod("security", "main", script)?;
    ensure!(seen == "79\n1\nsecurity", "{seen}");
    Ok(())
}

fn user_namespace(t: &mut Context<'_>) -> Result<()> {
    t.example("user-namespace.yaml")?;
    t.ready(&["user-namespace"])?;
    let follow = t.kubectl(&["logs", "-f", "user-namespace"]).spawn()?;
    follow.wait_for_text("65536")?;
    let seen = t.kubectl_ok(&["logs", "user-namespace"])?;
    let fields: Vec<&str> = seen.split_whitespace().collect();
    ensure!(
        matches!(fields[..], ["0", "0", outside, "65536"] if outside != "0"),
        "root inside, nobody outside: {seen}"
    );
    ensure!(t.in_pod("user-namespace", "main", "stat -c %u /disk/mine /bin")? == "0\n0");
    Ok(())
}
