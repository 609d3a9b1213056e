//! Makes the guest the sandbox that the host has described: name, clock, entropy, sysctls, share.
//! Knows the guest as a whole; must not know containers.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_proto::{
    SHARE_DIR,
    agent::{ConfigureRequest, ConfigureResponse},
};
use nix::{
    mount::{MsFlags, mount},
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
    unistd::sethostname,
};

use crate::{
    cgroup,
    error::{Doing, Error, Result},
    podns,
};

/// Applies to the guest what concerns all of it, and says what kind of guest it is. The pod's namespaces come after,
/// with the host name that is set here.
pub(crate) fn apply(request: &ConfigureRequest) -> Result<ConfigureResponse> {
    if !request.hostname.is_empty() {
        sethostname(&request.hostname).doing(|| format!("set the host name to {:?}", request.hostname))?;
    }
    if request.time_unix_nanos != 0 {
        let now = TimeSpec::from_duration(Duration::from_nanos(request.time_unix_nanos));
        clock_settime(ClockId::CLOCK_REALTIME, now).doing(|| "set the clock".into())?;
    }
    if !request.seed.is_empty() {
        File::open("/dev/random")
            .and_then(|random| crate::sys::add_entropy(random.as_fd(), &request.seed))
            .doing(|| "seed the kernel's random numbers".into())?;
    }
    for (key, value) in request.sysctls.iter().filter(|(key, _)| !is_net(key) && !is_ipc(key)) {
        write_sysctl(key, value).doing(|| format!("set sysctl {key} to {value:?}"))?;
    }
    podns::create_shm().doing(|| "make the pod's /dev/shm".into())?;
    if !request.share_tag.is_empty() {
        mount_share(&request.share_tag)?;
    }
    let controllers =
        cgroup::controllers(Path::new(cgroup::ROOT)).doing(|| "read the cgroup controllers".into())?;
    Ok(ConfigureResponse { kernel_release: kernel_release(), controllers, ..Default::default() })
}

/// Has the kernel let go of files that it remembers for the next time. Those of a container that is gone are never
/// asked for again, and as long as they are remembered virtiofsd keeps them open on the host (FUSE_FORGET).
/// Those of other containers are looked up once more; there is no way to name some of them alone
/// (Documentation/admin-guide/sysctl/vm.rst, drop_caches).
pub(crate) fn forget_unused_files() {
    if let Err(error) = fs::write("/proc/sys/vm/drop_caches", "2") {
        tracing::warn!(%error, "files of a deleted container stay open on the host");
    }
}

/// Sysctls that belong to the pod's namespaces.
pub(crate) fn namespaced_sysctls(request: &ConfigureRequest) -> Vec<(String, String)> {
    let ours = |key: &str| is_net(key) || is_ipc(key);
    request.sysctls.iter().filter(|(key, _)| ours(key)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// Sysctls that belong to an ipc namespace, hence to each container.
pub(crate) fn ipc_sysctls(request: &ConfigureRequest) -> Vec<(String, String)> {
    request.sysctls.iter().filter(|(key, _)| is_ipc(key)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// `uname -r`.
pub(crate) fn kernel_release() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    text.trim_end().to_owned()
}

/// Writes one sysctl, in the namespaces of the calling thread.
pub(crate) fn write_sysctl(key: &str, value: &str) -> io::Result<()> {
    fs::write(sysctl_path(key)?, value)
}

/// `net.ipv4.ip_forward` and `net/ipv4/ip_forward` name the same file. With slashes, dots are part of a name.
fn sysctl_path(key: &str) -> io::Result<PathBuf> {
    let relative = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
    let plain = relative.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    if !plain {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{key:?} is no sysctl")));
    }
    Ok(Path::new("/proc/sys").join(relative))
}

fn is_net(key: &str) -> bool {
    key.starts_with("net.") || key.starts_with("net/")
}

pub(crate) fn is_ipc(key: &str) -> bool {
    let key = key.replace('/', ".");
    key.starts_with("fs.mqueue.")
        || ["kernel.msg", "kernel.shm"].iter().any(|prefix| key.starts_with(prefix))
        || key == "kernel.sem"
}

fn mount_share(tag: &str) -> Result<()> {
    fs::create_dir_all(SHARE_DIR).doing(|| format!("create {SHARE_DIR}"))?;
    mount(Some(tag), SHARE_DIR, Some("virtiofs"), MsFlags::empty(), None::<&str>).map_err(|e| match e {
        nix::Error::EINVAL => Error::Invalid(format!("no virtio-fs device has the tag {tag:?}")),
        e => Error::Io { verb: format!("mount the share {tag:?} at {SHARE_DIR}"), source: e.into() },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_stay_below_proc_sys() {
        let path = |key| sysctl_path(key).map(|p| p.display().to_string()).ok();
        assert_eq!(path("net.core.somaxconn").as_deref(), Some("/proc/sys/net/core/somaxconn"));
        assert_eq!(path("net/ipv4/conf/eth0.1/mtu").as_deref(), Some("/proc/sys/net/ipv4/conf/eth0.1/mtu"));
        for bad in ["../../etc/passwd", "net//core", "", "net/./core", "..x"] {
            assert_eq!(path(bad), None, "{bad}");
        }
    }

    #[test]
    fn sysctls_go_to_their_namespace() {
        assert!(is_net("net.ipv4.ip_forward") && !is_net("kernel.shmmax"));
        assert!(is_ipc("kernel.shmmax") && is_ipc("kernel.sem") && is_ipc("fs/mqueue/msg_max"));
        assert!(!is_ipc("kernel.panic") && !is_ipc("vm.swappiness"));
    }
}
