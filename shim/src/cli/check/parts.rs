//! Facts about the programs and files that a machine is made of.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::super::output;
use super::super::process;
use super::Fact;
use crate::config::{Config, ConfigError};

/// The oldest QEMU with which guests were tested.
const OLDEST_QEMU: (u32, u32) = (7, 2);

pub(super) fn facts(config: &Config) -> Vec<Fact> {
    vec![
        qemu(config.resolve_qemu()),
        program("vmm", config.resolve_vmm()),
        program("virtiofsd", config.resolve_virtiofsd()),
        program("vhost-device-vsock", config.resolve_vhost_device_vsock()),
        file("guest-kernel", config.resolve_kernel(), |path| {
            kernel_release(path).map(|release| format!("Linux {release}"))
        }),
        file("guest-image", config.resolve_image(), |_| Some("cpio archive".into())),
    ]
}

/// What a program calls its version.
///
/// # Errors
/// Why it does not say, without its name.
pub(in super::super) fn version_of(program: &Path) -> Result<String, String> {
    let said = process::answer(program, &["--version"])?;
    said.lines().next().map(str::to_owned).ok_or_else(|| "prints nothing on `--version`".to_owned())
}

fn program(name: &'static str, found: Result<PathBuf, ConfigError>) -> Fact {
    let path = match found {
        Ok(path) => path,
        Err(error) => return Fact::misconfigured(name, &error),
    };
    match version_of(&path) {
        Ok(version) => Fact::ok(name, format!("{} ({version})", path.display())),
        Err(reason) => {
            Fact::failure(name, format!("{} {reason}", path.display()), "install or build it again")
        }
    }
}

fn qemu(found: Result<PathBuf, ConfigError>) -> Fact {
    let path = found.as_ref().ok().cloned();
    let fact = program("qemu", found);
    let (Some(path), super::Status::Ok) = (path, fact.status) else { return fact };
    if let Some(old) = older_than(&fact.detail, OLDEST_QEMU) {
        let (major, minor) = OLDEST_QEMU;
        return Fact::warning(
            "qemu",
            format!("{}: {old} is untested", fact.detail),
            format!("install {major}.{minor} or later"),
        );
    }
    // Distributions may leave machine types out.
    match process::answer(&path, &["-machine", "help"]) {
        Ok(machines) if machines.lines().any(|line| line.starts_with("microvm ")) => fact,
        Ok(_) => Fact::failure(
            "qemu",
            format!("{} has no machine type `microvm`", path.display()),
            "install a QEMU with it (Debian: qemu-system-x86)",
        ),
        Err(reason) => Fact::failure("qemu", format!("{} {reason}", path.display()), "install it again"),
    }
}

/// The version in `said`, if it is older than `oldest`.
fn older_than(said: &str, oldest: (u32, u32)) -> Option<String> {
    let version = said.split("version ").nth(1)?.split([' ', ')']).next()?;
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().ok());
    let found = (numbers.next()??, numbers.next()??);
    (found < oldest).then(|| version.to_owned())
}

fn file(
    name: &'static str,
    found: Result<PathBuf, ConfigError>,
    about: impl Fn(&Path) -> Option<String>,
) -> Fact {
    match found {
        Err(error) => Fact::misconfigured(name, &error),
        Ok(path) => {
            let size = std::fs::metadata(&path).map(|metadata| metadata.len()).unwrap_or(0);
            let about = about(&path).map(|about| format!("{about}, ")).unwrap_or_default();
            Fact::ok(name, format!("{} ({about}{})", path.display(), output::mib(size)))
        }
    }
}

/// The release of an uncompressed kernel: the words after `Linux version` in its banner.
pub(in super::super) fn kernel_release(path: &Path) -> Option<String> {
    release_in(BufReader::new(File::open(path).ok()?))
}

fn release_in(mut from: impl Read) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    /// Longer than any release, so that one which is cut by the end of a block is seen whole in the next.
    const OVERLAP: usize = 128;
    let mut window = Vec::new();
    loop {
        let kept = window.len().min(OVERLAP);
        window.drain(..window.len() - kept);
        let read = from.by_ref().take(1 << 20).read_to_end(&mut window).ok()?;
        let found = window.windows(BANNER.len()).enumerate().filter(|(_, bytes)| *bytes == BANNER).find_map(
            |(at, _)| {
                let rest = &window[at + BANNER.len()..];
                let end = rest.iter().position(|byte| *byte == b' ')?;
                let release = std::str::from_utf8(&rest[..end]).ok()?;
                // A format string of the kernel reads `Linux version %s`.
                release.starts_with(|first: char| first.is_ascii_digit()).then(|| release.to_owned())
            },
        );
        if found.is_some() || read == 0 {
            return found;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn a_release_is_found_across_blocks() {
        for gap in [0, (1 << 20) - 20, (1 << 20) - 7, 3 << 20] {
            let mut kernel = b"Linux version %s x".to_vec();
            kernel.resize(kernel.len() + gap, 0);
            kernel.extend(b"Linux version 6.12.9-bulkhead (someone@somewhere) #1");
            assert_eq!(release_in(&kernel[..]).as_deref(), Some("6.12.9-bulkhead"), "{gap}");
        }
        assert_eq!(release_in(&b"Linux versio"[..]), None);
    }

    #[test]
    fn old_versions_are_told_from_new_ones() {
        let said = |version: &str| format!("/q (QEMU emulator version {version} (Debian 1:7.2+dfsg-7))");
        assert_eq!(older_than(&said("5.2.0"), (7, 2)).as_deref(), Some("5.2.0"));
        assert_eq!(older_than(&said("7.1.99"), (7, 2)).as_deref(), Some("7.1.99"));
        assert_eq!(older_than(&said("7.2.22"), (7, 2)), None);
        assert_eq!(older_than(&said("10.0.2"), (7, 2)), None);
    }

    #[test]
    fn a_program_that_does_not_run_is_a_failure() {
        let fact = program("virtiofsd", Ok("/bin/false".into()));
        assert_eq!(fact.status, Status::Failure);
        assert!(fact.detail.starts_with("/bin/false fails on `--version`"), "{}", fact.detail);
    }
}
