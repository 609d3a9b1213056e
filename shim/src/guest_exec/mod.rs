//! Programs in the guest itself, by which an operator looks at it: what `bulkhead exec` and a shim say to each other.
//! Knows neither the guest nor a terminal: the door asks the one, the command has the other.
//!
//! A connection to the socket in the pod's directory begins with a line that says what it is. What is said is a line of
//! JSON each; a stream has nothing but its bytes after its first line, in one direction.
//! ```text
//!  bulkhead exec                                      shim
//!    Run ───────────────────────────────────────────▶
//!    ◀──────────────────────────────────────── Streams   a name for each stream that there is
//!    Stream, on a further connection for each ───────▶   joins it to the guest's
//!    ◀──────────────────────────────────────── Started
//!    Resize ────────────────────────────────────────▶
//!    ◀──────────────────────────────────────── Exited    or Failed, at any time
//! ```
//! A stream ends by a half-close. When the first connection ends, the program is killed with all that it has started.

pub mod door;
mod exits;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use exits::Exits;

/// The socket in a sandbox's directory, for root alone. It is there where `agent.debug_exec` is on.
pub const SOCKET: &str = "exec.sock";

/// What a connection is.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Opening {
    /// Asks for a program.
    Run(Program),
    /// A stream, by the name that it was given.
    Stream(String),
}

/// A program to be run in the guest.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct Program {
    /// The container whose files it uses; empty for the only one.
    pub root: String,
    /// The program and its arguments.
    pub args: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// Whether it has an input.
    pub stdin: bool,
    /// Set if it has a terminal.
    pub terminal: Option<Size>,
}

/// Without what may be secret: this is for logs.
impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program")
            .field("root", &self.root)
            .field("args", &self.args.len())
            .field("env", &self.env.len())
            .field("stdin", &self.stdin)
            .field("terminal", &self.terminal)
            .finish()
    }
}

/// Size of a terminal in characters; 0 and 0 where it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// What the command says while the program runs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// Its window has another size now.
    Resize(Size),
}

/// What the shim says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The names of the streams that are to be opened.
    Streams(Names),
    /// The program runs.
    Started,
    /// It has ended, with this status: 0-255, 128+n for signal n.
    Exited(u8),
    /// It was not started, or its end is not known, and why.
    Failed(String),
}

/// Names of streams.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// Where there is an input.
    pub stdin: Option<String>,
    /// Always.
    pub stdout: String,
    /// Where there is no terminal.
    pub stderr: Option<String>,
}

/// What is said, as it goes over the socket.
pub fn line(said: &impl Serialize) -> String {
    let mut line = serde_json::to_string(said).expect("it is plain data");
    line.push('\n');
    line
}
