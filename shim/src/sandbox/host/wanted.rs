//! What machine a sandbox is to have: of its first container, or of the pod that the sandbox API names.
//! Knows configuration and plans; makes nothing but the pod's files.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use bulkhead_vmm_spec::SizeMib;
use oci_spec::runtime::Spec;
use protobuf::well_known_types::any::Any;

use super::{CreatePod, CreateRequest, Host, lock};
use crate::{
    cgroup,
    config::Config,
    error::{Fault, Kind},
    plan::{self, Disk, HostFacts, IdMaps, Role, Sizing},
    storage::PodFiles,
};

/// What machine a sandbox is to have.
#[derive(Clone)]
pub(super) struct Wanted {
    pub(super) config: Config,
    pub(super) sizing: Sizing,
    /// Where on the host it is to be counted, as an OCI spec says it.
    pub(super) cgroup: Option<String>,
    /// Empty for the host's.
    pub(super) hostname: String,
    /// Of the pod's own namespaces.
    pub(super) sysctls: HashMap<String, String>,
    /// The network namespace of the host that its links are in; its own if none.
    pub(super) netns: Option<PathBuf>,
    /// Block devices of the host that it is to have.
    pub(super) disks: Vec<Disk>,
    /// How many more it can be given, for containers that come later.
    pub(super) spare_disks: u32,
    /// How the pod's user namespace maps, if it has one.
    pub(super) users: Option<IdMaps>,
}

impl Host {
    /// File, runtime options, annotations: each overrides the one before.
    pub(super) fn plan_machine(&self, request: &CreateRequest) -> Result<Wanted, Fault> {
        let spec = load_spec(&request.bundle)?;
        // Once more where its files are prepared, but what is refused needs no machine.
        let role = plan::container(&request.id, spec.clone())?.role;
        let none = HashMap::new();
        let config =
            self.configure(request.options.as_ref(), spec.annotations().as_ref().unwrap_or(&none))?;
        let sizing = plan::machine(&config, &spec, &host_facts())?;
        Ok(Wanted {
            spare_disks: if role == Role::Alone { 0 } else { config.storage.spare_disks },
            config,
            sizing,
            cgroup: cgroups_path(&spec).map(str::to_owned),
            hostname: spec.hostname().clone().unwrap_or_default(),
            sysctls: plan::pod_sysctls(&spec),
            netns: plan::network(&spec),
            disks: plan::disks(&spec),
            users: plan::users(&spec)?,
        })
    }

    pub(super) fn plan_pod(&self, create: &CreatePod) -> Result<(), Fault> {
        let pod = plan::PodConfig::read(&create.config.0)?;
        let config = self.configure(self.options.as_ref(), &pod.annotations)?;
        let sizing = plan::pod(&config, &pod, &host_facts())?;
        let own = own_hostname();
        let hostname = if pod.hostname.is_empty() { own } else { pod.hostname.clone() };
        let files = PodFiles::new(&self.dir);
        let users = pod.users;
        files.write(&hostname, &pod.dns, users.as_ref().map_or((0, 0), IdMaps::root))?;
        fail_point!(PodFiles);
        let cgroup = Some(pod.cgroup_parent).filter(|parent| !parent.is_empty());
        let cgroup = cgroup.map(|parent| cgroup::below(&parent, &self.identity.id));
        let netns = Some(create.netns.clone()).filter(|path| !path.as_os_str().is_empty());
        let sysctls = pod.sysctls;
        // The sandbox API names a pod before its containers, hence before their devices.
        let (disks, spare_disks) = (Vec::new(), config.storage.spare_disks);
        *lock(&self.pod) =
            Some(Wanted { config, sizing, cgroup, hostname, sysctls, netns, disks, spare_disks, users });
        Ok(())
    }

    fn configure(
        &self,
        options: Option<&(String, Vec<u8>)>,
        annotations: &HashMap<String, String>,
    ) -> Result<Config, Fault> {
        if let Some(reason) = &self.config_error {
            return Err(Fault::new(Kind::FailedPrecondition, reason.clone()));
        }
        let mut config = self.config.clone();
        if let Some((type_url, value)) = options {
            let options = Any { type_url: type_url.clone(), value: value.clone(), ..Default::default() };
            config = config.with_runtime_options(&options).map_err(config_fault)?;
        }
        config.with_annotations(annotations).map_err(config_fault)
    }
}

fn host_facts() -> HostFacts {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let memory = nix::sys::sysinfo::sysinfo().map_or(0, |info| info.ram_total());
    HostFacts { cpus, memory: SizeMib(memory >> 20) }
}

pub(super) fn own_hostname() -> String {
    nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

pub(super) fn config_fault(error: crate::config::ConfigError) -> Fault {
    Fault::of(Kind::FailedPrecondition, &error)
}

pub(super) fn load_spec(bundle: &Path) -> Result<Spec, Fault> {
    let path = bundle.join("config.json");
    let text = std::fs::read(&path).map_err(|e| Fault::internal(&format!("read {}", path.display()), &e))?;
    serde_json::from_slice(&text)
        .map_err(|e| Fault::new(Kind::InvalidArgument, format!("{}: {e}", path.display())))
}

fn cgroups_path(spec: &Spec) -> Option<&str> {
    spec.linux().as_ref()?.cgroups_path().as_ref()?.to_str()
}
