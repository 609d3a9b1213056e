//! Finds the programs and files that a configuration names, and says what is wrong with them.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::{Config, ConfigError};

/// Where our own package puts helper programs that are not meant for an operator's PATH.
const LIBEXEC: &str = "/usr/libexec/bulkhead";

/// What a guest boots from, each seen to be readable and of the right format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFiles {
    /// Uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// Uncompressed cpio archive.
    pub image: PathBuf,
}

impl Config {
    /// Finds our machine monitor: an absolute path as it is; a bare name on PATH, then beside our own executable,
    /// then in `/usr/libexec/bulkhead`.
    ///
    /// # Errors
    /// It is missing or cannot be executed; the text names the key and what to do.
    pub fn resolve_vmm(&self) -> Result<PathBuf, ConfigError> {
        resolve(
            &self.hypervisor.vmm,
            "hypervisor.vmm",
            "it comes with bulkhead, beside the shim; `make build` builds it",
        )
    }

    /// Finds QEMU.
    ///
    /// # Errors
    /// As [`Config::resolve_vmm`].
    pub fn resolve_qemu(&self) -> Result<PathBuf, ConfigError> {
        resolve(
            &self.hypervisor.qemu,
            "hypervisor.qemu",
            "install the package qemu-system-x86 (`apt-get install qemu-system-x86`)",
        )
    }

    /// Finds virtiofsd.
    ///
    /// # Errors
    /// As [`Config::resolve_vmm`].
    pub fn resolve_virtiofsd(&self) -> Result<PathBuf, ConfigError> {
        resolve(
            &self.hypervisor.virtiofsd,
            "hypervisor.virtiofsd",
            "`make parts` builds it; an installed one is named by the key",
        )
    }

    /// Finds vhost-device-vsock.
    ///
    /// # Errors
    /// As [`Config::resolve_vmm`].
    pub fn resolve_vhost_device_vsock(&self) -> Result<PathBuf, ConfigError> {
        resolve(
            &self.hypervisor.vhost_device_vsock,
            "hypervisor.vhost_device_vsock",
            "`make parts` builds it; an installed one is named by the key",
        )
    }

    /// Sees that the guest's kernel and image can be read and are of the right format.
    ///
    /// # Errors
    /// The first that is not, with its path, its key and what to do.
    pub fn resolve_guest(&self) -> Result<GuestFiles, ConfigError> {
        Ok(GuestFiles { kernel: self.resolve_kernel()?, image: self.resolve_image()? })
    }

    /// Sees that the guest's kernel is a readable, uncompressed ELF file for this processor.
    ///
    /// # Errors
    /// As [`Config::resolve_guest`].
    pub fn resolve_kernel(&self) -> Result<PathBuf, ConfigError> {
        let path = &self.hypervisor.kernel;
        let head =
            head_of(path, "hypervisor.kernel", "`make kernel` builds one, or name your own by the key")?;
        let wrong = |reason: &str, advice: &str| ConfigError::GuestFile {
            path: path.clone(),
            key: "hypervisor.kernel",
            reason: reason.into(),
            advice: advice.into(),
        };
        // Linux, Documentation/arch/x86/boot.rst: the magic of a compressed kernel image.
        if head.get(0x202..0x206) == Some(b"HdrS".as_slice()) {
            return Err(wrong(
                "is a compressed kernel image (bzImage)",
                "give the uncompressed ELF file `vmlinux` of the same build",
            ));
        }
        if !head.starts_with(b"\x7fELF") {
            return Err(wrong("is not an ELF file", "give an uncompressed kernel, `vmlinux`"));
        }
        // elf(5): EI_CLASS is ELFCLASS64, e_machine is EM_X86_64.
        if head.get(4) != Some(&2) || head.get(18..20) != Some(&[62, 0]) {
            return Err(wrong("is an ELF file for another processor", "give a kernel built for x86-64"));
        }
        Ok(path.clone())
    }

    /// Sees that the guest's image is a readable, uncompressed cpio archive.
    ///
    /// # Errors
    /// As [`Config::resolve_guest`].
    pub fn resolve_image(&self) -> Result<PathBuf, ConfigError> {
        let path = &self.hypervisor.image;
        let head = head_of(path, "hypervisor.image", "`make image` builds one, or name your own by the key")?;
        // Linux, Documentation/driver-api/early-userspace/buffer-format.rst: "newc" without and with checksums.
        if !head.starts_with(b"070701") && !head.starts_with(b"070702") {
            return Err(ConfigError::GuestFile {
                path: path.clone(),
                key: "hypervisor.image",
                reason: "is not an uncompressed cpio archive".into(),
                advice: "give an archive in the format newc (`cpio -H newc -o`), uncompressed".into(),
            });
        }
        Ok(path.clone())
    }
}

fn resolve(program: &Path, key: &'static str, advice: &str) -> Result<PathBuf, ConfigError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let own = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned));
    resolve_in(program, key, advice, &path, own.as_deref())
}

/// [`resolve`], with what it takes from the process as arguments.
pub(super) fn resolve_in(
    program: &Path,
    key: &'static str,
    advice: &str,
    search: &OsStr,
    own: Option<&Path>,
) -> Result<PathBuf, ConfigError> {
    let failed = |reason: String| ConfigError::Program {
        program: program.display().to_string(),
        key,
        reason,
        advice: advice.to_owned(),
    };
    if program.is_absolute() {
        return match runnable(program) {
            Ok(()) => Ok(program.to_owned()),
            Err(reason) => Err(failed(reason)),
        };
    }
    let beside: Vec<PathBuf> = own.into_iter().map(Path::to_owned).chain([PathBuf::from(LIBEXEC)]).collect();
    let mut refused = None;
    for folder in
        std::env::split_paths(search).filter(|folder| folder.is_absolute()).chain(beside.iter().cloned())
    {
        let candidate = folder.join(program);
        match runnable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(reason) if candidate.exists() => {
                refused.get_or_insert(format!("{} {reason}", candidate.display()));
            }
            Err(_) => {}
        }
    }
    let beside: Vec<_> = beside.iter().map(|folder| folder.display().to_string()).collect();
    Err(failed(refused.unwrap_or_else(|| format!("is neither on PATH nor in {}", beside.join(" or in ")))))
}

fn runnable(path: &Path) -> Result<(), String> {
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => "does not exist".to_owned(),
        _ => format!("cannot be reached: {error}"),
    })?;
    match metadata {
        ref other if !other.is_file() => Err("is not a file".into()),
        ref file if file.permissions().mode() & 0o111 == 0 => Err("is not executable".into()),
        _ => Ok(()),
    }
}

/// The first bytes of a file: enough to recognise every format that is told apart here.
fn head_of(path: &Path, key: &'static str, advice: &str) -> Result<Vec<u8>, ConfigError> {
    let failed = |reason: String| ConfigError::GuestFile {
        path: path.to_owned(),
        key,
        reason,
        advice: advice.to_owned(),
    };
    let unreadable = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => failed("does not exist".into()),
        _ => failed(format!("cannot be read: {error}")),
    };
    let mut head = Vec::with_capacity(1024);
    File::open(path).map_err(unreadable)?.take(1024).read_to_end(&mut head).map_err(unreadable)?;
    Ok(head)
}
