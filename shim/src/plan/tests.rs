//! Rules of the plan, each on a spec as containerd writes it.

use bulkhead_vmm_spec::SizeMib;
use serde_json::{Value, json};

use super::*;

fn base() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}],
        "linux": {
            "cgroupsPath": "/default/c",
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}
            ]
        }
    })
}

fn spec(change: impl FnOnce(&mut Value)) -> Spec {
    let mut value = base();
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

fn id() -> ContainerId {
    ContainerId::parse("c").unwrap()
}

fn refusal(change: impl FnOnce(&mut Value)) -> String {
    container(&id(), spec(change)).unwrap_err().message
}

#[test]
fn the_guest_gets_its_own_paths_and_a_cgroup_namespace() {
    let plan = container(&id(), spec(|_| {})).unwrap();
    let root = plan.guest_spec.root().as_ref().unwrap().path().clone();
    assert_eq!(root, std::path::Path::new("/run/bulkhead/share/c/rootfs"));
    let namespaces = plan.guest_spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
    assert!(namespaces.iter().any(|n| n.typ() == oci_spec::runtime::LinuxNamespaceType::Cgroup));
    assert!(plan.binds.is_empty());
}

#[test]
fn binds_get_a_slot_each_and_keep_their_order_among_the_mounts() {
    let plan = container(
        &id(),
        spec(|s| {
            let mounts = s["mounts"].as_array_mut().unwrap();
            mounts.push(
                json!({"destination": "/a", "type": "bind", "source": "/host/a", "options": ["rbind", "ro"]}),
            );
            mounts.push(json!({"destination": "/t", "type": "tmpfs", "source": "tmpfs"}));
            mounts
                .push(json!({"destination": "/b", "type": "none", "source": "/host/b", "options": ["bind"]}));
        }),
    )
    .unwrap();
    let seen: Vec<_> =
        plan.binds.iter().map(|b| (b.slot, b.source.to_str().unwrap(), b.recursive, b.read_only)).collect();
    assert_eq!(seen, [(0, "/host/a", true, ReadOnly::Itself), (1, "/host/b", false, ReadOnly::No)]);
    let mounts = plan.guest_spec.mounts().clone().unwrap();
    let sources: Vec<_> = mounts.iter().map(|m| m.source().clone().unwrap().display().to_string()).collect();
    assert_eq!(
        sources,
        ["proc", "/run/bulkhead/share/c/mounts/0", "tmpfs", "/run/bulkhead/share/c/mounts/1"]
    );
}

/// A plan of one bind mount of /host at /m.
fn with_bind(options: &[&str]) -> ContainerPlan {
    let mount = json!({"destination": "/m", "type": "bind", "source": "/host", "options": options});
    container(&id(), spec(|s| s["mounts"] = json!([mount, {"destination": "/t", "type": "tmpfs"}]))).unwrap()
}

/// Destination, source below the bind mount's place, and options of each mount that the guest makes.
fn told(plan: &ContainerPlan) -> Vec<(String, String, String)> {
    let mounts = plan.guest_spec.mounts().clone().unwrap();
    let one = |m: &oci_spec::runtime::Mount| {
        let source = m.source().clone().unwrap_or_default().display().to_string();
        let source = source.strip_prefix("/run/bulkhead/share/c/mounts/").unwrap_or_default().to_owned();
        let options = m.options().clone().unwrap_or_default().join(",");
        (m.destination().display().to_string(), source, options)
    };
    mounts.iter().map(one).collect()
}

#[test]
fn mounts_below_a_read_only_bind_have_their_own_say() {
    let mut plan = with_bind(&["rbind", "rprivate", "ro"]);
    assert_eq!(plan.binds[0].read_only, ReadOnly::Itself);
    assert_eq!(told(&plan)[0].2, "rbind,rprivate,ro");
    plan.leave_to_host(&id(), 1);
    assert_eq!(told(&plan)[0].2, "rbind,rprivate,ro", "another one");
    plan.leave_to_host(&id(), 0);
    assert_eq!(told(&plan)[0], ("/m".to_owned(), "0".to_owned(), "rbind,rprivate,rw".to_owned()));
}

#[test]
fn a_recursive_read_only_bind_is_one_read_only_file_system_to_the_guest() {
    for options in [&["rbind", "rprivate", "rro"][..], &["rbind", "ro", "rprivate", "rro"]] {
        let plan = with_bind(options);
        assert_eq!(plan.binds[0].read_only, ReadOnly::WithAllBelow);
        assert_eq!(told(&plan)[0].2, "rbind,rprivate,ro");
    }
}

#[test]
fn a_volume_at_dev_shm_is_the_users_and_that_of_the_pod_is_the_guests() {
    let source_of = |source: &str, kind: &str| {
        let mount = json!({"destination": "/dev/shm", "type": kind, "source": source, "options": ["rbind"]});
        let member = json!({"io.kubernetes.cri.container-type": "container"});
        let plan = container(
            &id(),
            spec(|s| {
                s["mounts"] = json!([mount]);
                s["annotations"] = member;
            }),
        );
        plan.unwrap().guest_spec.mounts().clone().unwrap()[0].source().clone().unwrap()
    };
    let of_the_pod = std::path::Path::new(bulkhead_proto::SHM_DIR);
    assert_eq!(source_of("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/abc/shm", "bind"), of_the_pod);
    assert_eq!(source_of("shm", "tmpfs"), of_the_pod);
    let volume = "/var/lib/kubelet/pods/abc/volumes/kubernetes.io~empty-dir/shm";
    assert_ne!(source_of(volume, "bind"), of_the_pod);
}

#[test]
fn a_root_needs_mount_points_for_what_no_earlier_mount_covers() {
    let bind = |at: &str| json!({"destination": at, "type": "bind", "source": "/host", "options": ["rbind"]});
    let mounts = json!([
        {"destination": "/dev", "type": "tmpfs"}, {"destination": "/dev/pts", "type": "devpts"},
        bind("/etc/hosts"), bind("/etc/hosts2"), bind("/m"), bind("/m/below")
    ]);
    let plan = container(&id(), spec(|s| s["mounts"] = mounts)).unwrap();
    let points: Vec<_> =
        plan.mount_points().into_iter().map(|(p, bind)| (p.display().to_string(), bind)).collect();
    let point = |at: &str, bind| (at.to_owned(), bind);
    assert_eq!(
        points,
        [
            point("/dev", None),
            point("/etc/hosts", Some(0)),
            point("/etc/hosts2", Some(1)),
            point("/m", Some(2))
        ]
    );
}

#[test]
fn a_bind_follows_the_host_unless_it_is_private() {
    for (word, follows) in [("rslave", true), ("slave", true), ("rprivate", false), ("private", false)] {
        assert_eq!(with_bind(&["rbind", word]).binds[0].follows_host, follows, "{word}");
    }
    // As runc has it.
    assert!(with_bind(&["rbind"]).binds[0].follows_host);
}

#[test]
fn what_a_machine_cannot_give_is_refused_by_name() {
    let without = |kind: &'static str| {
        move |s: &mut Value| {
            let namespaces = s["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|n| n["type"] != kind);
        }
    };
    assert!(refusal(without("network")).contains("hostNetwork"));
    assert!(refusal(without("pid")).contains("hostPID"));
    assert!(refusal(without("ipc")).contains("hostIPC"));
    assert!(
        refusal(|s| s["linux"]["namespaces"][1]["path"] = json!("/proc/1/ns/ipc")).contains("/proc/1/ns/ipc")
    );
    assert!(refusal(|s| s["linux"]["rootfsPropagation"] = json!("rshared")).contains("rootfsPropagation"));
    assert!(refusal(|s| s["mounts"][0]["type"] = json!("nfs")).contains("nfs"));
    assert!(
        refusal(|s| s["mounts"][0] =
            json!({"destination": "/m", "type": "bind", "source": "/", "options": ["rbind", "rshared"]}))
        .contains("/m")
    );
    let device = |s: &mut Value| {
        s["linux"]["devices"] = json!([{"path": "/dev/x", "type": "c", "major": 8, "minor": 0}]);
    };
    assert!(refusal(device).contains("/dev/x (character 8:0)"));
    assert!(refusal(|s| s["hooks"] = json!({"createContainer": [{"path": "/hook"}]})).contains("/hook"));
}

#[test]
fn block_devices_are_disks_and_writable_if_a_rule_says_so() {
    let disk = |access: &'static str| {
        let plan = container(
            &id(),
            spec(|s| {
                s["linux"]["devices"] = json!([{"path": "/dev/x", "type": "b", "major": 8, "minor": 1}]);
                s["linux"]["resources"] = json!({"devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "b", "major": 8, "minor": 1, "access": access},
                    {"allow": true, "type": "b", "major": 8, "minor": 2, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 8, "minor": 1, "access": "rwm"},
                ]});
            }),
        )
        .unwrap();
        assert_eq!(plan.guest_spec.linux().as_ref().unwrap().devices().as_ref().unwrap().len(), 1);
        plan.disks.into_iter().next().unwrap()
    };
    let wanted = Disk { major: 8, minor: 1, path: "/dev/x".into(), read_only: false };
    assert_eq!(disk("rwm"), wanted);
    assert_eq!(disk("rm"), Disk { read_only: true, ..wanted });
}

#[test]
fn a_spec_without_a_process_or_root_says_so() {
    assert!(refusal(|s| drop(s.as_object_mut().unwrap().remove("process"))).contains("process"));
    assert!(refusal(|s| drop(s.as_object_mut().unwrap().remove("root"))).contains("root"));
    assert!(refusal(|s| s["process"]["args"] = json!([])).contains("no command"));
}

#[test]
fn a_privileged_container_gets_none_of_the_hosts_devices() {
    let plan = container(
        &id(),
        spec(|s| {
            s["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
            s["linux"]["devices"] = json!([
                {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}
            ]);
        }),
    )
    .unwrap();
    let devices = plan.guest_spec.linux().as_ref().unwrap().devices().clone().unwrap();
    assert_eq!(devices.len(), 1);
    assert_eq!(devices[0].minor(), 229);
}

#[test]
fn hooks_of_the_runtime_stay_on_the_host() {
    let plan = container(
        &id(),
        spec(|s| {
            s["hooks"] = json!({
                "prestart": [{"path": "/pre"}],
                "createRuntime": [{"path": "/create"}],
                "startContainer": [{"path": "/in"}],
                "poststart": [{"path": "/after"}]
            });
        }),
    )
    .unwrap();
    let paths: Vec<_> = plan.hooks.create.iter().map(|h| h.path().display().to_string()).collect();
    assert_eq!(paths, ["/pre", "/create"]);
    assert_eq!(plan.hooks.poststart.len(), 1);
    let kept = plan.guest_spec.hooks().clone().unwrap();
    assert!(kept.create_runtime().is_none() && kept.start_container().is_some());
}

fn sized(change: impl FnOnce(&mut Value)) -> Sizing {
    let mut config = Config::default();
    config.sandbox.memory_mib = 1024;
    config.sandbox.memory_reserve_mib = 100;
    machine(&config, &spec(change), &HostFacts { cpus: 4, memory: SizeMib(8192) }).unwrap()
}

#[test]
fn the_reserve_comes_on_top_of_the_limit() {
    let default = sized(|_| {});
    assert_eq!((default.vcpus, default.memory, default.reserve), (1, SizeMib(1124), SizeMib(100)));
    let limited = sized(|s| s["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}}));
    assert_eq!(limited.memory, SizeMib(164));
    let odd = sized(|s| s["linux"]["resources"] = json!({"memory": {"limit": (64 << 20) + 1}}));
    assert_eq!(odd.memory, SizeMib(166), "whole 2 MiB pages");
}

#[test]
fn the_kernels_tables_fit_a_small_machine_and_grow_with_it() {
    let words = |memory| Sizing { memory: SizeMib(memory), ..sized(|_| {}) }.kernel_words();
    assert_eq!(
        words(1152),
        "dhash_entries=32768 ihash_entries=16384 thash_entries=8192 nf_conntrack.hashsize=8192 slab_max_order=0"
    );
    assert_eq!(
        words(64),
        "dhash_entries=2048 ihash_entries=1024 thash_entries=512 nf_conntrack.hashsize=128 slab_max_order=0"
    );
    assert_eq!(
        words(65_536),
        "dhash_entries=2097152 ihash_entries=1048576 thash_entries=524288 nf_conntrack.hashsize=32768"
    );
}

#[test]
fn processors_follow_the_quota_up_to_what_the_host_has() {
    let cpus = |quota: i64| {
        sized(move |s| s["linux"]["resources"] = json!({"cpu": {"quota": quota, "period": 100_000}})).vcpus
    };
    assert_eq!((cpus(50_000), cpus(150_000), cpus(9_900_000), cpus(-1)), (1, 2, 4, 1));
}

#[test]
fn a_pod_is_sized_by_the_sums_that_containerd_states() {
    let pod = sized(|s| {
        s["annotations"] = json!({
            "io.kubernetes.cri.sandbox-memory": "268435456",
            "io.kubernetes.cri.sandbox-cpu-quota": "250000",
            "io.kubernetes.cri.sandbox-cpu-period": "100000"
        });
    });
    assert_eq!((pod.vcpus, pod.memory), (3, SizeMib(356)));
    assert_eq!(pod.stated, Limits { memory: Some(256 << 20), cpu_millis: Some(2500) });
}

#[test]
fn users_of_a_pod_are_those_of_its_first_spec_and_its_members_join_them() {
    use oci_spec::runtime::LinuxNamespaceType;

    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let with_users = |namespace: Value, kind: Option<&'static str>| {
        let map = map.clone();
        spec(move |s| {
            s["linux"]["namespaces"].as_array_mut().unwrap().push(namespace);
            s["linux"]["uidMappings"] = map.clone();
            s["linux"]["gidMappings"] = map.clone();
            let bind = json!({
                "destination": "/v", "type": "bind", "source": "/host/v", "options": ["rbind", "idmap"],
                "uidMappings": map, "gidMappings": map,
            });
            s["mounts"].as_array_mut().unwrap().push(bind);
            if let Some(kind) = kind {
                s["annotations"] = json!({"io.kubernetes.cri.container-type": kind});
            }
        })
    };
    let path = json!({"type": "user", "path": "/proc/9/ns/user"});
    let sandbox = container(&id(), with_users(path.clone(), Some("sandbox"))).unwrap();
    assert_eq!(sandbox.users.as_ref().unwrap().root(), (100_000, 100_000));
    let member = container(&id(), with_users(path.clone(), Some("container"))).unwrap();
    let namespaces = member.guest_spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
    let user = namespaces.iter().find(|n| n.typ() == LinuxNamespaceType::User).unwrap();
    assert_eq!(user.path().as_deref(), Some(std::path::Path::new("/run/bulkhead/ns/user")));
    assert_eq!(member.binds[0].owners, sandbox.users.clone().map(|users| (users, false)));
    let mount = member.guest_spec.mounts().as_ref().unwrap().last().unwrap().clone();
    assert_eq!((mount.options().clone(), mount.uid_mappings()), (Some(vec!["rbind".to_owned()]), &None));
    let alone = container(&id(), with_users(path, None)).unwrap_err().message;
    assert!(alone.contains("joining the user namespace /proc/9/ns/user"), "{alone}");
    let said = refusal(|s| {
        let mounts = s["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/t", "type": "tmpfs", "uidMappings": map, "gidMappings": map}));
    });
    assert!(said.contains("\"tmpfs\" at /t with mapped ids"), "{said}");
}
