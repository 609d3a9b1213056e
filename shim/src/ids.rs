//! Names of containers and processes.
//! Knows only what such a name may look like.

use std::fmt;

use crate::error::{Fault, Kind};

/// The longest id that containerd accepts, in bytes (its `pkg/identifiers`).
const MAX_LEN: usize = 76;

/// Id of a container, unique within its namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId(String);

/// Id of a further process of a container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExecId(String);

/// One process: a container's init, or an exec of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessKey {
    /// Its container.
    pub container: ContainerId,
    /// None for the init.
    pub exec: Option<ExecId>,
}

impl ProcessKey {
    /// The init of `container`.
    pub fn init(container: &ContainerId) -> Self {
        Self { container: container.clone(), exec: None }
    }

    /// The exec id as containerd writes it: empty for the init.
    pub fn exec_str(&self) -> &str {
        self.exec.as_ref().map_or("", ExecId::as_str)
    }

    /// From the two fields of containerd's requests.
    pub fn parse(container: &str, exec: &str) -> Result<Self, Fault> {
        let exec = if exec.is_empty() { None } else { Some(ExecId::parse(exec)?) };
        Ok(Self { container: ContainerId::parse(container)?, exec })
    }
}

impl fmt::Display for ProcessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            None => write!(f, "container {}", self.container),
            Some(exec) => write!(f, "exec {exec} of container {}", self.container),
        }
    }
}

macro_rules! id {
    ($name:ident, $what:literal) => {
        impl $name {
            /// Accepts what containerd accepts; ids become names of files and directories.
            pub fn parse(text: &str) -> Result<Self, Fault> {
                check(text, $what)?;
                Ok(Self(text.to_owned()))
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(ContainerId, "container id");
id!(ExecId, "exec id");

fn check(text: &str, what: &str) -> Result<(), Fault> {
    let fits = !text.is_empty()
        && text.len() <= MAX_LEN
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && text.as_bytes()[0].is_ascii_alphanumeric()
        && text.as_bytes()[text.len() - 1].is_ascii_alphanumeric();
    if fits {
        return Ok(());
    }
    Err(Fault::new(
        Kind::InvalidArgument,
        format!(
            "{what} {text:?}: letters, digits and single '-', '_' or '.' between them, at most {MAX_LEN}"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_would_leave_their_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "/a", "a/../b", "-a", "a-", &"a".repeat(77)] {
            assert!(ContainerId::parse(bad).is_err(), "{bad}");
        }
        for good in ["a", "web-1.x_y", &"a".repeat(76)] {
            assert!(ContainerId::parse(good).is_ok(), "{good}");
        }
    }
}
