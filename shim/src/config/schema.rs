//! What each key takes: the one table behind checks, messages and annotations.
//! Knows nothing of the values themselves; a test holds it equal to the structs.

use super::error::Place;
use super::{ConfigError, Pattern};

/// The longest path of `state_dir`: a sandbox's directory (16 digits) and the longest socket name in it must
/// fit into the 107 bytes of a unix socket's path (unix(7)).
const STATE_DIR_BYTES: usize = 68;

/// What values a key takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// An absolute path, of at most this many bytes.
    Path(usize),
    /// An absolute path, or a bare name to be looked up.
    Program,
    /// true or false.
    Switch,
    /// A whole number from the first to the second.
    Integer(u64, u64),
    /// A list of keys.
    Keys,
    /// A list of [`Pattern`]s.
    Patterns,
}

/// A key and what it takes.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// The name in full, such as `sandbox.memory_mib`.
    pub name: &'static str,
    /// What values it takes.
    pub kind: Kind,
    /// Whether an annotation of a pod may set it where the administrator allows it.
    pub per_pod: bool,
}

const fn key(name: &'static str, kind: Kind) -> Key {
    Key { name, kind, per_pod: true }
}

const fn host_key(name: &'static str, kind: Kind) -> Key {
    Key { name, kind, per_pod: false }
}

const ANY_PATH: Kind = Kind::Path(4095);
const LOG_LEVELS: &[&str] = &["off", "error", "warn", "info", "debug", "trace"];

/// Every key.
pub const KEYS: &[Key] = &[
    host_key("state_dir", Kind::Path(STATE_DIR_BYTES)),
    key("log_level", Kind::Choice(LOG_LEVELS)),
    host_key("trace_file", ANY_PATH),
    key("hypervisor.backend", Kind::Choice(&["auto", "kvm", "emulation"])),
    key("hypervisor.kernel", ANY_PATH),
    key("hypervisor.image", ANY_PATH),
    key("hypervisor.kernel_params", Kind::Text),
    host_key("hypervisor.vmm", Kind::Program),
    host_key("hypervisor.qemu", Kind::Program),
    host_key("hypervisor.virtiofsd", Kind::Program),
    host_key("hypervisor.vhost_device_vsock", Kind::Program),
    key("hypervisor.boot_timeout_seconds", Kind::Integer(1, 3600)),
    key("sandbox.memory_mib", Kind::Integer(1, 16 << 20)),
    key("sandbox.memory_reserve_mib", Kind::Integer(0, 1 << 20)),
    key("sandbox.vcpus", Kind::Integer(1, 255)),
    key("sandbox.max_vcpus", Kind::Integer(0, 255)),
    key("sandbox.max_memory_mib", Kind::Integer(0, 1 << 20)),
    key("network.spare_cards", Kind::Integer(0, 6)),
    key("storage.spare_disks", Kind::Integer(0, 6)),
    key("agent.request_timeout_seconds", Kind::Integer(1, 3600)),
    key("agent.debug_exec", Kind::Switch),
    host_key("volumes.host_sockets", Kind::Patterns),
    host_key("annotations.allowed", Kind::Keys),
];

/// The key of this name.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// Whether keys live under this name.
pub(super) fn is_section(name: &str) -> bool {
    KEYS.iter().any(|key| key.name.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')))
}

/// What to say of a name that is neither key nor section.
pub(super) fn advice(name: &str) -> String {
    let (section, _) = name.rsplit_once('.').unwrap_or(("", name));
    if let Some(near) = nearest(name, KEYS.iter().map(|key| key.name).chain(sections())) {
        return if is_section(near) {
            format!("did you mean `[{near}]`?")
        } else {
            format!("did you mean `{near}`?")
        };
    }
    // A right key in the wrong section is not near by its letters.
    let last = name.rsplit('.').next().unwrap_or(name);
    if let Some(elsewhere) = KEYS.iter().find(|key| key.name.rsplit('.').next() == Some(last)) {
        return format!("did you mean `{}`?", elsewhere.name);
    }
    let (place, siblings) = match is_section(section) {
        true => (format!("`[{section}]` has"), keys_under(section)),
        false => ("the sections are".to_owned(), sections().map(|name| format!("`[{name}]`")).collect()),
    };
    format!("{place} {}", siblings.join(", "))
}

fn keys_under(section: &str) -> Vec<String> {
    let under = |key: &Key| key.name.strip_prefix(section)?.strip_prefix('.').map(|rest| format!("`{rest}`"));
    KEYS.iter().filter_map(under).collect()
}

fn sections() -> impl Iterator<Item = &'static str> {
    let mut seen = Vec::new();
    KEYS.iter().filter_map(|key| key.name.split_once('.')).map(|(section, _)| section).filter(
        move |section| {
            let new = !seen.contains(section);
            seen.push(*section);
            new
        },
    )
}

/// The candidate with the fewest edits to `name`, if it is near enough to be a slip of the hand.
pub(crate) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let (distance, best) = candidates.map(|other| (edits(name, other), other)).min_by_key(|(d, _)| *d)?;
    (distance <= name.chars().count().div_ceil(4).max(2)).then_some(best)
}

/// Insertions, deletions, replacements and swaps of neighbours that turn one word into the other.
fn edits(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut table = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            if i == 0 || j == 0 {
                table[i][j] = i + j;
                continue;
            }
            let replaced = table[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replaced.min(table[i - 1][j] + 1).min(table[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(table[i - 2][j - 2] + 1);
            }
            table[i][j] = least;
        }
    }
    table[a.len()][b.len()]
}

impl Key {
    /// What the key takes, as the end of a sentence that begins with "must be".
    pub(super) fn expected(&self) -> String {
        match self.kind {
            Kind::Text => "a string".into(),
            Kind::Choice(words) => format!("one of {}", quoted(words)),
            Kind::Path(4095) => "an absolute path as a string".into(),
            Kind::Path(most) => format!("an absolute path of at most {most} bytes as a string"),
            Kind::Program => "an absolute path or the name of a program as a string".into(),
            Kind::Switch => "true or false".into(),
            Kind::Integer(least, most) => format!("a whole number from {least} to {most}"),
            Kind::Keys => "a list of keys, such as [\"sandbox.memory_mib\"]".into(),
            Kind::Patterns => "a list of paths, such as [\"/run/app/*.sock\"]".into(),
        }
    }

    /// Checks a value of the right TOML type.
    pub(super) fn check(&self, value: &toml::Value, place: &Place) -> Result<(), ConfigError> {
        let fits = match (self.kind, value) {
            (Kind::Text, toml::Value::String(_)) => true,
            (Kind::Choice(words), toml::Value::String(word)) => words.contains(&word.as_str()),
            (Kind::Path(most), toml::Value::String(path)) => path.starts_with('/') && path.len() <= most,
            (Kind::Program, toml::Value::String(path)) => {
                path.starts_with('/') || !path.is_empty() && !path.contains('/')
            }
            (Kind::Switch, toml::Value::Boolean(_)) => true,
            (Kind::Integer(least, most), toml::Value::Integer(number)) => {
                u64::try_from(*number).is_ok_and(|number| (least..=most).contains(&number))
            }
            (Kind::Keys, toml::Value::Array(items)) => {
                return self.check_items(items, value, place, check_name);
            }
            (Kind::Patterns, toml::Value::Array(items)) => {
                let check = |text: &str| {
                    Pattern::parse(text).map(drop).map_err(|why| format!("a list of paths; `{text}` {why}"))
                };
                return self.check_items(items, value, place, check);
            }
            _ => return Err(self.wrong_type(a_type(value), place)),
        };
        if fits {
            return Ok(());
        }
        Err(ConfigError::BadValue {
            place: place.clone(),
            key: self.name.into(),
            value: value.to_string(),
            expected: self.expected(),
        })
    }

    /// `check` says of an item that is not right what the key must be.
    fn check_items(
        &self,
        items: &[toml::Value],
        whole: &toml::Value,
        place: &Place,
        check: impl Fn(&str) -> Result<(), String>,
    ) -> Result<(), ConfigError> {
        for item in items {
            let toml::Value::String(text) = item else {
                return Err(self.wrong_type(&format!("a list that holds {}", a_type(item)), place));
            };
            check(text).map_err(|expected| ConfigError::BadValue {
                place: place.clone(),
                key: self.name.into(),
                value: whole.to_string(),
                expected,
            })?;
        }
        Ok(())
    }

    pub(super) fn wrong_type(&self, found: &str, place: &Place) -> ConfigError {
        ConfigError::WrongType {
            place: place.clone(),
            key: self.name.into(),
            expected: self.expected(),
            found: found.into(),
        }
    }
}

/// Whether a pod may be allowed to set the key of this name.
fn check_name(name: &str) -> Result<(), String> {
    match find(name) {
        None => Err(format!("a list of keys; there is no key `{name}`: {}", advice(name))),
        Some(key) if !key.per_pod => {
            Err(format!("a list of keys that a pod may set; `{name}` belongs to the host alone"))
        }
        Some(_) => Ok(()),
    }
}

fn quoted(words: &[&str]) -> String {
    words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", ")
}

/// A TOML type with its article.
fn a_type(value: &toml::Value) -> &'static str {
    match value {
        toml::Value::String(_) => "a string",
        toml::Value::Integer(_) => "an integer",
        toml::Value::Float(_) => "a float",
        toml::Value::Boolean(_) => "a boolean",
        toml::Value::Datetime(_) => "a date",
        toml::Value::Array(_) => "a list",
        toml::Value::Table(_) => "a section",
    }
}
