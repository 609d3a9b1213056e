//! Unix sockets of the host in the volumes of a container: which ones are allowed, and connections to them.
//! Knows paths and sockets of the host; does not know who connects in the guest.
//!
//! A socket is held by its folder, which is open, and its name. So what a path leads to is settled when the container is
//! made; a server that is started anew, and with it its socket, is found under the same name.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    fmt,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    fcntl::{OFlag, openat},
    sys::{
        socket::{
            AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt::SendTimeout,
        },
        stat::Mode,
        time::TimeVal,
    },
};
use tracing::warn;

use crate::{
    config::{Pattern, name_fits},
    plan::Bind,
};

/// The most sockets of one container, unless it has more of them mounted one by one.
const MOST_SOCKETS: usize = 64;
/// The most names that are looked at for one container, for the time that they take.
const MOST_NAMES: usize = 10_000;
/// How long a server may leave a connection waiting because it has too many that wait, in seconds.
const CONNECT_SECONDS: i64 = 10;

/// A socket of the host that a container may connect to.
#[derive(Clone, Debug)]
pub struct HostSocket {
    folder: Arc<OwnedFd>,
    name: OsString,
    path: PathBuf,
    /// The number of the bind mount that it is in.
    pub slot: usize,
    /// Where it is below the source of that; empty if it is the source.
    pub below: PathBuf,
    /// Its mode and owners, as the container is to see them if it is the source.
    pub facts: Facts,
}

/// Mode and owners.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Bits of chmod(2).
    pub mode: u32,
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// A bind mount of a socket that the administrator has not allowed.
#[derive(Debug, thiserror::Error)]
#[error(
    "the socket {} cannot be mounted at {}: no path in the key `volumes.host_sockets` of the configuration allows {}",
    source_path.display(), destination.display(), real.display()
)]
pub struct NotAllowed {
    source_path: PathBuf,
    destination: PathBuf,
    real: PathBuf,
}

/// For messages: where it was when it was found.
impl fmt::Display for HostSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

impl HostSocket {
    /// Connects; may block for some seconds.
    ///
    /// # Errors
    /// Nobody listens there, or takes the connection in time; or it is a socket of another kind, or none (any more).
    pub fn connect(&self) -> io::Result<UnixStream> {
        let what = hold(&self.folder, &self.name)?;
        if facts(&what).is_none() {
            return Err(io::Error::other("it is no socket any more"));
        }
        let stream = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // The kernel waits so long for a place in the server's queue (unix_stream_connect in net/unix/af_unix.c).
        setsockopt(&stream, SendTimeout, &TimeVal::new(CONNECT_SECONDS, 0))?;
        // By its descriptor: the name could be another file's by now, and a path may be too long.
        connect(stream.as_raw_fd(), &UnixAddr::new(&by_descriptor(what.as_fd()))?)?;
        Ok(stream.into())
    }
}

/// Looks for sockets in bind mounts: those that are mounted themselves, whose numbers are `sockets`, and those in folders
/// that the patterns name.
///
/// # Errors
/// One that is mounted itself is not allowed.
pub fn find(patterns: &[Pattern], binds: &[Bind], sockets: &[usize]) -> Result<Vec<HostSocket>, NotAllowed> {
    let mut found = Vec::new();
    let mut folders = Vec::new();
    for bind in binds {
        if sockets.contains(&bind.slot) {
            found.push(one(patterns, bind)?);
        } else if !patterns.is_empty()
            && let Ok(real) = bind.source.canonicalize()
            && real.is_dir()
        {
            folders.push((bind.slot, real));
        }
    }
    if !folders.is_empty() {
        for (folder, path, name) in named(patterns) {
            for (slot, source) in &folders {
                if let Ok(inside) = path.strip_prefix(source) {
                    let (folder, name, below) = (folder.clone(), name.clone(), inside.join(&name));
                    let (path, facts) = (path.join(&name), Facts::default());
                    found.push(HostSocket { folder, name, path, slot: *slot, below, facts });
                }
            }
        }
    }
    let most = MOST_SOCKETS.max(sockets.len());
    if found.len() > most {
        warn!("the container has {} sockets of the host, of which {most} can be used", found.len());
        found.truncate(most);
    }
    Ok(found)
}

/// The socket that is mounted itself, if it is allowed.
fn one(patterns: &[Pattern], bind: &Bind) -> Result<HostSocket, NotAllowed> {
    let real = bind.source.canonicalize().unwrap_or_else(|_| bind.source.clone());
    let refused = || NotAllowed {
        source_path: bind.source.clone(),
        destination: bind.destination.clone(),
        real: real.clone(),
    };
    let (Some(parent), Some(name)) = (real.parent(), real.file_name()) else { return Err(refused()) };
    let (folder, path) = open_folder(parent).map_err(|_| refused())?;
    let path = path.join(name);
    let allowed = patterns.iter().any(|pattern| {
        let folder = pattern.folder().canonicalize();
        folder.is_ok_and(|folder| path.strip_prefix(folder).is_ok_and(|below| pattern.fits(below)))
    });
    let there = hold(&folder, name).ok().and_then(|socket| facts(&socket)).filter(|_| allowed);
    let mut facts = there.ok_or_else(refused)?;
    if let Some((owners, _)) = &bind.owners {
        (facts.uid, facts.gid) = owners.seen(facts.uid, facts.gid);
    }
    let (name, slot, below) = (name.to_owned(), bind.slot, PathBuf::new());
    Ok(HostSocket { folder, name, path, slot, below, facts })
}

/// Every socket that the patterns name: its folder, the folder's path, and its name.
fn named(patterns: &[Pattern]) -> Vec<(Arc<OwnedFd>, PathBuf, OsString)> {
    let (mut all, mut seen, mut left) = (Vec::new(), HashSet::new(), MOST_NAMES);
    for pattern in patterns {
        let Ok(folder) = pattern.folder().canonicalize() else { continue };
        let mut level = vec![folder];
        let (last, between) = pattern.names().split_last().expect("a pattern has a name");
        for name in between {
            level = level.iter().flat_map(|folder| below(folder, name, &mut left)).collect();
        }
        for folder in level {
            let Ok((held, path)) = open_folder(&folder) else { continue };
            for name in below(&path, last, &mut left).iter().filter_map(|path| path.file_name()) {
                let name = name.to_owned();
                let is_socket = hold(&held, &name).is_ok_and(|held| facts(&held).is_some());
                if is_socket && seen.insert(path.join(&name)) {
                    all.push((held.clone(), path.clone(), name));
                }
            }
        }
    }
    if left == 0 {
        warn!("volumes.host_sockets: only {MOST_NAMES} names were looked at for sockets in folders");
    }
    all
}

/// What in the folder has a name of the pattern, as long as names are left; no links.
fn below(folder: &Path, pattern: &str, left: &mut usize) -> Vec<PathBuf> {
    if !pattern.contains(['*', '?']) {
        let path = folder.join(pattern);
        let there = fs::symlink_metadata(&path).is_ok_and(|facts| !facts.is_symlink());
        return if there { vec![path] } else { Vec::new() };
    }
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Some(fewer) = left.checked_sub(1) else { break };
        *left = fewer;
        let real = entry.file_type().is_ok_and(|kind| !kind.is_symlink());
        if real && name_fits(pattern, &entry.file_name()) {
            paths.push(entry.path());
        }
    }
    paths
}

/// Holds a folder; answers its path without links.
fn open_folder(path: &Path) -> io::Result<(Arc<OwnedFd>, PathBuf)> {
    let flags = (OFlag::O_PATH | OFlag::O_DIRECTORY).bits();
    let folder: OwnedFd = File::options().read(true).custom_flags(flags).open(path)?.into();
    let path = fs::read_link(by_descriptor(folder.as_fd()))?;
    Ok((Arc::new(folder), path))
}

/// Holds what is in a folder, whatever it is. A link would lead wherever who has made it wants: it is not followed.
fn hold(folder: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(folder, name, flags, Mode::empty())?)
}

fn by_descriptor(fd: BorrowedFd<'_>) -> PathBuf {
    Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string())
}

/// Mode and owners of a socket.
fn facts(held: &OwnedFd) -> Option<Facts> {
    let facts = fs::metadata(by_descriptor(held.as_fd())).ok()?;
    let (mode, uid, gid) = (facts.mode() & 0o7777, facts.uid(), facts.gid());
    facts.file_type().is_socket().then_some(Facts { mode, uid, gid })
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::{
            fs::{PermissionsExt, symlink},
            net::UnixListener,
        },
    };

    use super::*;
    use crate::plan::{IdMaps, IdRange, ReadOnly};

    fn bind(slot: usize, source: PathBuf) -> Bind {
        let read_only = ReadOnly::No;
        Bind {
            slot,
            source,
            destination: "/m".into(),
            recursive: true,
            read_only,
            follows_host: false,
            owners: None,
        }
    }

    fn patterns(dir: &Path, below: &[&str]) -> Vec<Pattern> {
        let pattern = |below: &&str| Pattern::parse(&format!("{}/{below}", dir.display())).unwrap();
        below.iter().map(pattern).collect()
    }

    /// Where in its folder each is that may be connected to.
    fn below(patterns: &[Pattern], sources: &[PathBuf]) -> Vec<(usize, String)> {
        let binds: Vec<_> =
            sources.iter().cloned().enumerate().map(|(slot, source)| bind(slot, source)).collect();
        let found = find(patterns, &binds, &[]).unwrap();
        let mut found: Vec<_> = found.iter().map(|s| (s.slot, s.below.display().to_string())).collect();
        found.sort();
        found
    }

    #[test]
    fn a_socket_is_allowed_by_its_real_path() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().canonicalize().unwrap();
        fs::create_dir_all(dir.join("run/deep")).unwrap();
        symlink("run", dir.join("var")).unwrap();
        let _servers: Vec<_> = ["run/a.sock", "run/b", "run/deep/c.sock"]
            .map(|name| UnixListener::bind(dir.join(name)).unwrap())
            .into();
        symlink("b", dir.join("run/link.sock")).unwrap();
        let is_allowed = |allowed: &[&str], source: &str| {
            one(&patterns(&dir, allowed), &bind(0, dir.join(source))).is_ok()
        };
        let allowed = &["run/*.sock"];
        assert!(is_allowed(allowed, "run/a.sock"));
        assert!(is_allowed(allowed, "var/a.sock"), "by a folder that is a link");
        assert!(!is_allowed(allowed, "run/b"));
        assert!(!is_allowed(allowed, "run/link.sock"), "it leads to another");
        assert!(!is_allowed(allowed, "run/deep/c.sock"), "a level below");
        assert!(is_allowed(&["var/a.sock"], "run/a.sock"), "a link in the pattern");
        assert!(is_allowed(&["run/*/*"], "run/deep/c.sock"));
        assert!(!is_allowed(&[], "run/a.sock"));
        fs::write(dir.join("run/file.sock"), "").unwrap();
        assert!(!is_allowed(allowed, "run/file.sock"), "no socket any more");
        assert!(!is_allowed(allowed, "run/nothing.sock"));
        let error = one(&[], &bind(0, dir.join("run/link.sock"))).unwrap_err().to_string();
        for words in ["run/link.sock cannot be mounted at /m", "volumes.host_sockets", "run/b"] {
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_socket_has_its_owners_as_the_mount_maps_them() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().canonicalize().unwrap().join("a.sock");
        let _server = UnixListener::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let allowed = patterns(path.parent().unwrap(), &["a.sock"]);
        let mut bind = bind(0, path.clone());
        let seen = |bind: &Bind| one(&allowed, bind).unwrap().facts;
        let own = fs::metadata(&path).unwrap();
        assert_eq!(seen(&bind), Facts { mode: 0o640, uid: own.uid(), gid: own.gid() });
        let range = |container| vec![IdRange { container, host: 5000, size: 1 }];
        bind.owners = Some((IdMaps { uids: range(own.uid()), gids: range(own.gid() + 1) }, false));
        assert_eq!(seen(&bind), Facts { mode: 0o640, uid: 5000, gid: 65534 });
    }

    #[test]
    fn sockets_in_a_folder_are_those_that_are_named() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().canonicalize().unwrap();
        fs::create_dir_all(dir.join("run/deep")).unwrap();
        let _servers: Vec<_> = ["run/a.sock", "run/b", "run/deep/c.sock", "run/.d.sock"]
            .map(|name| UnixListener::bind(dir.join(name)).unwrap())
            .into();
        symlink("b", dir.join("run/link.sock")).unwrap();
        symlink("deep", dir.join("run/shallow")).unwrap();
        fs::write(dir.join("run/file.sock"), "").unwrap();
        let allowed = patterns(&dir, &["run/*.sock", "run/a.sock", "run/*/c.sock"]);
        let found = below(&allowed, &[dir.join("run"), dir.join("run/deep"), dir.join("none")]);
        let expected = [(0, "a.sock"), (0, "deep/c.sock"), (1, "c.sock")];
        assert_eq!(found, expected.map(|(slot, below)| (slot, below.to_owned())));
    }

    #[test]
    fn a_connection_goes_to_who_listens_under_the_name_in_that_folder() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().canonicalize().unwrap();
        let (path, other) = (dir.join("a.sock"), dir.join("other"));
        let server = UnixListener::bind(&path).unwrap();
        let socket = one(&patterns(&dir, &["a.sock"]), &bind(0, path.clone())).unwrap();
        let says = |server: &UnixListener| {
            let mut client = socket.connect().unwrap();
            client.write_all(b"hello").unwrap();
            drop(client);
            let mut text = String::new();
            server.accept().unwrap().0.read_to_string(&mut text).unwrap();
            assert_eq!(text, "hello");
        };
        says(&server);
        drop(server);
        assert_eq!(socket.connect().unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        fs::remove_file(&path).unwrap();
        assert_eq!(socket.connect().unwrap_err().kind(), io::ErrorKind::NotFound);
        says(&UnixListener::bind(&path).unwrap());
        // What a pod that can write to the folder may try.
        let _other = UnixListener::bind(&other).unwrap();
        fs::remove_file(&path).unwrap();
        symlink(&other, &path).unwrap();
        socket.connect().unwrap_err();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert!(socket.connect().unwrap_err().to_string().contains("no socket"));
    }
}
