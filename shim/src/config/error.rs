//! What can be wrong with a configuration, in the words that an operator reads.

use std::fmt;
use std::path::PathBuf;

use thiserror::Error;

/// Where in which text a value stands. Lines and columns count from 1; columns count characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// A file's path, or another name of the text.
    pub origin: String,
    /// Line and column, where the origin has any.
    pub position: Option<(usize, usize)>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.position {
            Some((line, column)) => write!(f, "{}:{line}:{column}", self.origin),
            None => f.write_str(&self.origin),
        }
    }
}

/// What is wrong with a configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {} ({named_by})", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What named it.
        named_by: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The text is not TOML.
    #[error("{place}: not valid TOML: {message}")]
    Syntax {
        /// Where.
        place: Place,
        /// What the parser says.
        message: String,
    },
    /// No such key.
    #[error("{place}: unknown key `{key}`; {advice}")]
    UnknownKey {
        /// Where.
        place: Place,
        /// The key in full, with its sections.
        key: String,
        /// The nearest key, or the keys that there are.
        advice: String,
    },
    /// A value of another type than the key's.
    #[error("{place}: `{key}` must be {expected}, not {found}")]
    WrongType {
        /// Where.
        place: Place,
        /// The key in full.
        key: String,
        /// What it takes.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A value of the right type that cannot be used.
    #[error("{place}: `{key}` is {value}, but must be {expected}")]
    BadValue {
        /// Where.
        place: Place,
        /// The key in full.
        key: String,
        /// What is there.
        value: String,
        /// What it takes.
        expected: String,
    },
    /// Less memory than the guest needs to boot.
    #[error(
        "{origin}: `sandbox.memory_mib` and `sandbox.memory_reserve_mib` make {total} MiB together, \
         but the guest needs at least {minimum} MiB to boot"
    )]
    TooLittleMemory {
        /// What was read last.
        origin: String,
        /// The sum of both.
        total: u64,
        /// The least sum.
        minimum: u64,
    },
    /// containerd's runtime options cannot be decoded.
    #[error("containerd's runtime options of type `{type_url}` cannot be decoded: {message}")]
    Options {
        /// The type they claim.
        type_url: String,
        /// Why not.
        message: String,
    },
    /// The administrator does not let pods set this key.
    #[error(
        "annotation `{annotation}`: the administrator does not allow it; \
         add \"{key}\" to the key `annotations.allowed` of the configuration to allow it"
    )]
    AnnotationNotAllowed {
        /// The annotation.
        annotation: String,
        /// The key it would set.
        key: String,
    },
    /// No key may be set by this annotation.
    #[error("annotation `{annotation}`: {advice}")]
    UnknownAnnotation {
        /// The annotation.
        annotation: String,
        /// The nearest annotation, or why there is none.
        advice: String,
    },
    /// A program is nowhere to be found, or cannot be run.
    #[error("{program} (key `{key}`): {reason}; {advice}")]
    Program {
        /// As configured.
        program: String,
        /// The key that names it.
        key: &'static str,
        /// Where it was looked for, or what is wrong with it.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// The guest's kernel or image cannot be used.
    #[error("{} (key `{key}`): {reason}; {advice}", path.display())]
    GuestFile {
        /// The file.
        path: PathBuf,
        /// The key that names it.
        key: &'static str,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        advice: String,
    },
}
