//! From the OCI specification of the host's client to what this guest applies: a pure translation.
//! Knows the specification and a few facts of the guest; must not touch the guest.
//!
//! What the guest cannot honour is refused by the name of its field, never dropped in silence.

use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::{
    Hook, Hooks, Linux, LinuxDevice, LinuxDeviceType, LinuxNamespace, LinuxNamespaceBuilder,
    LinuxNamespaceType, LinuxPersonalityDomain, LinuxResources, LinuxSeccompAction, LinuxThrottleDevice,
    LinuxThrottleDeviceBuilder, Process, Spec,
};

use crate::{
    cgroup,
    disks::Disks,
    error::{Error, Result},
    launcher::{Create, Exec, LastMile, Size, allows_every_device, default_devices},
    memory::Memory,
    podns,
    sockets::Sockets,
    users::Users,
    volumes::Copies,
};

/// What the translation has to know of the guest.
pub(crate) struct Guest<'a> {
    /// Path of the pod's network namespace.
    pub(crate) network: PathBuf,
    /// Where the pod's namespaces lie: paths below are ours, all others the host's.
    pub(crate) namespaces: &'a Path,
    /// Has the guest this device? Kind, major, minor.
    pub(crate) has_device: &'a dyn Fn(LinuxDeviceType, i64, i64) -> bool,
    /// Disks that stand for block devices of the host.
    pub(crate) disks: Disks,
    /// Copies that stand for volumes of the host.
    pub(crate) copies: Option<&'a Copies>,
    /// Volumes in the guest's memory.
    pub(crate) memory: Option<&'a Memory>,
    /// Sockets that stand for those of the host.
    pub(crate) sockets: Option<&'a Sockets>,
    /// Sysctls of the pod that belong to each container's ipc namespace.
    pub(crate) ipc_sysctls: &'a [(String, String)],
    /// The pod's user namespace, if it has one.
    pub(crate) users: Option<&'a Users>,
}

/// Whether the process has a terminal, and of which size: what the host's request says of its streams.
pub(crate) type Terminal = Option<Size>;

/// Translates a container.
pub(crate) fn container(id: &str, spec: &[u8], terminal: Terminal, guest: &Guest<'_>) -> Result<Create> {
    check_id(id)?;
    let mut spec: Spec = serde_json::from_slice(spec).map_err(|e| invalid("the specification", &e))?;
    let mut process = spec.process().clone().ok_or_else(|| missing("process"))?;
    let mut linux = spec.linux().clone().ok_or_else(|| missing("linux"))?;
    let root = spec.root().as_ref().ok_or_else(|| missing("root"))?;
    if !root.path().is_absolute() {
        return Err(refuse("root.path", format!("{} is not absolute", root.path().display())));
    }
    refuse_unsupported(&linux)?;
    spec.set_hooks(hooks(spec.hooks().as_ref())?);

    let mut last_mile = process_of(&mut process, terminal, true)?;
    last_mile.seccomp = linux.seccomp().clone();
    linux.set_seccomp(None);
    last_mile.linux32 = is_32_bits(&linux)?;
    linux.set_personality(None);

    guest.disks.translate(&mut linux);
    if let Some(mut resources) = linux.resources().clone() {
        block_io(&mut resources, &guest.disks)?;
        linux.set_resources(Some(resources));
    }
    let devices = devices(&mut linux, guest)?;
    refuse_sharing(&spec)?;
    mount_instead(&mut spec, |source| guest.copies?.of(source));
    mount_instead(&mut spec, |source| guest.memory?.of(source));
    mount_sockets(&mut spec, guest);
    let users = join_users(&mut linux, &process, guest)?;
    if let Some(propagation) = linux.rootfs_propagation() {
        // libcontainer makes it recursive in any case, and knows the plain names only.
        let plain = propagation.strip_prefix('r').unwrap_or(propagation).to_owned();
        linux.set_rootfs_propagation(Some(plain).filter(|plain| !plain.is_empty()));
    }
    linux.set_cgroups_path(Some(cgroup::oci_path(id)));
    linux.set_namespaces(Some(namespaces(linux.namespaces().as_deref().unwrap_or_default(), guest)?));
    add_sysctls(&mut linux, guest);
    spec.set_process(Some(process)).set_linux(Some(linux));
    Ok(Create { id: id.to_owned(), spec, last_mile, devices, users })
}

/// Translates a further process of a container whose init has the pid `init` and went `of_init`, in the user
/// namespace of `users`.
pub(crate) fn exec(
    init: i32,
    process: &[u8],
    terminal: Terminal,
    of_init: &LastMile,
    users: Option<&Users>,
) -> Result<Exec> {
    let mut process: Process = serde_json::from_slice(process).map_err(|e| invalid("the process", &e))?;
    let mut last_mile = process_of(&mut process, terminal, false)?;
    last_mile.seccomp = of_init.seccomp.clone();
    last_mile.linux32 = of_init.linux32;
    if let Some(users) = users {
        users.check(process.user())?;
    }
    Ok(Exec { init, process, last_mile, users: users.cloned() })
}

/// Reads and checks limits for a container that has `disks`.
pub(crate) fn resources(json: &[u8], disks: &Disks) -> Result<LinuxResources> {
    let mut resources: LinuxResources =
        serde_json::from_slice(json).map_err(|e| invalid("the resources", &e))?;
    refuse_resources(&resources)?;
    block_io(&mut resources, disks)?;
    // Access to devices was settled when the container was made.
    resources.set_devices(None);
    Ok(resources)
}

/// An id becomes a name of directories.
pub(crate) fn check_id(id: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id.starts_with('.') || id.len() > 128 || !id.chars().all(allowed) {
        return Err(Error::Invalid(format!("{id:?} cannot be the id of a container")));
    }
    Ok(())
}

/// What containerd's CRI, nerdctl and Docker ask for in the name of those who ask for nothing, where the host has
/// AppArmor. They guard the kernel and the processes of the host from a container, which has neither here. A profile
/// that somebody chose is something else.
const DEFAULT_PROFILES: [&str; 3] = ["cri-containerd.apparmor.d", "nerdctl-default", "docker-default"];

/// Splits a process into libcontainer's part, which remains, and ours.
fn process_of(process: &mut Process, terminal: Terminal, init: bool) -> Result<LastMile> {
    let args = process.args().clone().unwrap_or_default();
    if args.is_empty() {
        return Err(missing("process.args"));
    }
    if !process.cwd().is_absolute() {
        return Err(refuse("process.cwd", format!("{:?} is not absolute", process.cwd())));
    }
    match process.apparmor_profile().as_deref() {
        None | Some("" | "unconfined") => process.set_apparmor_profile(None),
        Some(profile) if DEFAULT_PROFILES.contains(&profile) => process.set_apparmor_profile(None),
        Some(profile) => {
            return Err(refuse("process.apparmorProfile", format!("the guest has no profile {profile:?}")));
        }
    };
    match process.selinux_label().as_deref() {
        None | Some("") => process.set_selinux_label(None),
        Some(label) => {
            return Err(refuse("process.selinuxLabel", format!("the guest has no SELinux for {label:?}")));
        }
    };
    let last_mile = LastMile {
        init,
        args,
        env: process.env().clone().unwrap_or_default(),
        cwd: process.cwd().clone(),
        uid: process.user().uid(),
        linux32: false,
        capabilities: process.capabilities().clone(),
        seccomp: None,
        no_new_privileges: process.no_new_privileges() == Some(true),
        terminal,
    };
    // The last mile is ours: libcontainer stops with all capabilities, in the root directory. It would look up
    // a missing HOME through NSS, which a static program must not do in somebody else's root.
    let mut env = last_mile.env.clone();
    env.push("HOME=/".into());
    process
        .set_terminal(Some(terminal.is_some()))
        .set_console_size(None)
        .set_capabilities(None)
        .set_cwd("/".into())
        .set_env(Some(env));
    if !last_mile.no_new_privileges {
        process.set_no_new_privileges(None);
    }
    Ok(last_mile)
}

fn is_32_bits(linux: &Linux) -> Result<bool> {
    let Some(personality) = linux.personality() else { return Ok(false) };
    if personality.flags().as_ref().is_some_and(|flags| !flags.is_empty()) {
        return Err(refuse("linux.personality.flags", "the specification knows none".into()));
    }
    Ok(personality.domain() == LinuxPersonalityDomain::PerLinux32)
}

/// Only startContainer runs in the container; the others' programs lie on the host.
fn hooks(hooks: Option<&Hooks>) -> Result<Option<Hooks>> {
    let Some(hooks) = hooks else { return Ok(None) };
    #[allow(deprecated)]
    let of_the_host = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (name, hooks) in of_the_host {
        if let Some(hook) = hooks.iter().flatten().next() {
            let reason =
                format!("{} is a program of the host, the guest cannot run it", hook.path().display());
            return Err(refuse(&format!("hooks.{name}"), reason));
        }
    }
    let start: Vec<Hook> = hooks.start_container().clone().unwrap_or_default();
    if start.is_empty() {
        return Ok(None);
    }
    let mut ours = Hooks::default();
    ours.set_start_container(Some(start));
    Ok(Some(ours))
}

/// Takes from `linux` how its user namespace maps: that is the pod's affair, and must be what the pod has.
fn join_users(linux: &mut Linux, process: &Process, guest: &Guest<'_>) -> Result<Option<Users>> {
    let asked = linux.namespaces().iter().flatten().any(|n| n.typ() == LinuxNamespaceType::User);
    let (uids, gids) = (linux.uid_mappings().clone(), linux.gid_mappings().clone());
    linux.set_uid_mappings(None).set_gid_mappings(None);
    let (uids, gids) = (uids.unwrap_or_default(), gids.unwrap_or_default());
    let Some(users) = guest.users.filter(|_| asked) else {
        return match (asked, uids.is_empty() && gids.is_empty()) {
            (true, _) => Err(refuse("linux.namespaces: user", "the pod has no user namespace".into())),
            (false, false) => Err(refuse("linux.uidMappings", "without a user namespace".into())),
            (false, true) => Ok(None),
        };
    };
    if !users.agree(&uids, &gids) {
        return Err(refuse("linux.uidMappings and gidMappings", "those of the pod are different".into()));
    }
    users.check(process.user())?;
    Ok(Some(users.clone()))
}

/// Every container is in the pod's network namespace and in a cgroup namespace of its own.
fn namespaces(wanted: &[LinuxNamespace], guest: &Guest<'_>) -> Result<Vec<LinuxNamespace>> {
    let (mut namespaces, mut in_users) = (Vec::new(), false);
    for namespace in wanted {
        let typ = namespace.typ();
        let field = format!("linux.namespaces: {typ}");
        let host_path = namespace
            .path()
            .as_ref()
            .filter(|path| !path.as_os_str().is_empty() && !path.starts_with(guest.namespaces));
        match (typ, host_path) {
            (LinuxNamespaceType::Network | LinuxNamespaceType::Cgroup, _) => {}
            (_, Some(path)) => {
                return Err(refuse(&field, format!("{} is a path of the host", path.display())));
            }
            (LinuxNamespaceType::User, None) => in_users = true,
            (_, None) => namespaces.push(namespace.clone()),
        }
    }
    let build = |typ, path: Option<&Path>| {
        let builder = LinuxNamespaceBuilder::default().typ(typ);
        match path {
            Some(path) => builder.path(path),
            None => builder,
        }
        .build()
        .expect("all fields are set or optional")
    };
    namespaces.push(build(LinuxNamespaceType::Network, Some(&guest.network)));
    namespaces.push(build(LinuxNamespaceType::Cgroup, None));
    if in_users {
        namespaces.push(build(LinuxNamespaceType::User, Some(&podns::users())));
    }
    Ok(namespaces)
}

/// Takes the rules out of `linux`, and checks that the devices exist in the guest. A container that may use
/// every device gets those of its list that the guest has: the list was made by looking at the host.
fn devices(linux: &mut Linux, guest: &Guest<'_>) -> Result<Vec<oci_spec::runtime::LinuxDeviceCgroup>> {
    let mut rules = Vec::new();
    if let Some(mut resources) = linux.resources().clone() {
        rules = resources.devices().clone().unwrap_or_default();
        resources.set_devices(None);
        linux.set_resources(Some(resources));
    }
    let privileged = rules.last().is_some_and(allows_every_device);
    if !privileged {
        rules.extend(default_devices());
    }
    let exists = |device: &LinuxDevice| match device.typ() {
        LinuxDeviceType::P | LinuxDeviceType::A => true,
        typ => (guest.has_device)(typ, device.major(), device.minor()),
    };
    let mut wanted = linux.devices().clone().unwrap_or_default();
    if privileged {
        wanted.retain(exists);
    } else if let Some(absent) = wanted.iter().find(|device| !exists(device)) {
        let (path, major, minor) = (absent.path().display(), absent.major(), absent.minor());
        return Err(refuse("linux.devices", format!("{path} ({major}:{minor}) does not exist in the guest")));
    }
    linux.set_devices(Some(wanted));
    Ok(rules)
}

/// Has bind mounts show what `place` names for their sources, if it names something.
fn mount_instead<'a>(spec: &mut Spec, place: impl Fn(&Path) -> Option<&'a Path>) {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let place = mount.source().as_deref().and_then(&place).map(Path::to_owned);
        if place.is_some() {
            mount.set_source(place);
        }
    }
    spec.set_mounts(Some(mounts));
}

/// Has bind mounts of sockets of the host, and of folders with such, show those of the guest.
fn mount_sockets(spec: &mut Spec, guest: &Guest<'_>) {
    let Some(sockets) = guest.sockets else { return };
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let Some(shown) = mount.source().as_ref().and_then(|source| sockets.of(source)).cloned() else {
            continue;
        };
        mount.set_source(Some(shown.place));
        if shown.is_volume {
            // With the sockets that are mounted on it.
            let options = mount.options().iter().flatten();
            let options = options.map(|o| if o == "bind" { "rbind".to_owned() } else { o.clone() });
            mount.set_options(Some(options.collect()));
        }
    }
    spec.set_mounts(Some(mounts));
}

/// Mounts that a container makes cannot show on the host: the share has no way for them.
fn refuse_sharing(spec: &Spec) -> Result<()> {
    for mount in spec.mounts().iter().flatten() {
        if let Some(option) =
            mount.options().iter().flatten().find(|o| matches!(o.as_str(), "shared" | "rshared"))
        {
            let reason = format!(
                "{option} at {}: mounts of the guest cannot reach the host",
                mount.destination().display()
            );
            return Err(refuse("mounts", reason));
        }
    }
    Ok(())
}

fn add_sysctls(linux: &mut Linux, guest: &Guest<'_>) {
    let own_ipc = linux.namespaces().iter().flatten().any(|n| n.typ() == LinuxNamespaceType::Ipc);
    if guest.ipc_sysctls.is_empty() || !own_ipc {
        return;
    }
    let mut sysctls: HashMap<String, String> = guest.ipc_sysctls.iter().cloned().collect();
    sysctls.extend(linux.sysctl().clone().unwrap_or_default());
    linux.set_sysctl(Some(sysctls));
}

fn refuse_unsupported(linux: &Linux) -> Result<()> {
    if let Some(label) = linux.mount_label().as_deref().filter(|label| !label.is_empty()) {
        return Err(refuse("linux.mountLabel", format!("the guest has no SELinux for {label:?}")));
    }
    if linux.intel_rdt().is_some() {
        return Err(refuse("linux.intelRdt", "the guest cannot partition the host's caches".into()));
    }
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(refuse("linux.netDevices", "devices of the host cannot be moved into the guest".into()));
    }
    if let Some(seccomp) = linux.seccomp() {
        let notifies = |a: LinuxSeccompAction| a == LinuxSeccompAction::ScmpActNotify;
        let syscalls = seccomp.syscalls().iter().flatten();
        if seccomp.listener_path().is_some()
            || notifies(seccomp.default_action())
            || syscalls.map(|s| s.action()).any(notifies)
        {
            return Err(refuse("linux.seccomp", "the guest cannot notify a listener of the host".into()));
        }
    }
    linux.resources().as_ref().map_or(Ok(()), refuse_resources)
}

/// What cgroup v2 has not, or libcgroups does not write.
fn refuse_resources(resources: &LinuxResources) -> Result<()> {
    let refuse = |name: &str, reason: &str| Err(refuse(&format!("linux.resources.{name}"), reason.into()));
    if let Some(memory) = resources.memory() {
        #[allow(deprecated)]
        let kernel = memory.kernel();
        if kernel.is_some_and(|limit| limit > 0) {
            return refuse("memory.kernel", "cgroup v2 has no limit of kernel memory");
        }
        if memory.kernel_tcp().is_some_and(|limit| limit > 0) {
            return refuse("memory.kernelTCP", "cgroup v2 has no limit of TCP memory");
        }
        if memory.swappiness().is_some() {
            return refuse("memory.swappiness", "cgroup v2 has no swappiness");
        }
        if memory.disable_oom_killer() == Some(true) {
            return refuse("memory.disableOOMKiller", "cgroup v2 cannot switch the OOM killer off");
        }
        if memory.check_before_update() == Some(true) {
            return refuse("memory.checkBeforeUpdate", "not supported yet");
        }
    }
    if resources.network().as_ref().is_some_and(|n| n.class_id().is_some() || n.priorities().is_some()) {
        return refuse("network", "cgroup v2 has no net_cls and no net_prio");
    }
    if resources.rdma().as_ref().is_some_and(|limits| !limits.is_empty()) {
        return refuse("rdma", "the guest has no RDMA devices");
    }
    Ok(())
}

/// Limits of the host's block devices for the guest's. Others than the container's own disks are not here: its files
/// come over a share, whose disks only the host can throttle.
fn block_io(resources: &mut LinuxResources, disks: &Disks) -> Result<()> {
    let Some(mut io) = resources.block_io().clone() else { return Ok(()) };
    let name = "linux.resources.blockIO";
    if io.leaf_weight().is_some_and(|weight| weight > 0) {
        return Err(refuse(&format!("{name}.leafWeight"), "cgroup v2 has no weights of leaves".into()));
    }
    if io.weight_device().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(refuse(
            &format!("{name}.weightDevice"),
            "the guest weighs containers, not devices".into(),
        ));
    }
    let limits = |devices: &Option<Vec<LinuxThrottleDevice>>| {
        let translated = devices.iter().flatten().map(|limit| {
            let (major, minor) = (limit.major(), limit.minor());
            let (major, minor) = disks.guests(major, minor).ok_or_else(|| {
                refuse(name, format!("{major}:{minor} is not a device of the container's own in the guest"))
            })?;
            let limit = LinuxThrottleDeviceBuilder::default().major(major).minor(minor).rate(limit.rate());
            limit.build().map_err(|e| refuse(name, e.to_string()))
        });
        translated.collect::<Result<Vec<_>>>().map(|all| Some(all).filter(|all| !all.is_empty()))
    };
    let (read, write) = (limits(io.throttle_read_bps_device())?, limits(io.throttle_write_bps_device())?);
    io.set_throttle_read_bps_device(read).set_throttle_write_bps_device(write);
    let (read, write) = (limits(io.throttle_read_iops_device())?, limits(io.throttle_write_iops_device())?);
    io.set_throttle_read_iops_device(read).set_throttle_write_iops_device(write);
    // libcgroups' own conversion overflows. Weights of cgroup v1 go from 10 to 1000, those of v2 from 1 to 10000.
    if let Some(weight) = io.weight().filter(|weight| *weight > 0) {
        let weight = 1 + (u32::from(weight).clamp(10, 1000) - 10) * 9999 / 990;
        let mut unified = resources.unified().clone().unwrap_or_default();
        unified.entry("io.weight".into()).or_insert(weight.to_string());
        resources.set_unified(Some(unified));
    }
    io.set_weight(None);
    resources.set_block_io(Some(io));
    Ok(())
}

/// The text of a path for a device number below /sys/dev.
pub(crate) fn sys_dev(typ: LinuxDeviceType, major: i64, minor: i64) -> PathBuf {
    let class = if typ == LinuxDeviceType::B { "block" } else { "char" };
    let path = Path::new("/sys/dev").join(class).join(format!("{major}:{minor}"));
    debug_assert!(path.components().all(|c| c != Component::ParentDir));
    path
}

fn refuse(field: &str, reason: String) -> Error {
    Error::Invalid(format!("{field}: {reason}"))
}

fn missing(field: &str) -> Error {
    Error::Invalid(format!("{field}: missing in the specification"))
}

fn invalid(what: &str, error: &serde_json::Error) -> Error {
    Error::Invalid(format!("{what} cannot be read: {error}"))
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
