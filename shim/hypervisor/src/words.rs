//! Words of a command line, put together.
//! Knows no program.

use std::ffi::{OsStr, OsString};

/// A command line that grows.
#[derive(Default)]
pub(crate) struct Words(pub(crate) Vec<OsString>);

impl Words {
    /// Adds one word.
    pub(crate) fn word(&mut self, word: impl Into<OsString>) -> &mut Self {
        self.0.push(word.into());
        self
    }
    /// Adds an option and its value, as two words.
    pub(crate) fn pair(&mut self, option: &str, value: impl Into<OsString>) -> &mut Self {
        self.word(option).word(value)
    }
    /// Adds an option and a value that need not be text.
    pub(crate) fn option(&mut self, option: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.pair(option, value.as_ref())
    }
}
