//! The operator's command as its users run it: arguments in, text and exit status out.

use std::path::Path;
use std::process::{Command, Output};

fn bulkhead(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .args(arguments)
        .env_remove("BULKHEAD_CONFIG")
        .env("CONTAINERD_ADDRESS", "/nonexistent/containerd.sock")
        .output()
        .expect("the command starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

fn config_with(state_dir: &Path) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("state_dir = {state_dir:?}\n")).unwrap();
    file
}

#[test]
fn check_fails_where_something_is_missing_and_says_so_in_both_formats() {
    let output = bulkhead(&["check"]);
    assert_eq!(output.status.code(), Some(1), "there is no containerd at that socket");
    let said = text(&output.stdout);
    let line = said.lines().find(|line| line.contains(" containerd ")).expect("a line on containerd");
    assert!(line.starts_with("failure  containerd"), "{line}");
    assert!(line.contains("no daemon at /nonexistent/containerd.sock") && line.contains(" -> "), "{line}");
    assert!(said.contains("pods cannot run here yet"), "{said}");
    assert!(!said.contains('\x1b'), "no colours into a pipe");

    let output = bulkhead(&["check", "--output", "json"]);
    assert_eq!(output.status.code(), Some(1));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(answer["status"], "failure");
    let facts = answer["facts"].as_array().unwrap();
    let kvm = facts.iter().find(|fact| fact["name"] == "kvm").expect("a fact on KVM");
    assert!(["ok", "warning"].contains(&kvm["status"].as_str().unwrap()), "{kvm}");
}

#[test]
fn ps_lists_what_shims_wrote() {
    let folder = tempfile::tempdir().unwrap();
    let pod = folder.path().join("0123456789abcdef");
    std::fs::create_dir(&pod).unwrap();
    std::fs::write(
        pod.join("state.json"),
        r#"{"namespace":"default","id":"demo","shim_pid":4294967295,"vmm_pid":0,"backend":"emulation","memory_mib":640,
        "vcpus":2,"created_unix_nanos":1,"bundle":"/b","containers":[{"id":"demo","pid":9,"status":"stopped"}]}"#,
    )
    .unwrap();
    let config = config_with(folder.path());
    let path = config.path().to_str().unwrap();
    let output = bulkhead(&["ps", "--config", path]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    assert_eq!(said.lines().count(), 2, "{said}");
    assert!(said.contains("demo  dead    emulation  2      0.0 MiB of 640 MiB"), "{said}");

    let output = bulkhead(&["ps", "-o", "json", "-c", path]);
    let pods: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&pods[0]["id"], &pods[0]["containers"][0]["status"]), (&"demo".into(), &"stopped".into()));
}

#[test]
fn ps_of_a_machine_without_pods_succeeds() {
    let config = config_with(Path::new("/nonexistent/state"));
    let output = bulkhead(&["ps", "-o", "json", "-c", config.path().to_str().unwrap()]);
    assert!(output.status.success());
    assert_eq!(text(&output.stdout), "[]\n");
}

#[test]
fn version_has_both_formats() {
    let said = bulkhead(&["version"]);
    assert!(text(&said.stdout).starts_with(&format!("bulkhead      {}\n", env!("CARGO_PKG_VERSION"))));
    let versions: serde_json::Value =
        serde_json::from_slice(&bulkhead(&["version", "-o", "json"]).stdout).unwrap();
    assert_eq!(versions["bulkhead"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn a_mistake_in_the_configuration_is_shown_with_its_place() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "\nstate_dirr = \"/x\"\n").unwrap();
    let path = file.path().to_str().unwrap();
    let output = bulkhead(&["ps", "--config", path]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        text(&output.stderr),
        format!("bulkhead: {path}:2:1: unknown key `state_dirr`; did you mean `state_dir`?\n")
    );
}

#[test]
fn wrong_arguments_are_explained() {
    let output = bulkhead(&["chekc"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("'check'"), "{}", text(&output.stderr));
}

#[test]
fn pages_and_completions_are_generated() {
    let folder = tempfile::tempdir().unwrap();
    assert!(bulkhead(&["man", folder.path().to_str().unwrap()]).status.success());
    assert!(folder.path().join("bulkhead-check.1").exists());
    let output = bulkhead(&["completions", "bash"]);
    assert!(text(&output.stdout).contains("complete -F _bulkhead"));
}
