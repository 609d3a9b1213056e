use serde_json::{Value, json};

use super::*;

fn guest() -> Guest<'static> {
    Guest {
        disks: Disks::default(),
        copies: None,
        memory: None,
        sockets: None,
        network: "/run/bulkhead/ns/net".into(),
        namespaces: Path::new("/run/bulkhead/ns"),
        has_device: &|_, major, minor| (major, minor) == (1, 3),
        ipc_sysctls: &[],
        users: None,
    }
}

fn base() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 1000, "gid": 1000},
            "args": ["sh"],
            "env": ["PATH=/bin"],
            "cwd": "/work",
            "noNewPrivileges": false,
            "capabilities": {"bounding": ["CAP_KILL"]},
        },
        "root": {"path": "/run/bulkhead/share/c/rootfs"},
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network", "path": "/proc/9/ns/net"}],
            "cgroupsPath": "/kubepods/x",
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"},
            "resources": {"devices": [{"allow": false, "access": "rwm"}], "memory": {"limit": 1000000}},
        },
    })
}

/// The base with one value replaced.
fn with(pointer: &str, value: Value) -> Value {
    let mut spec = base();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    spec.pointer_mut(parent).unwrap()[key] = value;
    spec
}

fn adapt(spec: &Value) -> Result<Create> {
    container("c", spec.to_string().as_bytes(), None, &guest())
}

fn refusal(pointer: &str, value: Value) -> String {
    adapt(&with(pointer, value)).expect_err(pointer).to_string()
}

#[test]
fn a_container_moves_into_the_guest() {
    let create = adapt(&base()).unwrap();
    let linux = create.spec.linux().as_ref().unwrap();
    assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/bulkhead/c")));
    let namespaces: Vec<_> =
        linux.namespaces().iter().flatten().map(|n| (n.typ(), n.path().clone())).collect();
    assert_eq!(
        namespaces,
        [
            (LinuxNamespaceType::Pid, None),
            (LinuxNamespaceType::Mount, None),
            (LinuxNamespaceType::Network, Some("/run/bulkhead/ns/net".into())),
            (LinuxNamespaceType::Cgroup, None),
        ]
    );
    assert_eq!(linux.resources().as_ref().unwrap().memory().as_ref().unwrap().limit(), Some(1000000));
}

#[test]
fn the_last_mile_is_taken_from_libcontainer() {
    let create = adapt(&base()).unwrap();
    let process = create.spec.process().as_ref().unwrap();
    assert!(process.capabilities().is_none());
    assert_eq!(process.no_new_privileges(), None);
    assert_eq!(process.cwd(), Path::new("/"));
    assert!(create.spec.linux().as_ref().unwrap().seccomp().is_none());
    let last = &create.last_mile;
    assert!(last.seccomp.is_some() && last.capabilities.is_some() && !last.no_new_privileges);
    assert_eq!((last.cwd.as_path(), last.uid, last.init), (Path::new("/work"), 1000, true));
    assert_eq!(last.env, ["PATH=/bin"]);
}

#[test]
fn an_exec_gets_the_filter_of_its_container() {
    let init = adapt(&base()).unwrap().last_mile;
    let process = base()["process"].to_string();
    let size = Size { width: 80, height: 24 };
    let exec = exec(7, process.as_bytes(), Some(size), &init, None).unwrap();
    assert_eq!(exec.last_mile.seccomp, init.seccomp);
    assert!(!exec.last_mile.init);
    assert_eq!(exec.last_mile.terminal, Some(size));
    assert_eq!(exec.process.terminal(), Some(true));
}

#[test]
fn a_32_bit_machine_is_for_every_process_of_the_container() {
    let mut spec = base();
    spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    let create = adapt(&spec).unwrap();
    assert!(create.last_mile.linux32 && create.spec.linux().as_ref().unwrap().personality().is_none());
    let process = spec["process"].to_string();
    assert!(exec(7, process.as_bytes(), None, &create.last_mile, None).unwrap().last_mile.linux32);
}

fn users() -> Users {
    use bulkhead_proto::agent::{IdMapping, UserNamespace};
    let ids = || vec![IdMapping { container: 0, guest: 100_000, size: 65536, ..Default::default() }];
    Users::read(&UserNamespace { uids: ids(), gids: ids(), ..Default::default() }).unwrap()
}

#[test]
fn a_container_joins_the_pods_users_if_it_says_so() {
    let users = users();
    let adapt = |spec: &Value| {
        container("c", spec.to_string().as_bytes(), None, &Guest { users: Some(&users), ..guest() })
    };
    let mut spec = with("/linux/namespaces", json!([{"type": "user"}, {"type": "mount"}]));
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    let create = adapt(&spec).unwrap();
    let linux = create.spec.linux().as_ref().unwrap();
    let user = linux.namespaces().iter().flatten().find(|n| n.typ() == LinuxNamespaceType::User).unwrap();
    assert_eq!(user.path().as_deref(), Some(Path::new("/run/bulkhead/ns/user")));
    assert!(linux.uid_mappings().is_none() && linux.gid_mappings().is_none());
    let init = create.last_mile;
    let stranger = json!({"user": {"uid": 70_000, "gid": 0}, "args": ["sh"], "cwd": "/"}).to_string();
    let said = exec(7, stranger.as_bytes(), None, &init, create.users.as_ref()).unwrap_err().to_string();
    assert!(said.contains("process.user.uid: 70000 is not mapped"), "{said}");
    assert_eq!(create.users, Some(users.clone()));

    spec["linux"]["gidMappings"][0]["size"] = json!(1);
    let said = adapt(&spec).unwrap_err().to_string();
    assert!(said.contains("those of the pod are different"), "{said}");
    assert_eq!(adapt(&base()).unwrap().users, None);
    let mut without = base();
    without["linux"]["uidMappings"] = spec["linux"]["uidMappings"].clone();
    assert!(adapt(&without).unwrap_err().to_string().contains("without a user namespace"));
}

#[test]
fn what_is_missing_is_named() {
    for (pointer, field) in
        [("/process", "process"), ("/root", "root"), ("/linux", "linux"), ("/process/args", "process.args")]
    {
        assert_eq!(refusal(pointer, Value::Null), format!("{field}: missing in the specification"));
    }
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let cases = [
        ("/process/apparmorProfile", json!("my-own"), "process.apparmorProfile: "),
        ("/process/selinuxLabel", json!("system_u:x"), "process.selinuxLabel: "),
        ("/process/cwd", json!("relative"), "process.cwd: "),
        ("/linux/mountLabel", json!("system_u:x"), "linux.mountLabel: "),
        ("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt: "),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/s"}),
            "linux.seccomp: ",
        ),
        ("/linux/resources/memory", json!({"swappiness": 10}), "linux.resources.memory.swappiness: "),
        (
            "/linux/resources/memory",
            json!({"disableOOMKiller": true}),
            "linux.resources.memory.disableOOMKiller: ",
        ),
        (
            "/linux/resources/blockIO",
            json!({"weightDevice": [{"major": 8, "minor": 0, "weight": 10}]}),
            "linux.resources.blockIO.weightDevice: ",
        ),
        (
            "/linux/resources/blockIO",
            json!({"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 10}]}),
            "linux.resources.blockIO: 8:0 is not ",
        ),
        ("/linux/resources/network", json!({"classID": 1}), "linux.resources.network: "),
        ("/linux/namespaces", json!([{"type": "user"}]), "linux.namespaces: user: "),
        ("/linux/namespaces", json!([{"type": "ipc", "path": "/proc/1/ns/ipc"}]), "linux.namespaces: ipc: "),
        ("/hooks", json!({"createRuntime": [{"path": "/host/hook"}]}), "hooks.createRuntime: /host/hook "),
        ("/hooks", json!({"poststop": [{"path": "/host/hook"}]}), "hooks.poststop: /host/hook "),
        ("/root", json!({"path": "rootfs"}), "root.path: "),
        (
            "/mounts",
            json!([{"destination": "/m", "type": "bind", "options": ["rbind", "rshared"]}]),
            "mounts: rshared at /m: ",
        ),
    ];
    for (pointer, value, beginning) in cases {
        let said = refusal(pointer, value);
        assert!(said.starts_with(beginning), "{said}");
    }
}

#[test]
fn empty_labels_and_defaults_are_no_wish() {
    for (pointer, value) in [
        ("/process/apparmorProfile", json!("cri-containerd.apparmor.d")),
        ("/process/apparmorProfile", json!("nerdctl-default")),
        ("/process/apparmorProfile", json!("unconfined")),
        ("/process/selinuxLabel", json!("")),
        ("/linux/mountLabel", json!("")),
        ("/hooks", json!({"poststop": []})),
    ] {
        adapt(&with(pointer, value)).unwrap();
    }
}

#[test]
fn propagation_is_said_in_libcontainers_words() {
    for (given, expected) in
        [("rslave", "slave"), ("private", "private"), ("rshared", "shared"), ("runbindable", "unbindable")]
    {
        let create = adapt(&with("/linux/rootfsPropagation", json!(given))).unwrap();
        assert_eq!(create.spec.linux().as_ref().unwrap().rootfs_propagation().as_deref(), Some(expected));
    }
}

#[test]
fn a_hook_of_the_container_stays() {
    let create = adapt(&with("/hooks", json!({"startContainer": [{"path": "/bin/true"}]}))).unwrap();
    assert_eq!(create.spec.hooks().as_ref().unwrap().start_container().as_ref().unwrap().len(), 1);
}

#[test]
fn a_device_that_the_guest_lacks_is_named() {
    let devices = json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]);
    assert_eq!(
        refusal("/linux/devices", devices),
        "linux.devices: /dev/fuse (10:229) does not exist in the guest"
    );
}

#[test]
fn a_privileged_container_gets_the_devices_that_exist() {
    let mut spec = with(
        "/linux/devices",
        json!([
            {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232},
            {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
        ]),
    );
    spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    let create = adapt(&spec).unwrap();
    let devices = create.spec.linux().as_ref().unwrap().devices().clone().unwrap();
    assert_eq!(devices.len(), 1);
    assert_eq!(devices[0].path(), Path::new("/dev/null"));
    assert_eq!(create.devices.len(), 1);
}

#[test]
fn sysctls_of_the_pod_reach_containers_with_an_ipc_namespace() {
    let pod = [("kernel.shmmax".to_owned(), "1".to_owned()), ("kernel.sem".to_owned(), "2".to_owned())];
    let guest = Guest { ipc_sysctls: &pod, ..guest() };
    let mut spec = with("/linux/sysctl", json!({"kernel.sem": "own"}));
    let adapt = |spec: &Value| container("c", spec.to_string().as_bytes(), None, &guest).unwrap();
    assert_eq!(adapt(&spec).spec.linux().as_ref().unwrap().sysctl().as_ref().unwrap().len(), 1);
    spec["linux"]["namespaces"] = json!([{"type": "ipc"}]);
    let sysctls = adapt(&spec).spec.linux().as_ref().unwrap().sysctl().clone().unwrap();
    assert_eq!((sysctls["kernel.sem"].as_str(), sysctls["kernel.shmmax"].as_str()), ("own", "1"));
}

#[test]
fn ids_are_plain_names() {
    for good in ["a", "1f.2_3+4-x", &"x".repeat(128)] {
        check_id(good).unwrap();
    }
    for bad in ["", ".", "..", ".hidden", "a/b", "a b", "ü", &"x".repeat(129)] {
        check_id(bad).unwrap_err();
    }
}

#[test]
fn limits_of_devices_are_those_of_the_guests() {
    let disks: Disks = [((8, 1), (254, 16))].into_iter().collect();
    let limits =
        br#"{"blockIO": {"weight": 1000, "throttleReadBpsDevice": [{"major": 8, "minor": 1, "rate": 7}],
        "throttleWriteIOPSDevice": [{"major": 8, "minor": 1, "rate": 9}], "throttleWriteBpsDevice": []}}"#;
    let limits = resources(limits, &disks).unwrap();
    assert_eq!(limits.unified().as_ref().unwrap()["io.weight"], "10000");
    let io = limits.block_io().clone().unwrap();
    let one = |list: &Option<Vec<LinuxThrottleDevice>>| {
        list.as_ref().map(|list| list.iter().map(|l| (l.major(), l.minor(), l.rate())).collect::<Vec<_>>())
    };
    assert_eq!(io.weight(), None);
    assert_eq!(one(io.throttle_read_bps_device()), Some(vec![(254, 16, 7)]));
    assert_eq!(one(io.throttle_write_iops_device()), Some(vec![(254, 16, 9)]));
    assert_eq!(one(io.throttle_write_bps_device()), None);
    for (given, expected) in [(0, None), (10, Some("1")), (500, Some("4950"))] {
        let limits =
            resources(format!(r#"{{"blockIO": {{"weight": {given}}}}}"#).as_bytes(), &disks).unwrap();
        let weight = limits.unified().as_ref().and_then(|unified| unified.get("io.weight"));
        assert_eq!(weight.map(String::as_str), expected);
    }
}

#[test]
fn limits_are_read_and_rules_of_devices_left_alone() {
    let limits =
        resources(br#"{"memory": {"limit": 5}, "devices": [{"allow": false}]}"#, &Disks::default()).unwrap();
    assert_eq!(limits.memory().as_ref().unwrap().limit(), Some(5));
    assert!(limits.devices().is_none());
    assert!(
        resources(b"{", &Disks::default())
            .unwrap_err()
            .to_string()
            .starts_with("the resources cannot be read: ")
    );
}

proptest::proptest! {
    /// Any bytes are translated or refused, without a panic.
    #[test]
    fn any_bytes_are_refused_without_panic(bytes: Vec<u8>) {
        let _ = container("c", &bytes, None, &guest());
        let _ = resources(&bytes, &Disks::default());
    }
}
