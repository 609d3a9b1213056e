//! The daemon behind a directory that host and guest share: virtiofsd.
//! Knows its command line; both backends connect their device to it.

use std::{
    ffi::OsString,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::Path,
};

use crate::{
    Journal, LaunchError,
    child::{Child, ChildSpec},
    helper::{record, spawn},
    socket,
    words::Words,
};

/// The program's name in journals, errors and [`crate::MachineEnd::part`].
pub const VIRTIOFSD: &str = "virtiofsd";
/// Name that its socket has for a moment.
const SOCKET: &str = "virtiofs";

/// Starts the daemon, and answers it with a connection to it.
pub(crate) fn start(
    program: &Path,
    share: &Path,
    run_dir: &Path,
    journal: &dyn Journal,
) -> Result<(Child, OwnedFd), LaunchError> {
    let path = run_dir.join(SOCKET);
    let (listener, connection) = socket::listener_and_client(&path)
        .map_err(|e| LaunchError::system(format!("make a socket at {}", path.display()), e))?;
    let mut spec = ChildSpec::new(VIRTIOFSD, program);
    spec.args = arguments(share, listener.as_raw_fd());
    spec.fds = vec![listener];
    let child = spawn(spec)?;
    record(&child, journal)?;
    Ok((child, connection))
}

/// Arguments of the program, which takes the listening socket `listener` as it is.
fn arguments(share: &Path, listener: RawFd) -> Vec<OsString> {
    let mut args = Words::default();
    args.option("--shared-dir", share).pair("--fd", listener.to_string());
    // In the host's mount namespace, so that what is mounted below the share later appears in it.
    args.pair("--sandbox", "chroot");
    // A guest sees what the host wrote when it opens a file, and names and attributes within 1 s;
    // files can be mapped, which programs need to be run.
    args.pair("--cache", "auto");
    // File systems keep their own identity in the guest: inode numbers of two images never meet.
    args.word("--announce-submounts");
    // File handles instead of open descriptors, where a file system has them.
    args.word("--inode-file-handles=prefer");
    // Capabilities of files, and users' own attributes.
    args.word("--xattr");
    args.pair("--log-level", "warn");
    args.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_arguments() {
        let words = arguments(Path::new("/run/bulkhead/0123/share"), 9);
        let words: Vec<&str> = words.iter().filter_map(|w| w.to_str()).collect();
        assert_eq!(
            words.join(" "),
            "--shared-dir /run/bulkhead/0123/share --fd 9 --sandbox chroot --cache auto --announce-submounts \
             --inode-file-handles=prefer --xattr --log-level warn"
        );
    }
}
