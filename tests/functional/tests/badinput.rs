//! Wrong input: the user reads in ctr's own output what is wrong, and nothing is left.

use anyhow::Result;
use harness::{Context, Output, Test};

pub(crate) const TESTS: &[Test] = &[
    Test::common("badinput::command_not_in_the_image", command_not_in_the_image),
    Test::common("badinput::command_not_in_the_image_exec", command_not_in_the_image_exec),
    Test::common("badinput::command_is_not_a_program", command_is_not_a_program),
    Test::common("badinput::user_does_not_exist", user_does_not_exist),
    Test::common("badinput::mount_source_does_not_exist", mount_source_does_not_exist),
    Test::common("badinput::device_does_not_exist", device_does_not_exist),
    Test::common("badinput::exec_in_a_stopped_container", exec_in_a_stopped_container),
    Test::bulkhead("badinput::config_unknown_key", OWN_CONFIG, config_unknown_key),
    Test::bulkhead("badinput::config_wrong_type", OWN_CONFIG, config_wrong_type),
    Test::bulkhead("badinput::config_missing_kernel", OWN_CONFIG, config_missing_kernel),
    Test::bulkhead("badinput::config_missing_image", OWN_CONFIG, config_missing_image),
    Test::bulkhead("badinput::config_missing_programs", OWN_CONFIG, config_missing_programs),
    Test::bulkhead("badinput::host_without_the_vmm", OWN_CONFIG, host_without_the_vmm),
    Test::bulkhead("badinput::kernel_that_does_not_boot", OWN_CONFIG, kernel_that_does_not_boot),
    Test::bulkhead("badinput::memory_too_small_to_boot", OWN_CONFIG, memory_too_small_to_boot),
    Test::bulkhead("badinput::config_of_runtime_options", OWN_CONFIG, config_of_runtime_options),
    Test::bulkhead("badinput::annotation_not_allowed", OWN_CONFIG, annotation_not_allowed),
    Test::bulkhead("badinput::annotation_allowed", OWN_CONFIG, annotation_allowed),
    Test::bulkhead("badinput::host_network_is_refused", NO_HOST, host_network_is_refused),
    Test::bulkhead("badinput::joining_a_namespace_is_refused", NO_HOST, joining_a_namespace_is_refused),
    Test::bulkhead("badinput::device_of_the_host_is_refused", NO_HOST, device_of_the_host_is_refused),
    Test::common("badinput::cwd_does_not_exist", cwd_does_not_exist),
    Test::bulkhead("badinput::spec_without_process", "runc's shim panics on it", spec_without_process),
    Test::bulkhead("badinput::spec_without_root", "runc's words differ", spec_without_root),
];

const OWN_CONFIG: &str = "the configuration is bulkhead's own";
const NO_HOST: &str = "runc can give a container what is the host's";

fn command_not_in_the_image(t: &mut Context) -> Result<()> {
    let output = t.run_rm(&[], &["nope"])?.expect_failure()?;
    output.expect_stderr(&["exec: \"nope\": executable file not found in $PATH"])?;
    let output = t.run_rm(&[], &["/bin/nope"])?.expect_failure()?;
    output.expect_stderr(&["exec: \"/bin/nope\": stat /bin/nope: no such file or directory"])?;
    Ok(())
}

fn command_not_in_the_image_exec(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let output = t.exec("c", "e", &["nope"]).output()?.expect_failure()?;
    output.expect_stderr(&["exec: \"nope\": executable file not found in $PATH"])?;
    t.remove("c")
}

fn command_is_not_a_program(t: &mut Context) -> Result<()> {
    t.run_rm(&[], &["/etc/not-a-program"])?
        .expect_failure()?
        .expect_stderr(&["/etc/not-a-program", "permission denied"])?;
    Ok(())
}

/// ctr itself forgets the snapshot when it cannot make the specification; containerd collects it in its
/// own time, which may have come already.
fn remove_snapshot(t: &Context) -> Result<()> {
    let output = t.ctr().args(["snapshot", "rm", "c"]).output()?;
    if output.exit != harness::Exit::Code(0) {
        output.expect_stderr(&["not found"])?;
    }
    Ok(())
}

fn user_does_not_exist(t: &mut Context) -> Result<()> {
    t.run_rm(&["--user", "mallory"], &["true"])?.expect_failure()?.expect_stderr(&["no users found"])?;
    remove_snapshot(t)
}

fn mount_source_does_not_exist(t: &mut Context) -> Result<()> {
    let output =
        t.run_rm(&["--mount", "type=bind,src=/no/such/place,dst=/mnt,options=rbind:ro"], &["true"])?;
    output.expect_failure()?.expect_stderr(&["/no/such/place", "no such file or directory"])?;
    Ok(())
}

fn device_does_not_exist(t: &mut Context) -> Result<()> {
    let output = t.run_rm(&["--device", "/dev/no-such-device"], &["true"])?.expect_failure()?;
    output.expect_stderr(&["/dev/no-such-device", "no such file or directory"])?;
    remove_snapshot(t)
}

fn exec_in_a_stopped_container(t: &mut Context) -> Result<()> {
    let mut events = t.events()?;
    t.start_detached(&[], "c", &["true"])?;
    events.wait_exit("c", 30)?;
    t.exec("c", "e", &["true"]).output()?.expect_failure()?;
    t.remove("c")
}

/// `ctr run` of a container that would succeed; it must fail.
fn refused(t: &Context, flags: &[&str]) -> Result<Output> {
    t.run_rm(flags, &["true"])?.expect_failure()
}

fn config_path(t: &mut Context) -> String {
    t.node().bulkhead_config().display().to_string()
}

fn config_unknown_key(t: &mut Context) -> Result<()> {
    t.write_config("# one\n\n[hypervisor]\nkernal = \"/boot/vmlinux\"\n")?;
    let place = format!("{}:4", config_path(t));
    refused(t, &[])?.expect_stderr(&[&place, "hypervisor.kernal", "hypervisor.kernel`"])?;
    Ok(())
}

fn config_wrong_type(t: &mut Context) -> Result<()> {
    t.write_config("[sandbox]\nmemory_mib = \"plenty\"\n")?;
    let place = format!("{}:2", config_path(t));
    refused(t, &[])?.expect_stderr(&[&place, "sandbox.memory_mib", "number"])?;
    Ok(())
}

fn config_missing_kernel(t: &mut Context) -> Result<()> {
    cannot_be_read(t, "kernel", "/no/such/vmlinux")
}

/// A file of the guest that is not there, and one that is no file; root may read every other.
fn cannot_be_read(t: &mut Context, key: &str, missing: &str) -> Result<()> {
    let key_name = format!("hypervisor.{key}");
    t.set_config("hypervisor", key, missing.into())?;
    refused(t, &[])?.expect_stderr(&[missing, &key_name])?;
    let directory = t.dir().display().to_string();
    t.set_config("hypervisor", key, directory.as_str().into())?;
    refused(t, &[])?.expect_stderr(&[&directory, &key_name])?;
    Ok(())
}

fn config_missing_image(t: &mut Context) -> Result<()> {
    cannot_be_read(t, "image", "/no/such/guest.cpio")
}

/// The keys of the programs that make a machine here, that of the VMM first.
fn program_keys(t: &mut Context) -> Result<Vec<&'static str>> {
    t.start_sleeper(&[], "c")?;
    let parts = t.parts()?;
    t.remove("c")?;
    Ok(parts.iter().map(|part| part.key).collect())
}

fn config_missing_programs(t: &mut Context) -> Result<()> {
    for key in program_keys(t)? {
        let path = format!("/no/such/{key}");
        t.reset_config()?;
        t.set_config("hypervisor", key, path.as_str().into())?;
        refused(t, &[])?.expect_stderr(&[&path, &format!("hypervisor.{key}")])?;
        let path = t.write(key, "#!/bin/sh\n")?.display().to_string();
        t.set_config("hypervisor", key, path.as_str().into())?;
        refused(t, &[])?.expect_stderr(&[&path, &format!("hypervisor.{key}")])?;
    }
    Ok(())
}

fn host_without_the_vmm(t: &mut Context) -> Result<()> {
    let key = program_keys(t)?[0];
    t.set_config("hypervisor", key, "vmm-that-is-not-installed".into())?;
    refused(t, &[])?.expect_stderr(&["vmm-that-is-not-installed", &format!("hypervisor.{key}")])?;
    Ok(())
}

/// A file that is no kernel: the machine ends or stays silent, and the user reads that it did not boot.
fn kernel_that_does_not_boot(t: &mut Context) -> Result<()> {
    let kernel = t.write("vmlinux", b"this is no kernel")?;
    t.set_config("hypervisor", "kernel", kernel.display().to_string().into())?;
    t.set_config("hypervisor", "boot_timeout_seconds", 5.into())?;
    refused(t, &[])?.expect_stderr(&[&kernel.display().to_string()])?;
    Ok(())
}

fn memory_too_small_to_boot(t: &mut Context) -> Result<()> {
    t.set_config("sandbox", "memory_mib", 16.into())?;
    t.set_config("sandbox", "memory_reserve_mib", 16.into())?;
    // What there is, and what it takes.
    refused(t, &[])?.expect_stderr(&["32 MiB", "at least 64 MiB to boot"])?;
    // A limit of the container's own with too small a reserve is no better.
    t.reset_config()?;
    t.set_config("sandbox", "memory_reserve_mib", 0.into())?;
    refused(t, &["--memory-limit", "20971520"])?
        .expect_stderr(&["20 MiB", "at least 64 MiB of memory to boot"])?;
    Ok(())
}

/// `--runtime-config-path` names a file that is read in place of the usual one.
fn config_of_runtime_options(t: &mut Context) -> Result<()> {
    t.set_config("sandbox", "memory_mib", 300.into())?;
    let usual = config_path(t);
    let other = t.write("other.toml", std::fs::read_to_string(&usual)?)?;
    t.write_config("[hypervisor]\nkernel = \"/no/such/vmlinux\"\n")?;
    let flags = ["--runtime-config-path", &other.display().to_string()];
    let total: u64 =
        t.run_ok(&flags, &["awk", "/MemTotal/{print int($2/1024)}", "/proc/meminfo"])?.parse()?;
    anyhow::ensure!((300..=428).contains(&total), "the guest has {total} MiB");
    let bad = t.write("bad.toml", "[sandbox]\nmemory = 1\n")?.display().to_string();
    refused(t, &["--runtime-config-path", &bad])?.expect_stderr(&[&format!("{bad}:2"), "sandbox.memory"])?;
    Ok(())
}

fn annotation_not_allowed(t: &mut Context) -> Result<()> {
    let output = refused(t, &["--annotation", "io.bulkhead.sandbox.memory_mib=512"])?;
    output.expect_stderr(&["io.bulkhead.sandbox.memory_mib", "annotations.allowed"])?;
    Ok(())
}

fn annotation_allowed(t: &mut Context) -> Result<()> {
    let allowed = toml_list(&["sandbox.memory_mib"]);
    t.set_config("annotations", "allowed", allowed)?;
    let script = ["awk", "/MemTotal/{print int($2/1024)}", "/proc/meminfo"];
    let flags = ["--annotation", "io.bulkhead.sandbox.memory_mib=384"];
    let total: u64 = t.run_ok(&flags, &script)?.parse()?;
    anyhow::ensure!((380..=512).contains(&total), "the guest has {total} MiB");
    Ok(())
}

fn toml_list(words: &[&str]) -> harness::Toml {
    harness::Toml::Array(words.iter().map(|w| (*w).into()).collect())
}

fn host_network_is_refused(t: &mut Context) -> Result<()> {
    refused(t, &["--net-host"])?.expect_stderr(&["network", "not supported"])?;
    Ok(())
}

fn joining_a_namespace_is_refused(t: &mut Context) -> Result<()> {
    refused(t, &["--with-ns", "ipc:/proc/1/ns/ipc"])?.expect_stderr(&["/proc/1/ns/ipc", "not supported"])?;
    Ok(())
}

fn device_of_the_host_is_refused(t: &mut Context) -> Result<()> {
    refused(t, &["--device", "/dev/loop-control"])?
        .expect_stderr(&["/dev/loop-control (character 10:237)", "not supported"])?;
    Ok(())
}

/// As with runc, a directory that is missing is made; where it cannot be, that is said.
fn cwd_does_not_exist(t: &mut Context) -> Result<()> {
    let seen = t.run_ok(&["--cwd", "/made/for/you"], &["pwd"])?;
    anyhow::ensure!(seen == "/made/for/you", "saw {seen:?}");
    refused(t, &["--cwd", "/etc/passwd/below"])?.expect_stderr(&["/etc/passwd"])?;
    Ok(())
}

fn spec_without_process(t: &mut Context) -> Result<()> {
    let run = t.run_spec("c", &["true"], |spec| spec["process"] = serde_json::Value::Null)?;
    run.output()?.expect_failure()?.expect_stderr(&["process"])?;
    Ok(())
}

fn spec_without_root(t: &mut Context) -> Result<()> {
    let run = t.run_spec("c", &["true"], |spec| spec["root"] = serde_json::Value::Null)?;
    run.output()?.expect_failure()?.expect_stderr(&["root"])?;
    Ok(())
}
