//! The last steps of a process before its program: directory, capabilities, seccomp filter, execve.
//! Knows the process as its specification wants it; namespaces and mounts are libcontainer's.
//!
//! libcontainer could do these too, but would give an exec no seccomp filter, create no missing directory, leave
//! the streams to root, ask NSS of the container for HOME, and say errors in words that no user knows.
//! The order is runc's: as user of the container but with all capabilities: terminal, ownership of streams,
//! directory; then the filter, unless no_new_privs lets it come last; then capabilities; then the program.

use std::{
    cell::OnceCell,
    collections::HashMap,
    convert::Infallible,
    env,
    ffi::CString,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, RawFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use libcontainer::{
    capabilities,
    syscall::syscall::SyscallType,
    workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError},
};
use nix::{
    sys::stat::{SFlag, fstat, major, minor},
    unistd::{AccessFlags, Gid, Uid, access, execve, fchown, setfsgid, setfsuid},
};
use oci_spec::runtime::{Capabilities, LinuxCapabilities, LinuxSeccomp, Spec};
use serde::{Deserialize, Serialize};

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Size {
    pub(crate) width: u16,
    pub(crate) height: u16,
}

/// What is left to be done when namespaces, mounts and user are in place.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LastMile {
    /// The container's init, or a further process?
    pub(crate) init: bool,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) cwd: PathBuf,
    pub(crate) uid: u32,
    /// Sees a 32-bit machine (linux.personality).
    pub(crate) linux32: bool,
    /// None = no capability at all.
    pub(crate) capabilities: Option<LinuxCapabilities>,
    pub(crate) seccomp: Option<LinuxSeccomp>,
    pub(crate) no_new_privileges: bool,
    /// Present if the process has a terminal.
    pub(crate) terminal: Option<Size>,
}

/// Exit status of an init whose program could not be executed after all, as runc has it.
const EXIT_EXEC_FAILED: i32 = 255;

/// Carries a [`LastMile`] through libcontainer.
#[derive(Clone)]
pub(super) struct LastMileExecutor {
    pub(super) todo: LastMile,
    /// Where the reason of a failure goes, word for word.
    pub(super) report: RawFd,
    program: OnceCell<CString>,
}

impl LastMileExecutor {
    pub(super) fn new(todo: LastMile, report: RawFd) -> Self {
        Self { todo, report, program: OnceCell::new() }
    }

    pub(super) fn prepare(&self) -> Result<(), String> {
        let todo = &self.todo;
        if todo.linux32 {
            crate::sys::see_32_bits().map_err(|e| format!("linux.personality: {}", why(&e)))?;
        }
        self.size_terminal()?;
        own_streams(todo.uid).map_err(|e| format!("give the streams to uid {}: {}", todo.uid, why(&e)))?;
        enter(&todo.cwd, todo.init)?;
        if !todo.no_new_privileges {
            self.filter()?;
        }
        drop_capabilities(todo.capabilities.as_ref())?;
        self.find()
    }

    /// In place of [`LastMileExecutor::prepare`] for a program that keeps every power that this process has.
    pub(super) fn prepare_unconfined(&self) -> Result<(), String> {
        self.size_terminal()?;
        enter(&self.todo.cwd, false)?;
        self.find()
    }

    fn size_terminal(&self) -> Result<(), String> {
        match self.todo.terminal {
            Some(Size { width, height }) if (width, height) != (0, 0) => {
                crate::sys::set_winsize(io::stdin().as_fd(), width, height)
                    .map_err(|e| format!("set the size of the terminal to {width}x{height}: {}", why(&e)))
            }
            _ => Ok(()),
        }
    }

    fn find(&self) -> Result<(), String> {
        let program = look_up(&self.todo.args, &self.todo.env)?;
        self.program.set(program).map_err(|_| "prepared twice".to_owned())
    }

    fn filter(&self) -> Result<(), String> {
        let Some(profile) = &self.todo.seccomp else { return Ok(()) };
        libcontainer::seccomp::initialize_seccomp(profile)
            .map(|_| ())
            .map_err(|e| format!("seccomp: {}", super::worker::chain(&e)))
    }

    /// Does not return but with an error.
    pub(super) fn execute(&self) -> Result<Infallible, String> {
        let todo = &self.todo;
        if todo.no_new_privileges {
            self.filter()?;
        }
        let program = self.program.get().ok_or("not prepared")?;
        let c_strings = |texts: &[String]| -> Result<Vec<CString>, String> {
            texts
                .iter()
                .map(|text| {
                    CString::new(text.as_bytes()).map_err(|_| format!("{text:?} contains a NUL byte"))
                })
                .collect()
        };
        let args = c_strings(&todo.args)?;
        let env = c_strings(&with_home(&todo.env, todo.uid))?;
        crate::sys::reset_signals();
        let Err(e) = execve(program, &args, &env);
        Err(format!("exec {}: {}", program.to_string_lossy(), why(&e.into())))
    }

    fn reported<T>(&self, result: Result<T, String>) -> Result<T, String> {
        if let Err(reason) = &result {
            crate::sys::write_raw(self.report, reason.as_bytes());
        }
        result
    }
}

impl Executor for LastMileExecutor {
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        self.reported(self.prepare()).map_err(ExecutorValidationError::ArgValidationError)
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // The program gets its environment by execve, in the order of its specification.
        Ok(())
    }

    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        let Err(reason) = self.reported(self.execute());
        if self.todo.init {
            // The answer to Create was given long ago; the container's own stderr is what is left.
            eprintln!("{reason}");
            std::process::exit(EXIT_EXEC_FAILED);
        }
        Err(ExecutorError::Other(reason))
    }
}

/// The kernel's words without Rust's "(os error 2)", lower case, as users know them from runc.
pub(super) fn why(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => {
            let text = nix::errno::Errno::from_raw(code).desc();
            let mut chars = text.chars();
            // Leave words like "I/O error" alone.
            match (chars.next(), text.chars().nth(1)) {
                (Some(first), Some(second)) if second.is_lowercase() => {
                    first.to_lowercase().chain(chars).collect()
                }
                _ => text.to_owned(),
            }
        }
        None => error.to_string(),
    }
}

/// Lets the user of the container reopen its streams, by /dev/stdout for example.
fn own_streams(uid: u32) -> io::Result<()> {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        own_stream(stream, uid, None)?;
    }
    Ok(())
}

pub(super) fn own_stream(stream: BorrowedFd<'_>, uid: u32, gid: Option<u32>) -> io::Result<()> {
    let stat = fstat(stream)?;
    let null = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR
        && (major(stat.st_rdev), minor(stat.st_rdev)) == (1, 3);
    if null || (stat.st_uid == uid && gid.is_none_or(|gid| stat.st_gid == gid)) {
        return Ok(());
    }
    match fchown(stream, Some(Uid::from_raw(uid)), gid.map(Gid::from_raw)) {
        // An id that the user namespace does not map, or a file system without owners.
        Err(nix::Error::EINVAL | nix::Error::EPERM | nix::Error::EROFS) => Ok(()),
        result => result.map_err(io::Error::from),
    }
}

/// Makes `cwd` the current directory; for an init it is created where it is missing, and root's, as runc does.
fn enter(cwd: &Path, create: bool) -> Result<(), String> {
    if create && !cwd.exists() {
        let (uid, gid) = (setfsuid(Uid::from_raw(0)), setfsgid(Gid::from_raw(0)));
        let created = fs::create_dir_all(cwd);
        setfsgid(gid);
        setfsuid(uid);
        created.map_err(|e| format!("mkdir {}: {}", cwd.display(), why(&e)))?;
    }
    env::set_current_dir(cwd)
        .map_err(|e| format!("chdir to cwd ({cwd:?}) set in config.json failed: {}", why(&e)))?;
    // A directory outside of the container, reached by a descriptor, has no path.
    match env::current_dir() {
        Ok(path) if path.is_absolute() => Ok(()),
        _ => Err(format!("cwd ({cwd:?}) is outside of the container")),
    }
}

fn drop_capabilities(wanted: Option<&LinuxCapabilities>) -> Result<(), String> {
    let empty = Capabilities::new();
    let of = |set: &dyn Fn(&LinuxCapabilities) -> Option<Capabilities>| {
        Some(wanted.and_then(set).unwrap_or_else(|| empty.clone()))
    };
    // libcontainer leaves a set that is absent as it is; ours are full until here.
    let mut all = LinuxCapabilities::default();
    all.set_bounding(of(&|c| c.bounding().clone()))
        .set_effective(of(&|c| c.effective().clone()))
        .set_permitted(of(&|c| c.permitted().clone()))
        .set_inheritable(of(&|c| c.inheritable().clone()))
        .set_ambient(of(&|c| c.ambient().clone()));
    capabilities::drop_privileges(&all, SyscallType::default().create_syscall().as_ref())
        .map_err(|e| format!("apply capabilities: {}", super::worker::chain(&e)))
}

/// Finds the program as runc does, with its words for what is wrong.
fn look_up(args: &[String], env: &[String]) -> Result<CString, String> {
    let name = args.first().map(String::as_str).unwrap_or_default();
    let found = if name.contains('/') {
        executable(Path::new(name)).map_err(|reason| format!("exec: {name:?}: {reason}"))?
    } else {
        let path = env.iter().rev().find_map(|var| var.strip_prefix("PATH=")).unwrap_or_default();
        path.split(':')
            .map(|dir| Path::new(if dir.is_empty() { "." } else { dir }).join(name))
            .find_map(|candidate| executable(&candidate).ok())
            .filter(|_| !name.is_empty() && !path.is_empty())
            .ok_or_else(|| format!("exec: {name:?}: executable file not found in $PATH"))?
    };
    CString::new(found.as_os_str().as_bytes()).map_err(|_| format!("{name:?} contains a NUL byte"))
}

fn executable(path: &Path) -> Result<PathBuf, String> {
    let meta = fs::metadata(path).map_err(|e| format!("stat {}: {}", path.display(), why(&e)))?;
    if meta.is_dir() {
        return Err("is a directory".into());
    }
    // access() answers for the real user, who is the effective one here. Without any x bit root is refused too.
    if meta.mode() & 0o111 == 0 {
        return Err("permission denied".into());
    }
    match access(path, AccessFlags::X_OK) {
        Ok(()) => Ok(path.to_owned()),
        Err(e) => Err(why(&e.into())),
    }
}

/// Adds HOME from the container's /etc/passwd where the specification has none, as runc does.
fn with_home(env: &[String], uid: u32) -> Vec<String> {
    let mut env = env.to_vec();
    if !env.iter().any(|var| var.strip_prefix("HOME=").is_some_and(|home| !home.is_empty())) {
        env.retain(|var| !var.starts_with("HOME="));
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        env.push(format!("HOME={}", home_of(&passwd, uid).unwrap_or("/")));
    }
    env
}

fn home_of(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let same = fields.get(2)?.parse() == Ok(uid);
        fields.get(5).filter(|home| same && !home.is_empty()).copied()
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn message(args: &[&str], path: &str) -> String {
        let args: Vec<_> = args.iter().map(|a| a.to_string()).collect();
        match look_up(&args, &[format!("PATH={path}")]) {
            Ok(found) => found.to_string_lossy().into_owned(),
            Err(reason) => reason,
        }
    }

    #[test]
    fn a_missing_command_is_named_as_runc_names_it() {
        assert_eq!(
            message(&["nope"], "/bin:/usr/bin"),
            r#"exec: "nope": executable file not found in $PATH"#
        );
        assert_eq!(message(&["/x"], "/bin"), r#"exec: "/x": stat /x: no such file or directory"#);
        assert_eq!(message(&["/etc/passwd"], "/bin"), r#"exec: "/etc/passwd": permission denied"#);
        assert_eq!(message(&["/etc"], "/bin"), r#"exec: "/etc": is a directory"#);
        assert_eq!(
            message(&["/etc/passwd/x"], "/bin"),
            r#"exec: "/etc/passwd/x": stat /etc/passwd/x: not a directory"#
        );
        assert_eq!(message(&[""], "/bin"), r#"exec: "": executable file not found in $PATH"#);
        assert_eq!(message(&["sh"], ""), r#"exec: "sh": executable file not found in $PATH"#);
    }

    #[test]
    fn the_path_is_searched_in_order_and_past_what_cannot_be_executed() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("a"), dir.path().join("b"));
        for (dir, mode) in [(&first, 0o644), (&second, 0o755)] {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("tool"), "").unwrap();
            fs::set_permissions(dir.join("tool"), fs::Permissions::from_mode(mode)).unwrap();
        }
        let path = format!("{}:{}", first.display(), second.display());
        assert_eq!(message(&["tool"], &path), second.join("tool").display().to_string());
    }

    #[test]
    fn home_comes_from_the_passwd_of_the_container() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nuser:x:1000:1000::/home/user:/bin/sh\n";
        assert_eq!(home_of(passwd, 0), Some("/root"));
        assert_eq!(home_of(passwd, 1000), Some("/home/user"));
        assert_eq!(home_of(passwd, 7), None);
        let given = vec!["HOME=/given".to_owned()];
        assert_eq!(with_home(&given, 0), given);
    }

    #[test]
    fn a_missing_directory_is_made_for_an_init_only() {
        let dir = tempfile::tempdir().unwrap();
        let before = env::current_dir().unwrap();
        let missing = dir.path().join("a/b");
        let reason = enter(&missing, false).unwrap_err();
        assert!(reason.ends_with("set in config.json failed: no such file or directory"), "{reason}");
        enter(&missing, true).unwrap();
        assert_eq!(env::current_dir().unwrap(), missing.canonicalize().unwrap());
        env::set_current_dir(before).unwrap();
    }

    #[test]
    fn the_kernel_speaks_in_lower_case() {
        assert_eq!(why(&io::Error::from_raw_os_error(libc::ENOENT)), "no such file or directory");
        assert_eq!(why(&io::Error::from_raw_os_error(libc::EIO)), "I/O error");
    }
}
