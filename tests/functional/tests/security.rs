//! What a container may not do.

use anyhow::{Result, ensure};
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::common("security::capabilities_default", capabilities_default),
    Test::common("security::cap_add", cap_add),
    Test::common("security::cap_drop", cap_drop),
    Test::common("security::privileged", privileged),
    Test::common("security::seccomp_default_profile", seccomp_default_profile),
    Test::common("security::seccomp_profile_file", seccomp_profile_file),
    Test::common("security::no_new_privileges", no_new_privileges),
    Test::common("security::masked_paths", masked_paths),
    Test::common("security::read_only_paths", read_only_paths),
    Test::bulkhead("security::default_profiles_of_apparmor", "runc refuses them too", default_profiles),
];

fn status(t: &Context, flags: &[&str], field: &str) -> Result<String> {
    let line = t.run_ok(flags, &["grep", &format!("^{field}:"), "/proc/self/status"])?;
    Ok(line.split_whitespace().nth(1).unwrap_or_default().to_string())
}

fn effective(t: &Context, flags: &[&str]) -> Result<u64> {
    Ok(u64::from_str_radix(&status(t, flags, "CapEff")?, 16)?)
}

const CAP_CHOWN: u64 = 1 << 0;
const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_SYS_ADMIN: u64 = 1 << 21;

/// What containerd asks for in the name of those who ask for nothing, on a host that has AppArmor.
fn default_profiles(t: &mut Context) -> Result<()> {
    let with = |t: &mut Context, name: &str, profile: &str| -> Result<harness::Output> {
        let run = t.run_spec(name, &["true"], |spec| spec["process"]["apparmorProfile"] = profile.into())?;
        run.output()
    };
    with(t, "default", "cri-containerd.apparmor.d")?.ok()?;
    let refused = with(t, "chosen", "my-own")?.expect_failure()?;
    refused.expect_stderr(&["process.apparmorProfile", "no profile \"my-own\""])?;
    Ok(())
}

fn capabilities_default(t: &mut Context) -> Result<()> {
    let caps = effective(t, &[])?;
    // The fourteen that containerd gives to every container.
    ensure!(caps == 0xa804_25fb, "CapEff is {caps:x}");
    Ok(())
}

fn cap_add(t: &mut Context) -> Result<()> {
    let caps = effective(t, &["--cap-add", "CAP_NET_ADMIN"])?;
    ensure!(caps & CAP_NET_ADMIN != 0 && caps & CAP_SYS_ADMIN == 0, "CapEff is {caps:x}");
    // It works, not only shows.
    t.sh(&["--cap-add", "CAP_NET_ADMIN"], "ip link set lo mtu 1234 && ip -o link show lo | grep -q 1234")?;
    t.run_rm(&[], &["ip", "link", "set", "lo", "mtu", "1234"])?.expect_failure()?;
    Ok(())
}

fn cap_drop(t: &mut Context) -> Result<()> {
    let caps = effective(t, &["--cap-drop", "CAP_CHOWN"])?;
    ensure!(caps & CAP_CHOWN == 0 && caps != 0, "CapEff is {caps:x}");
    let output = t.run_rm(&["--cap-drop", "CAP_CHOWN"], &["chown", "alice", "/tmp"])?.expect_failure()?;
    output.expect_stderr(&["Operation not permitted"])?;
    Ok(())
}

fn privileged(t: &mut Context) -> Result<()> {
    let caps = effective(t, &["--privileged"])?;
    ensure!(caps & CAP_SYS_ADMIN != 0 && caps & CAP_NET_ADMIN != 0, "CapEff is {caps:x}");
    t.sh(&["--privileged"], "mkdir /m && mount -t tmpfs none /m && touch /m/x")?;
    let open = t.sh(
        &["--privileged"],
        "head -c 1 /proc/sys/kernel/ostype; echo 0 > /proc/sys/net/ipv4/ip_forward && echo writable",
    )?;
    ensure!(open.contains("writable"), "saw {open:?}");
    Ok(())
}

fn seccomp_default_profile(t: &mut Context) -> Result<()> {
    let with = status(t, &["--seccomp"], "Seccomp")?;
    let without = status(t, &[], "Seccomp")?;
    ensure!(with == "2" && without == "0", "with: {with}, without: {without}");
    // A call that the profile withholds from a container without CAP_SYS_ADMIN.
    let output = t.run_rm(&["--seccomp"], &["unshare", "-U", "true"])?.expect_failure()?;
    output.expect_stderr(&["Operation not permitted"])?;
    Ok(())
}

fn seccomp_profile_file(t: &mut Context) -> Result<()> {
    let profile = t.write(
        "profile.json",
        r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],
            "syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":28}]}"#,
    )?;
    let flags = ["--seccomp", "--seccomp-profile", &profile.display().to_string()];
    let output = t.run_rm(&flags, &["sh", "-c", "touch /tmp/fine && mkdir /tmp/d"])?.expect_failure()?;
    output.expect_stderr(&["No space left on device"])?;
    Ok(())
}

fn no_new_privileges(t: &mut Context) -> Result<()> {
    let usual = status(t, &[], "NoNewPrivs")?;
    let allowed = status(t, &["--allow-new-privs"], "NoNewPrivs")?;
    ensure!(usual == "1" && allowed == "0", "usual: {usual}, with --allow-new-privs: {allowed}");
    Ok(())
}

fn masked_paths(t: &mut Context) -> Result<()> {
    let script = "for f in /proc/kcore /proc/keys /proc/timer_list; do [ -e $f ] && [ $(head -c 9 $f | wc -c) != 0 ] && echo $f; done; ls /sys/firmware /proc/scsi /proc/acpi 2>/dev/null | grep -v : ; echo end";
    let seen = t.sh(&[], script)?;
    ensure!(seen.trim() == "end", "these show something: {seen}");
    Ok(())
}

fn read_only_paths(t: &mut Context) -> Result<()> {
    for path in ["/proc/sys/net/ipv4/ip_forward", "/proc/irq/default_smp_affinity"] {
        let output = t.run_rm(&[], &["sh", "-c", &format!("echo 1 > {path}")])?.expect_failure()?;
        output.expect_stderr(&["Read-only file system"])?;
    }
    Ok(())
}
