use std::collections::{BTreeSet, HashMap};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use protobuf::CodedOutputStream;
use protobuf::well_known_types::any::Any;

use super::*;

fn message(text: &str) -> String {
    Config::parse(text, "c.toml").expect_err("must be refused").to_string()
}

fn annotated(allowed: &[&str], name: &str, value: &str) -> Result<Config, ConfigError> {
    let mut config = Config::default();
    config.annotations.allowed = allowed.iter().map(|key| key.to_string()).collect();
    config
        .with_annotations(&HashMap::from([(name.to_owned(), value.to_owned()), ("other".into(), "x".into())]))
}

fn options(type_url: &str, path: &str, body: &str) -> Any {
    let mut value = Vec::new();
    let mut out = CodedOutputStream::vec(&mut value);
    out.write_string(1, "some.Type").unwrap();
    if !path.is_empty() {
        out.write_string(2, path).unwrap();
    }
    out.write_bytes(3, body.as_bytes()).unwrap();
    out.flush().unwrap();
    drop(out);
    Any { type_url: type_url.into(), value, ..Default::default() }
}

/// Every key with a value, as the structs have them.
fn flattened(config: &Config) -> BTreeSet<String> {
    let table = toml::Table::try_from(config).unwrap();
    let mut names = BTreeSet::new();
    for (name, value) in table {
        match value {
            toml::Value::Table(section) => names.extend(section.keys().map(|key| format!("{name}.{key}"))),
            _ => drop(names.insert(name)),
        }
    }
    names
}

#[test]
fn the_table_of_keys_is_the_structs() {
    let config = Config { trace_file: Some("/t".into()), ..Config::default() };
    assert_eq!(flattened(&config), KEYS.iter().map(|key| key.name.to_owned()).collect());
}

#[test]
fn an_empty_file_is_the_defaults() {
    assert_eq!(Config::parse("", "c.toml").unwrap(), Config::default());
}

#[test]
fn the_defaults_pass_their_own_checks() {
    let text = toml::to_string(&Config::default()).unwrap();
    assert_eq!(Config::parse(&text, "c.toml").unwrap(), Config::default());
}

#[test]
fn values_are_read() {
    let config = Config::parse(
        "state_dir = \"/s\"\ntrace_file = \"/t\"\nhypervisor.backend = \"emulation\"\n[sandbox]\nvcpus = 3\n",
        "c.toml",
    )
    .unwrap();
    assert_eq!(config.state_dir, Path::new("/s"));
    assert_eq!(config.trace_file, Some("/t".into()));
    assert_eq!(config.hypervisor.backend, Backend::Emulation);
    assert_eq!(config.sandbox, Sandbox { vcpus: 3, ..Sandbox::default() });
}

#[test]
fn paths_of_sockets_are_read_or_refused_one_by_one() {
    let config = Config::parse("volumes.host_sockets = [\"/run/a\", \"/run/*.sock\"]", "c.toml").unwrap();
    let again = Config::parse(&toml::to_string(&config).unwrap(), "c.toml").unwrap();
    assert_eq!((config.volumes.host_sockets.len(), &again), (2, &config));
    assert_eq!(
        message("volumes.host_sockets = [\"/run/a\", \"run/b\"]"),
        "c.toml:1:24: `volumes.host_sockets` is [\"/run/a\", \"run/b\"], but must be a list of paths; `run/b` is not absolute"
    );
    assert_eq!(
        message("volumes.host_sockets = [1]"),
        "c.toml:1:24: `volumes.host_sockets` must be a list of paths, such as [\"/run/app/*.sock\"], not a list that holds an integer"
    );
    let error = annotated(&[], "io.bulkhead.volumes.host_sockets", "/run/a").unwrap_err().to_string();
    assert!(error.contains("belongs to the host"), "{error}");
}

#[test]
fn an_unknown_key_names_the_nearest() {
    assert_eq!(
        message("[sandbox]\n  memry_mib = 5\n"),
        "c.toml:2:3: unknown key `sandbox.memry_mib`; did you mean `sandbox.memory_mib`?"
    );
    assert_eq!(message("stat_dir = 1"), "c.toml:1:1: unknown key `stat_dir`; did you mean `state_dir`?");
    assert_eq!(
        message("# é\n[sandbx]\nvcpus = 1"),
        "c.toml:2:2: unknown key `sandbx`; did you mean `[sandbox]`?"
    );
}

#[test]
fn a_key_in_the_wrong_section_names_the_right_one() {
    assert_eq!(message("qemu = \"q\""), "c.toml:1:1: unknown key `qemu`; did you mean `hypervisor.qemu`?");
    assert_eq!(
        message("[agent]\nmemory_mib = 1"),
        "c.toml:2:1: unknown key `agent.memory_mib`; did you mean `sandbox.memory_mib`?"
    );
}

#[test]
fn a_key_like_no_other_lists_what_there_is() {
    assert_eq!(
        message("[agent]\ncolour = 1"),
        "c.toml:2:1: unknown key `agent.colour`; `[agent]` has `request_timeout_seconds`, `debug_exec`"
    );
    assert_eq!(
        message("[zzzzzzzzzzzz]\na = 1"),
        "c.toml:1:2: unknown key `zzzzzzzzzzzz`; \
         the sections are `[hypervisor]`, `[sandbox]`, `[network]`, `[storage]`, `[agent]`, `[volumes]`, `[annotations]`"
    );
}

#[test]
fn the_first_of_several_mistakes_is_reported() {
    assert!(message("zzz = 1\naaa = 2").starts_with("c.toml:1:1: unknown key `zzz`"));
}

#[test]
fn a_wrong_type_says_what_is_expected() {
    assert_eq!(
        message("[sandbox]\nmemory_mib = \"2G\""),
        "c.toml:2:14: `sandbox.memory_mib` must be a whole number from 1 to 16777216, not a string"
    );
    assert_eq!(
        message("log_level = 3"),
        "c.toml:1:13: `log_level` must be one of \"off\", \"error\", \"warn\", \"info\", \"debug\", \"trace\", not an integer"
    );
    assert_eq!(
        message("sandbox = 3"),
        "c.toml:1:11: `sandbox` must be a section, written `[sandbox]`, not an integer"
    );
    assert_eq!(
        message("[state_dir]\na = 1"),
        "c.toml:1:1: `state_dir` must be an absolute path of at most 68 bytes as a string, not a section"
    );
    assert!(message("[annotations]\nallowed = [1]").contains("not a list that holds an integer"));
}

#[test]
fn a_value_out_of_range_says_the_range() {
    assert_eq!(
        message("[sandbox]\nvcpus = 0"),
        "c.toml:2:9: `sandbox.vcpus` is 0, but must be a whole number from 1 to 255"
    );
    assert_eq!(
        message("sandbox.vcpus = -1"),
        "c.toml:1:17: `sandbox.vcpus` is -1, but must be a whole number from 1 to 255"
    );
    assert!(
        message("sandbox.vcpus = 99999999999999999999")
            .starts_with("c.toml:1:17: `sandbox.vcpus` is 99999999999999999999")
    );
    assert_eq!(
        message("[hypervisor]\nbackend = \"xen\""),
        "c.toml:2:11: `hypervisor.backend` is \"xen\", but must be one of \"auto\", \"kvm\", \"emulation\""
    );
    assert_eq!(
        message("[hypervisor]\nkernel = \"vmlinux\""),
        "c.toml:2:10: `hypervisor.kernel` is \"vmlinux\", but must be an absolute path as a string"
    );
    assert!(
        message("[hypervisor]\nqemu = \"./q\"").contains("must be an absolute path or the name of a program")
    );
    assert!(message(&format!("state_dir = \"/{}\"", "x".repeat(68))).contains("at most 68 bytes"));
}

#[test]
fn too_little_memory_states_the_figure() {
    assert_eq!(
        message("[sandbox]\nmemory_mib = 16\nmemory_reserve_mib = 0"),
        "c.toml: `sandbox.memory_mib` and `sandbox.memory_reserve_mib` make 16 MiB together, \
         but the guest needs at least 64 MiB to boot"
    );
}

#[test]
fn broken_toml_has_a_place() {
    assert!(message("a = 1\nb = \n").starts_with("c.toml:2:"), "{}", message("a = 1\nb = \n"));
    assert!(
        message("a = 1\na = 2\n").starts_with("c.toml:2:1: not valid TOML: duplicate key"),
        "{}",
        message("a = 1\na = 2\n")
    );
}

#[test]
fn an_allowed_list_holds_only_keys_of_pods() {
    let text = message("[annotations]\nallowed = [\"sandbox.vcpu\"]");
    assert!(text.contains("there is no key `sandbox.vcpu`: did you mean `sandbox.vcpus`?"), "{text}");
    let text = message("[annotations]\nallowed = [\"state_dir\"]");
    assert!(text.contains("`state_dir` belongs to the host alone"), "{text}");
}

#[test]
fn an_unreadable_file_says_who_named_it() {
    let error = Config::load(Some(Path::new("/nonexistent/c.toml"))).unwrap_err();
    assert_eq!(error.to_string(), "cannot read the configuration /nonexistent/c.toml (named by the caller)");
    assert!(std::error::Error::source(&error).is_some());
    let error = Config::load_from(&Source::Environment("/nonexistent".into())).unwrap_err();
    assert!(error.to_string().contains("environment variable BULKHEAD_CONFIG"));
}

#[test]
fn a_table_of_runtime_options_is_laid_over() {
    let base = Config::parse("log_level = \"debug\"\nsandbox.vcpus = 2", "c.toml").unwrap();
    let body = "TypeUrl = \"runtimeoptions.v1.Options\"\nConfigPath = \"\"\n[sandbox]\nmemory_mib = 512\n";
    let config =
        base.with_runtime_options(&options("types.example/runtimeoptions.v1.Options", "", body)).unwrap();
    assert_eq!(
        (config.sandbox.memory_mib, config.sandbox.vcpus, config.log_level.as_str()),
        (512, 2, "debug")
    );
}

#[test]
fn a_path_in_runtime_options_replaces_what_was_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("other.toml");
    std::fs::write(&file, "sandbox.memory_mib = 256").unwrap();
    let base = Config::parse("sandbox.vcpus = 2", "c.toml").unwrap();
    let any = options("runtimeoptions.v1.Options", file.to_str().unwrap(), "nonsense");
    let config = base.with_runtime_options(&any).unwrap();
    assert_eq!(config.sandbox, Sandbox { memory_mib: 256, ..Sandbox::default() });
}

#[test]
fn bad_runtime_options_are_refused() {
    let with = |any: &Any| Config::default().with_runtime_options(any).unwrap_err().to_string();
    assert_eq!(
        with(&options("runtimeoptions.v1.Options", "", "vcpus = 1")),
        "runtime options of containerd:1:1: unknown key `vcpus`; did you mean `sandbox.vcpus`?"
    );
    let torn =
        Any { type_url: "runtimeoptions.v1.Options".into(), value: vec![0x1a, 9, 1], ..Default::default() };
    assert!(
        with(&torn).starts_with(
            "containerd's runtime options of type `runtimeoptions.v1.Options` cannot be decoded"
        )
    );
}

#[test]
fn options_of_other_runtimes_change_nothing() {
    let any =
        Any { type_url: "containerd.runc.v1.Options".into(), value: vec![0xff; 9], ..Default::default() };
    assert_eq!(Config::default().with_runtime_options(&any).unwrap(), Config::default());
    assert_eq!(Config::default().with_runtime_options(&Any::new()).unwrap(), Config::default());
}

#[test]
fn an_allowed_annotation_is_laid_over() {
    let config = annotated(&["sandbox.memory_mib"], "io.bulkhead.sandbox.memory_mib", "777").unwrap();
    assert_eq!(config.sandbox, Sandbox { memory_mib: 777, ..Sandbox::default() });
    let config = annotated(&["hypervisor.backend"], "io.bulkhead.hypervisor.backend", "kvm").unwrap();
    assert_eq!(config.hypervisor.backend, Backend::Kvm);
    let config = annotated(&["log_level"], "io.bulkhead.log_level", "trace").unwrap();
    assert_eq!(config.log_level, "trace");
}

#[test]
fn an_annotation_that_is_not_allowed_names_the_key_to_change() {
    assert_eq!(
        annotated(&[], "io.bulkhead.sandbox.vcpus", "2").unwrap_err().to_string(),
        "annotation `io.bulkhead.sandbox.vcpus`: the administrator does not allow it; \
         add \"sandbox.vcpus\" to the key `annotations.allowed` of the configuration to allow it"
    );
}

#[test]
fn an_unknown_annotation_names_the_nearest() {
    assert_eq!(
        annotated(&["sandbox.vcpus"], "io.bulkhead.sandbox.vcpu", "2").unwrap_err().to_string(),
        "annotation `io.bulkhead.sandbox.vcpu`: no such key; did you mean `io.bulkhead.sandbox.vcpus`?"
    );
    let text = annotated(&[], "io.bulkhead.completely.different", "2").unwrap_err().to_string();
    assert!(text.contains("there are `io.bulkhead.log_level`, "), "{text}");
    assert!(!text.contains("state_dir"), "{text}");
    let text = annotated(&[], "io.bulkhead.state_dir", "/x").unwrap_err().to_string();
    assert!(text.contains("`state_dir` belongs to the host; no pod can set it"), "{text}");
}

#[test]
fn a_bad_value_in_an_annotation_names_the_annotation() {
    assert_eq!(
        annotated(&["sandbox.vcpus"], "io.bulkhead.sandbox.vcpus", "two").unwrap_err().to_string(),
        "annotation `io.bulkhead.sandbox.vcpus`: `sandbox.vcpus` must be a whole number from 1 to 255, not \"two\""
    );
    assert!(annotated(&["sandbox.vcpus"], "io.bulkhead.sandbox.vcpus", "0").is_err());
}

#[test]
fn a_missing_program_says_where_it_was_sought_and_what_to_do() {
    let config =
        Config::parse("[hypervisor]\nqemu = \"no-such-qemu\"\nvirtiofsd = \"/nonexistent/v\"", "c").unwrap();
    let text = config.resolve_qemu().unwrap_err().to_string();
    assert!(text.starts_with("no-such-qemu (key `hypervisor.qemu`): is neither on PATH nor in "), "{text}");
    assert!(text.contains("/usr/libexec/bulkhead"), "{text}");
    assert!(
        text.ends_with("install the package qemu-system-x86 (`apt-get install qemu-system-x86`)"),
        "{text}"
    );
    assert_eq!(
        config.resolve_virtiofsd().unwrap_err().to_string(),
        "/nonexistent/v (key `hypervisor.virtiofsd`): does not exist; \
         `make parts` builds it; an installed one is named by the key"
    );
}

#[test]
fn programs_are_found_on_path_then_beside_us() {
    let (on_path, beside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let find = || {
        let path = on_path.path().as_os_str();
        files::resolve_in(Path::new("prog"), "hypervisor.qemu", "advice", path, Some(beside.path()))
    };
    let put = |folder: &Path, mode| {
        let file = folder.join("prog");
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        file
    };
    let refused = put(on_path.path(), 0o644);
    assert_eq!(
        find().unwrap_err().to_string(),
        format!("prog (key `hypervisor.qemu`): {} is not executable; advice", refused.display())
    );
    let second = put(beside.path(), 0o755);
    assert_eq!(find().unwrap(), second);
    let first = put(on_path.path(), 0o755);
    assert_eq!(find().unwrap(), first);
}

fn guest(kernel: &[u8], image: &[u8]) -> Result<GuestFiles, String> {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.hypervisor.kernel = folder.path().join("kernel");
    config.hypervisor.image = folder.path().join("image");
    std::fs::write(&config.hypervisor.kernel, kernel).unwrap();
    std::fs::write(&config.hypervisor.image, image).unwrap();
    let hide = |error: ConfigError| error.to_string().replace(folder.path().to_str().unwrap(), "");
    config.resolve_guest().map_err(hide)
}

#[test]
fn the_guest_must_be_an_elf_kernel_and_a_cpio_image() {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(64, 0);
    elf[18] = 62;
    assert!(guest(&elf, b"070701").is_ok());
    assert_eq!(
        guest(&elf, b"\x1f\x8b").unwrap_err(),
        "/image (key `hypervisor.image`): is not an uncompressed cpio archive; \
         give an archive in the format newc (`cpio -H newc -o`), uncompressed"
    );
    assert_eq!(
        guest(b"", b"070701").unwrap_err(),
        "/kernel (key `hypervisor.kernel`): is not an ELF file; give an uncompressed kernel, `vmlinux`"
    );
    elf[18] = 183;
    assert!(guest(&elf, b"070701").unwrap_err().contains("for another processor"));
    let mut compressed = vec![0; 0x202];
    compressed.extend(b"HdrS");
    assert!(guest(&compressed, b"").unwrap_err().contains("compressed kernel image (bzImage)"));
}

#[test]
fn a_missing_guest_names_path_key_and_remedy() {
    let mut config = Config::default();
    config.hypervisor.kernel = PathBuf::from("/nonexistent/vmlinux");
    assert_eq!(
        config.resolve_kernel().unwrap_err().to_string(),
        "/nonexistent/vmlinux (key `hypervisor.kernel`): does not exist; `make kernel` builds one, or name your own by the key"
    );
}

const FILE: &str = include_str!("../../../configs/config.toml");

/// The shipped file with the keys that have no default set too.
fn shipped_with_everything() -> String {
    FILE.lines()
        .map(|line| if line.starts_with("#trace_file") { &line[1..] } else { line }.to_owned() + "\n")
        .collect()
}

#[test]
fn the_shipped_file_states_the_defaults() {
    assert_eq!(Config::parse(FILE, "configs/config.toml").unwrap(), Config::default());
}

#[test]
fn the_shipped_file_states_every_key_and_explains_it() {
    let text = shipped_with_everything();
    let stated: toml::Table = toml::from_str(&text).unwrap();
    let has = |name: &str| match name.split_once('.') {
        None => stated.contains_key(name),
        Some((section, key)) => stated.get(section).is_some_and(|section| section.get(key).is_some()),
    };
    let missing: Vec<_> = KEYS.iter().map(|key| key.name).filter(|name| !has(name)).collect();
    assert!(missing.is_empty(), "configs/config.toml lacks {missing:?}");
    Config::parse(&text, "configs/config.toml").unwrap();
    let mut before = "";
    for line in FILE.lines() {
        assert!(
            !(line.contains(" = ") && !line.starts_with('#') && before.is_empty()),
            "{line} has no explanation"
        );
        before = line;
    }
}

#[test]
fn the_drop_ins_register_the_runtime_and_hand_our_annotations_on() {
    let drop_ins = [
        (include_str!("../../../configs/containerd/bulkhead-1.7.toml"), 2, "io.containerd.grpc.v1.cri"),
        (include_str!("../../../configs/containerd/bulkhead-2.toml"), 3, "io.containerd.cri.v1.runtime"),
    ];
    for (text, version, plugin) in drop_ins {
        let table: toml::Table = toml::from_str(text).unwrap();
        assert_eq!(table["version"].as_integer(), Some(version));
        let runtime = &table["plugins"][plugin]["containerd"]["runtimes"]["bulkhead"];
        assert_eq!(runtime["runtime_type"].as_str(), Some("io.containerd.bulkhead.v2"));
        assert_eq!(runtime["pod_annotations"][0].as_str(), Some(format!("{ANNOTATION_PREFIX}*").as_str()));
    }
}

#[test]
fn programs_in_the_guest_are_off_and_no_pod_can_switch_them_on_by_itself() {
    assert!(!Config::default().agent.debug_exec);
    assert!(Config::parse("agent.debug_exec = true", "c.toml").unwrap().agent.debug_exec);
    assert_eq!(
        message("agent.debug_exec = 1"),
        "c.toml:1:20: `agent.debug_exec` must be true or false, not an integer"
    );
    let refused = annotated(&[], "io.bulkhead.agent.debug_exec", "true").unwrap_err().to_string();
    assert!(refused.contains("the administrator does not allow it"), "{refused}");
    let allowed = |value| annotated(&["agent.debug_exec"], "io.bulkhead.agent.debug_exec", value);
    assert!(allowed("true").unwrap().agent.debug_exec);
    assert!(!allowed("false").unwrap().agent.debug_exec);
    let wrong = allowed("yes").unwrap_err().to_string();
    assert!(wrong.ends_with("`agent.debug_exec` must be true or false, not \"yes\""), "{wrong}");
}
