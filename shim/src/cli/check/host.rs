//! Facts about the machine: processor, kernel, memory, cgroups, the state directory.

use std::path::Path;

use bulkhead_hypervisor::probe::{self, Acceleration};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, FsType, TMPFS_MAGIC, statfs};
use nix::unistd::{AccessFlags, access, geteuid};

use super::super::output;
use super::Fact;
use crate::config::{Backend, Config};

pub(super) fn privileges() -> Fact {
    if geteuid().is_root() {
        return Fact::ok("privileges", "root");
    }
    Fact::warning("privileges", "not root: some facts cannot be found out", "run `sudo bulkhead check`")
}

pub(super) fn processor() -> Fact {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let count = text.lines().filter(|line| line.starts_with("processor")).count();
    let model =
        text.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
    let model = model.map_or("unknown model", |(_, model)| model.trim());
    match probe::virtualisation_flag() {
        Some(flag) => Fact::ok("processor", format!("{count} x {model}, virtualises ({flag})")),
        None => Fact::warning(
            "processor",
            format!("{count} x {model}, shows neither vmx nor svm"),
            "enable virtualisation in the firmware, or nested virtualisation on the machine around this one",
        ),
    }
}

pub(super) fn kvm(acceleration: &Acceleration) -> Fact {
    match acceleration {
        Acceleration::Hardware { how } => Fact::ok("kvm", how.clone()),
        Acceleration::Emulated { why } => Fact::warning(
            "kvm",
            why.clone(),
            "emulation runs everything, only slower; for speed use a machine whose processor virtualises",
        ),
    }
}

/// Which machine the shim would choose.
pub(super) fn backend(configured: Backend, acceleration: &Acceleration) -> Fact {
    const NAME: &str = "backend";
    match (configured, acceleration) {
        (Backend::Kvm, Acceleration::Hardware { .. }) => Fact::ok(NAME, "kvm, as configured"),
        (Backend::Kvm, Acceleration::Emulated { .. }) => Fact::failure(
            NAME,
            "`hypervisor.backend` asks for kvm, and this machine does not virtualise",
            "set the key to \"auto\" or \"emulation\"",
        ),
        (Backend::Emulation, _) => Fact::ok(NAME, "emulation, as configured"),
        (Backend::Auto, Acceleration::Emulated { .. }) => Fact::ok(NAME, "auto: emulation"),
        (Backend::Auto, Acceleration::Hardware { .. }) => Fact::ok(NAME, "auto: kvm"),
    }
}

pub(super) fn cgroups() -> Fact {
    let kind = |path: &str| statfs(path).ok().map(|fs| fs.filesystem_type());
    cgroup_mode(kind("/sys/fs/cgroup"), kind("/sys/fs/cgroup/unified"))
}

fn cgroup_mode(root: Option<FsType>, unified: Option<FsType>) -> Fact {
    const NAME: &str = "cgroups";
    const REMEDY: &str =
        "boot with `systemd.unified_cgroup_hierarchy=1` for Kubernetes, whose newer kubelets refuse v1";
    match (root, unified) {
        (Some(CGROUP2_SUPER_MAGIC), _) => Fact::ok(NAME, "v2"),
        (_, Some(CGROUP2_SUPER_MAGIC)) => {
            Fact::warning(NAME, "v1, with an empty v2 hierarchy beside it", REMEDY)
        }
        (Some(TMPFS_MAGIC), _) => Fact::warning(NAME, "v1", REMEDY),
        _ => Fact::warning(NAME, "/sys/fs/cgroup is no cgroup hierarchy", "mount cgroup2 at /sys/fs/cgroup"),
    }
}

/// The release of the running kernel.
pub(in super::super) fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim_end().to_owned()
}

/// A feature of the host's kernel.
struct Feature {
    name: &'static str,
    present: bool,
    /// Who misses it.
    used_by: &'static str,
}

pub(super) fn kernel() -> Fact {
    let release = release();
    let file_systems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let listed = std::fs::read_to_string(format!("/lib/modules/{release}/modules.dep")).unwrap_or_default();
    let symbols = std::fs::read_to_string("/proc/kallsyms").unwrap_or_default();
    // Loaded or built in (seen by a function of it), or loadable on demand.
    let module = |name: &str, function: &str| {
        listed.contains(&format!("/{name}.ko"))
            || symbols.lines().any(|line| line.split_whitespace().nth(2) == Some(function))
    };
    let file_system = |name: &str| {
        file_systems.split_whitespace().any(|word| word == name) || listed.contains(&format!("/{name}.ko"))
    };
    let feature = |name, present, used_by| Feature { name, present, used_by };
    kernel_of(
        &release,
        &[
            feature("overlay", file_system("overlay"), "containerd's usual snapshotter"),
            feature("fuse", file_system("fuse"), "snapshotters that fetch on demand"),
            feature("tun", Path::new("/dev/net/tun").exists(), "networks of pods"),
            feature("bridge", module("bridge", "br_dev_xmit"), "the usual CNI networks"),
            feature("veth", module("veth", "veth_xmit"), "the usual CNI networks"),
        ],
    )
}

fn kernel_of(release: &str, features: &[Feature]) -> Fact {
    let names = |present| {
        let names: Vec<_> = features.iter().filter(|f| f.present == present).map(|f| f.name).collect();
        names.join(", ")
    };
    let detail = format!("Linux {release} with {}", names(true));
    let missing: Vec<_> =
        features.iter().filter(|f| !f.present).map(|f| format!("{} ({})", f.name, f.used_by)).collect();
    if missing.is_empty() {
        return Fact::ok("host-kernel", detail);
    }
    let detail = format!("{detail}; without {}", missing.join(", "));
    Fact::warning(
        "host-kernel",
        detail,
        format!("load or build in what you need: `modprobe {}`", names(false).replace(", ", " ")),
    )
}

pub(super) fn memory(config: &Config) -> Fact {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let one_pod = config.sandbox.memory_mib + config.sandbox.memory_reserve_mib;
    memory_of(kib("MemAvailable:").unwrap_or(0) << 10, one_pod)
}

fn memory_of(available: u64, pod_mib: u64) -> Fact {
    let detail =
        format!("{} available; a pod without a limit may come to use {pod_mib} MiB", output::mib(available));
    if available >> 20 >= pod_mib {
        return Fact::ok("memory", detail);
    }
    Fact::warning("memory", detail, "give pods a memory limit, or lower `sandbox.memory_mib`")
}

pub(super) fn huge_pages() -> Fact {
    let shmem =
        std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let reserved = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages");
    huge_pages_of(&shmem, reserved.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0))
}

fn huge_pages_of(shmem: &str, reserved: u64) -> Fact {
    const NAME: &str = "huge-pages";
    let mode = shmem.split(['[', ']']).nth(1).unwrap_or("absent");
    let detail = format!("shmem_enabled is {mode}, {reserved} pages of 2 MiB reserved");
    if ["always", "within_size", "advise", "force"].contains(&mode) || reserved > 0 {
        return Fact::ok(NAME, detail);
    }
    Fact::warning(
        NAME,
        format!("{detail}: the memory of guests is in pages of 4 KiB, which costs time at boot"),
        "`echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled`",
    )
}

pub(super) fn state_dir(path: &Path) -> Fact {
    const NAME: &str = "state-directory";
    let shown = path.display();
    let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    if !existing.is_dir() {
        let detail = format!("{shown}: {} is not a directory", existing.display());
        return Fact::failure(NAME, detail, "name another by `state_dir`");
    }
    if let Err(error) = access(existing, AccessFlags::W_OK | AccessFlags::X_OK) {
        let detail = format!("{shown}: {} cannot be written: {}", existing.display(), error.desc());
        return Fact::failure(NAME, detail, "name another by `state_dir`, or run as root");
    }
    if existing != path {
        return Fact::ok(NAME, format!("{shown}, made by the first pod"));
    }
    Fact::ok(NAME, format!("{shown}"))
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn emulated() -> Acceleration {
        Acceleration::Emulated { why: "why".into() }
    }

    fn hardware() -> Acceleration {
        Acceleration::Hardware { how: "how".into() }
    }

    #[test]
    fn the_backend_is_what_the_shim_would_choose() {
        assert_eq!(backend(Backend::Kvm, &hardware()).status, Status::Ok);
        assert_eq!(backend(Backend::Kvm, &emulated()).status, Status::Failure);
        assert_eq!(backend(Backend::Auto, &emulated()).detail, "auto: emulation");
        assert_eq!(backend(Backend::Auto, &hardware()).detail, "auto: kvm");
        assert_eq!(backend(Backend::Emulation, &hardware()).status, Status::Ok);
        assert_eq!(kvm(&emulated()).status, Status::Warning);
        assert_eq!(kvm(&hardware()).status, Status::Ok);
    }

    #[test]
    fn cgroup_modes_are_told_apart() {
        assert_eq!(cgroup_mode(Some(CGROUP2_SUPER_MAGIC), None).detail, "v2");
        assert_eq!(cgroup_mode(Some(TMPFS_MAGIC), None).detail, "v1");
        assert!(
            cgroup_mode(Some(TMPFS_MAGIC), Some(CGROUP2_SUPER_MAGIC))
                .detail
                .starts_with("v1, with an empty v2")
        );
        assert!(cgroup_mode(None, None).detail.contains("no cgroup hierarchy"));
    }

    #[test]
    fn a_missing_feature_says_who_misses_it() {
        let feature = |name, present| Feature { name, present, used_by: "someone" };
        let fact = kernel_of("6.1", &[feature("a", true), feature("b", false)]);
        assert_eq!(
            (fact.status, fact.detail.as_str()),
            (Status::Warning, "Linux 6.1 with a; without b (someone)")
        );
        assert_eq!(kernel_of("6.1", &[feature("a", true)]).status, Status::Ok);
    }

    #[test]
    fn little_memory_is_a_warning() {
        assert_eq!(memory_of(1 << 30, 2176).status, Status::Warning);
        assert_eq!(memory_of(4 << 30, 2176).status, Status::Ok);
    }

    #[test]
    fn huge_pages_need_a_mode_or_a_reserve() {
        assert_eq!(huge_pages_of("always within_size advise [never] deny force", 0).status, Status::Warning);
        assert_eq!(huge_pages_of("always within_size advise [never] deny force", 1).status, Status::Ok);
        assert_eq!(huge_pages_of("always [within_size] advise never deny force", 0).status, Status::Ok);
        assert!(huge_pages_of("", 0).detail.starts_with("shmem_enabled is absent"));
    }

    #[test]
    fn a_state_directory_may_not_exist_yet_but_must_be_possible() {
        let folder = tempfile::tempdir().unwrap();
        assert!(state_dir(&folder.path().join("a/b")).detail.ends_with("made by the first pod"));
        assert_eq!(state_dir(folder.path()).status, Status::Ok);
        std::fs::write(folder.path().join("file"), "").unwrap();
        let fact = state_dir(&folder.path().join("file/below"));
        assert_eq!(fact.status, Status::Failure);
        assert!(fact.detail.ends_with("/file is not a directory"), "{}", fact.detail);
    }
}
