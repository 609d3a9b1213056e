//! Bad input gets a clear error, and nothing of it remains.

use bulkhead_proto::agent::DebugExecRequest;
use serde_json::{Value, json};

use crate::host::{Host, context, request, spec};

/// The message of a create that must fail.
async fn refused(host: &mut Host, id: &str, spec: &Value) -> String {
    let (stdio, _io) = host.stdio(false, false);
    match host.create(id, spec, stdio).await.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.message,
        other => panic!("{other}"),
    }
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_create_that_fails_says_why_and_leaves_nothing() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let cases: [(&str, Value, &str); 11] = [
        ("/process/args", json!(["nope"]), r#"exec: "nope": executable file not found in $PATH"#),
        ("/process/args", json!(["/x"]), r#"exec: "/x": stat /x: no such file or directory"#),
        ("/process/args", json!(["/etc/passwd"]), r#"exec: "/etc/passwd": permission denied"#),
        ("/process/args", json!([]), "process.args: missing in the specification"),
        ("/process/cwd", json!("/etc/passwd/x"), "mkdir /etc/passwd/x: not a directory"),
        (
            "/process/cwd",
            json!("/etc/passwd"),
            r#"chdir to cwd ("/etc/passwd") set in config.json failed: not a directory"#,
        ),
        (
            "/root/path",
            json!("/run/bulkhead/share/none"),
            "root /run/bulkhead/share/none: no such file or directory",
        ),
        (
            "/process/apparmorProfile",
            json!("my-own"),
            r#"process.apparmorProfile: the guest has no profile "my-own""#,
        ),
        ("/linux/sysctl", json!({"kernel.panic": "1"}), "sysctl"),
        ("/linux/resources", json!({"memory": {"limit": -7}}), "cgroup error: invalid memory value -7"),
        (
            "/mounts",
            json!([{"destination": "/a", "type": "bind", "source": "/none", "options": ["bind"]}]),
            "mount at /a: source /none: no such file or directory",
        ),
    ];
    for (pointer, value, expected) in cases {
        let mut spec = spec(&root, &["true"]);
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[key] = value;
        let said = refused(&mut host, "c", &spec).await;
        println!("{pointer}: {said}");
        assert!(said.contains(expected), "{said}");
    }
    let mut spec = spec(&root, &["true"]);
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/a", "type": "nofs", "source": "none"}));
    let said = refused(&mut host, "c", &spec).await;
    println!("mount: {said}");
    assert_eq!(said, r#"mount at /a: the guest has no file system of type "nofs""#);
    *spec["mounts"].as_array_mut().unwrap().last_mut().unwrap() =
        json!({"destination": "/a", "type": "ext4", "source": "/dev/none"});
    let said = refused(&mut host, "c", &spec).await;
    println!("mount: {said}");
    assert!(said.contains("/dev/none") && said.ends_with("no such file or directory"), "{said}");
    // The id is free again.
    spec["mounts"].as_array_mut().unwrap().pop();
    assert_eq!(host.run("c", &spec, b"").await.0, 0);
    assert!(
        host.events().iter().filter(|e| matches!(e, bulkhead_proto::agent::event::Kind::Exit(_))).count()
            == 1
    );
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn an_exec_that_fails_says_why() {
    let mut host = Host::start().await;
    let root = host.vm.rootfs("c");
    let (stdio, _io) = host.stdio(false, false);
    host.create("c", &spec(&root, &["sleep", "1000"]), stdio).await.unwrap();
    host.start_container("c").await.unwrap();
    std::fs::write(host.vm.share.join("c/rootfs/bin/garbage"), "\x7fELFgarbage").unwrap();
    let status = std::process::Command::new("chmod")
        .arg("755")
        .arg(host.vm.share.join("c/rootfs/bin/garbage"))
        .status();
    assert!(status.unwrap().success());
    for (args, cwd, expected) in [
        (vec!["nope"], "/", r#"exec: "nope": executable file not found in $PATH"#),
        (vec!["/etc"], "/", r#"exec: "/etc": is a directory"#),
        (
            vec!["true"],
            "/none",
            r#"chdir to cwd ("/none") set in config.json failed: no such file or directory"#,
        ),
        (vec!["garbage"], "/", "exec /bin/garbage: exec format error"),
    ] {
        let mut process = spec("/", &args)["process"].clone();
        process["cwd"] = json!(cwd);
        let (stdio, _io) = host.stdio(false, false);
        let Err(ttrpc::Error::RpcStatus(status)) = host.exec("c", "e", &process, stdio).await else {
            panic!("{args:?} has started");
        };
        println!("{}", status.message);
        assert!(status.message.contains(expected), "{}", status.message);
    }
    // As an init it has been created, so it ends with a status.
    let root = host.vm.rootfs("d");
    std::fs::copy(host.vm.share.join("c/rootfs/bin/garbage"), host.vm.share.join("d/rootfs/bin/garbage"))
        .unwrap();
    let (status, _, err) = host.run("d", &spec(&root, &["garbage"]), b"").await;
    assert_eq!((status, err.as_str()), (255, "exec /bin/garbage: exec format error\n"));
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn what_is_unknown_is_not_found() {
    let mut host = Host::start().await;
    let code = |error: ttrpc::Error| match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other}"),
    };
    let not_found = (ttrpc::Code::NOT_FOUND, "container x is not in this sandbox".to_owned());
    assert_eq!(code(host.start_container("x").await.unwrap_err()), not_found);
    assert_eq!(code(host.signal("x", "", 9, false).await.unwrap_err()), not_found);
    assert_eq!(code(host.vm.client.stats(context(), &request("x")).await.unwrap_err()), not_found);
    host.delete("x").await.unwrap();
    let root = host.vm.rootfs("c");
    assert_eq!(
        refused(&mut host, "../c", &spec(&root, &["true"])).await,
        r#""../c" cannot be the id of a container"#
    );
    let (stdio, _io) = host.stdio(false, false);
    host.create("c", &spec(&root, &["true"]), stdio).await.unwrap();
    assert_eq!(refused(&mut host, "c", &spec(&root, &["true"])).await, "container c exists already");
    // One that was never started can be deleted.
    host.delete("c").await.unwrap();
    assert_eq!(host.exit("c", "").await, 137);
    assert_eq!(host.run("c", &spec(&root, &["true"]), b"").await.0, 0);
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn programs_in_the_guest_itself_need_the_hosts_leave() {
    let host = Host::start().await;
    let exec = DebugExecRequest { exec_id: "1".into(), args: vec!["sh".into()], ..Default::default() };
    match host.vm.client.debug_exec(context(), &exec).await.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => {
            assert_eq!(status.message, "the host has not allowed programs in the guest itself");
        }
        other => panic!("{other}"),
    }
}
