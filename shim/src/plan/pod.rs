//! What a pod asks for when containerd makes it by the sandbox API (contract, C4).
//! Knows the few fields of CRI's `PodSandboxConfig` (k8s.io/cri-api, runtime/v1/api.proto) that reach a machine.

use std::collections::HashMap;

use protobuf::{CodedInputStream, rt::WireType};

use super::{IdMaps, IdRange, refused};
use crate::error::{Fault, Kind};

/// A pod's wishes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodConfig {
    /// Its host name; empty for the host's.
    pub hostname: String,
    /// All annotations.
    pub annotations: HashMap<String, String>,
    /// Where on the host it is to be counted.
    pub cgroup_parent: String,
    /// Sysctls of its namespaces.
    pub sysctls: HashMap<String, String>,
    /// What its resolv.conf is to say; without any, the host's is taken.
    pub dns: Dns,
    /// Sum over its containers, in bytes; 0 for none.
    pub memory_limit: i64,
    /// Sum over its containers, per [`PodConfig::cpu_period`]; 0 for none.
    pub cpu_quota: i64,
    /// In microseconds.
    pub cpu_period: i64,
    /// How its user namespace maps, if it is to have one.
    pub users: Option<IdMaps>,
    namespaces: Namespaces,
}

/// The lines of a resolv.conf.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses.
    pub servers: Vec<String>,
    /// Domains.
    pub searches: Vec<String>,
    /// As in resolv.conf(5).
    pub options: Vec<String>,
}

/// `NamespaceMode` of each kind; `NODE` is the host's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Namespaces {
    network: u64,
    pid: u64,
    ipc: u64,
}

/// `NamespaceMode.NODE`.
const NODE: u64 = 2;

/// containerd's defaults for a pod that says nothing: ports and pings for everybody. Its own CRI sets them in
/// the classic way, and leaves them to the sandbox in this one.
const DEFAULT_SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

impl PodConfig {
    /// Reads what CreateSandbox carries in its options; without any, a pod with no wishes.
    pub fn read(message: &[u8]) -> Result<Self, Fault> {
        let mut config = Self::default();
        config.fields(&mut CodedInputStream::from_bytes(message)).map_err(|e| {
            Fault::new(Kind::InvalidArgument, format!("the pod's configuration cannot be read: {e}"))
        })?;
        for (key, value) in DEFAULT_SYSCTLS {
            config.sysctls.entry(key.into()).or_insert_with(|| value.into());
        }
        Ok(config)
    }

    /// Refuses by name what a machine of its own cannot give.
    pub(super) fn check(&self) -> Result<(), Fault> {
        let modes = [
            (self.namespaces.network, "network", "Network"),
            (self.namespaces.pid, "pid", "PID"),
            (self.namespaces.ipc, "ipc", "IPC"),
        ];
        for (mode, kind, title) in modes {
            if mode == NODE {
                let what = format!("the host's {kind} namespace (host{title})");
                return Err(refused(what, "the pod is a virtual machine with namespaces of its own"));
            }
        }
        match &self.users {
            Some(users) => users.check_namespace("userns_options: "),
            None => Ok(()),
        }
    }

    fn fields(&mut self, input: &mut CodedInputStream<'_>) -> protobuf::Result<()> {
        each(input, |number, input| match number {
            2 => input.read_string().map(|text| self.hostname = text),
            4 => nested(input, |input| self.dns_fields(input)),
            7 => entry(input, &mut self.annotations),
            8 => nested(input, |input| self.linux(input)),
            _ => Err(skip()),
        })
    }

    fn dns_fields(&mut self, input: &mut CodedInputStream<'_>) -> protobuf::Result<()> {
        each(input, |number, input| match number {
            1 => input.read_string().map(|text| self.dns.servers.push(text)),
            2 => input.read_string().map(|text| self.dns.searches.push(text)),
            3 => input.read_string().map(|text| self.dns.options.push(text)),
            _ => Err(skip()),
        })
    }

    fn linux(&mut self, input: &mut CodedInputStream<'_>) -> protobuf::Result<()> {
        each(input, |number, input| match number {
            1 => input.read_string().map(|text| self.cgroup_parent = text),
            // LinuxSandboxSecurityContext, its NamespaceOption.
            2 => nested(input, |input| {
                each(input, |number, input| match number {
                    1 => nested(input, |input| self.namespaces(input)),
                    _ => Err(skip()),
                })
            }),
            3 => entry(input, &mut self.sysctls),
            // LinuxContainerResources.
            5 => nested(input, |input| {
                each(input, |number, input| match number {
                    1 => input.read_int64().map(|n| self.cpu_period = n),
                    2 => input.read_int64().map(|n| self.cpu_quota = n),
                    4 => input.read_int64().map(|n| self.memory_limit = n),
                    _ => Err(skip()),
                })
            }),
            _ => Err(skip()),
        })
    }

    /// NamespaceOption.
    fn namespaces(&mut self, input: &mut CodedInputStream<'_>) -> protobuf::Result<()> {
        each(input, |number, input| match number {
            1 => input.read_uint64().map(|n| self.namespaces.network = n),
            2 => input.read_uint64().map(|n| self.namespaces.pid = n),
            3 => input.read_uint64().map(|n| self.namespaces.ipc = n),
            // UserNamespace: its mode is POD, which is 0 and therefore not on the wire, or NODE.
            5 => {
                let (mut mode, mut users) = (0, IdMaps::default());
                nested(input, |input| {
                    each(input, |number, input| match number {
                        1 => input.read_uint64().map(|n| mode = n),
                        2 => nested(input, |input| id_range(input, &mut users.uids)),
                        3 => nested(input, |input| id_range(input, &mut users.gids)),
                        _ => Err(skip()),
                    })
                })?;
                self.users = (mode != NODE).then_some(users);
                Ok(())
            }
            _ => Err(skip()),
        })
    }
}

/// IDMapping.
fn id_range(input: &mut CodedInputStream<'_>, ranges: &mut Vec<IdRange>) -> protobuf::Result<()> {
    let mut range = IdRange { container: 0, host: 0, size: 0 };
    each(input, |number, input| match number {
        1 => input.read_uint32().map(|n| range.host = n),
        2 => input.read_uint32().map(|n| range.container = n),
        3 => input.read_uint32().map(|n| range.size = n),
        _ => Err(skip()),
    })?;
    ranges.push(range);
    Ok(())
}

/// Says of a field that nobody wants it.
fn skip() -> protobuf::Error {
    std::io::Error::from(std::io::ErrorKind::Unsupported).into()
}

/// Hands each field of a message to `read` by its number; what it does not want is passed over.
fn each(
    input: &mut CodedInputStream<'_>,
    mut read: impl FnMut(u32, &mut CodedInputStream<'_>) -> protobuf::Result<()>,
) -> protobuf::Result<()> {
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let Some(kind) = WireType::new(tag & 7) else {
            return Err(std::io::Error::other(format!("tag {tag} has no wire type")).into());
        };
        let before = input.pos();
        match read(tag >> 3, input) {
            Ok(()) => {}
            Err(_) if input.pos() == before => input.skip_field(kind)?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads a message within a message.
fn nested(
    input: &mut CodedInputStream<'_>,
    read: impl FnOnce(&mut CodedInputStream<'_>) -> protobuf::Result<()>,
) -> protobuf::Result<()> {
    let length = input.read_raw_varint64()?;
    let outer = input.push_limit(length)?;
    read(input)?;
    input.pop_limit(outer);
    Ok(())
}

/// Reads an entry of a map from text to text.
fn entry(input: &mut CodedInputStream<'_>, map: &mut HashMap<String, String>) -> protobuf::Result<()> {
    let (mut key, mut value) = (String::new(), String::new());
    nested(input, |input| {
        each(input, |number, input| match number {
            1 => input.read_string().map(|text| key = text),
            2 => input.read_string().map(|text| value = text),
            _ => Err(skip()),
        })
    })?;
    map.insert(key, value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A field with bytes, as a writer of protobuf would put it.
    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        assert!(bytes.len() < 128);
        [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
    }

    fn number(number: u8, value: u8) -> Vec<u8> {
        vec![number << 3, value]
    }

    #[test]
    fn a_pods_wishes_are_read_and_the_rest_is_passed_over() {
        let pair = |key: &str, value: &str| [field(1, key.as_bytes()), field(2, value.as_bytes())].concat();
        let linux = [
            field(1, b"/pods"),
            field(2, &field(1, &[number(1, 0), number(2, 1)].concat())),
            field(3, &pair("net.ipv4.ping_group_range", "1 0")),
            field(5, &[number(1, 100), number(2, 50), number(4, 64)].concat()),
        ];
        let message = [
            field(1, &field(1, b"name")),
            field(2, b"host"),
            field(4, &[field(1, b"10.0.0.1"), field(2, b"example.org")].concat()),
            field(7, &pair("io.bulkhead.sandbox.vcpus", "2")),
            field(8, &linux.concat()),
            field(15, b"later"),
        ];
        let config = PodConfig::read(&message.concat()).unwrap();
        assert_eq!((config.hostname.as_str(), config.cgroup_parent.as_str()), ("host", "/pods"));
        assert_eq!((config.cpu_period, config.cpu_quota, config.memory_limit), (100, 50, 64));
        assert_eq!(config.dns.servers, ["10.0.0.1"]);
        assert_eq!(config.annotations["io.bulkhead.sandbox.vcpus"], "2");
        assert_eq!(config.sysctls["net.ipv4.ping_group_range"], "1 0", "the pod's own wish comes first");
        assert_eq!(config.sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
        config.check().unwrap();
    }

    #[test]
    fn namespaces_of_the_host_are_refused_by_the_name_that_users_know() {
        let pod = |options: &[u8]| PodConfig::read(&field(8, &field(2, &field(1, options)))).unwrap();
        let refusal = |options: &[u8]| pod(options).check().unwrap_err().message;
        assert!(refusal(&number(1, 2)).contains("hostNetwork"));
        assert!(refusal(&number(2, 2)).contains("hostPID"));
        assert!(refusal(&number(3, 2)).contains("hostIPC"));
        assert!(refusal(&field(5, &[])).contains("userns_options: uidMappings: no id is mapped"));
        let node = pod(&field(5, &number(1, 2)));
        node.check().unwrap();
        assert_eq!(node.users, None);
    }

    #[test]
    fn the_pods_user_namespace_is_read() {
        let range = |host: u8, size: u8| [number(1, host), number(3, size)].concat();
        let users = [field(2, &range(100, 10)), field(3, &range(50, 5))].concat();
        let pod = PodConfig::read(&field(8, &field(2, &field(1, &field(5, &users))))).unwrap();
        pod.check().unwrap();
        let ids = |host, size| vec![IdRange { container: 0, host, size }];
        assert_eq!(pod.users, Some(IdMaps { uids: ids(100, 10), gids: ids(50, 5) }));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = PodConfig::read(&bytes);
        }
    }
}
