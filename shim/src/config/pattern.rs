//! Paths in the configuration that stand for many.
//! Knows text only; looks at no file.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// An absolute path in which names after the first may have wildcards: `*` stands for any bytes, `?` for one, both never for
/// a slash, nor for the dot with which a hidden name begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern {
    folder: PathBuf,
    names: Vec<String>,
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// What is wrong with it, as the end of a sentence that begins with the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let Some(path) = text.strip_prefix('/') else { return Err("is not absolute".into()) };
        let mut names: Vec<String> = path.split('/').map(str::to_owned).collect();
        if let Some(odd) = names.iter().find(|name| matches!(name.as_str(), "" | "." | "..")) {
            return Err(format!("has the name {odd:?} in it"));
        }
        if names.iter().any(|name| name.contains("**")) {
            return Err("has `**` in it; `*` stands for a part of one name".into());
        }
        if text.contains(['[', ']', '{', '}', '\\', '\0']) {
            return Err("has one of `[]{}\\` in it; there are the wildcards `*` and `?` only".into());
        }
        let fixed = names.iter().position(|name| has_wildcard(name)).unwrap_or(names.len() - 1);
        if fixed == 0 && has_wildcard(&names[0]) {
            return Err("has a wildcard in its first name".into());
        }
        let rest = names.split_off(fixed);
        Ok(Self { folder: Path::new("/").join(names.join("/")), names: rest })
    }

    /// What comes before the first name with a wildcard, or before the last name.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The names below that folder, one for each level; at least one.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether this is the path of names below the folder that the pattern stands for.
    pub fn fits(&self, below: &Path) -> bool {
        let names: Vec<_> = below.iter().collect();
        names.len() == self.names.len()
            && names.iter().zip(&self.names).all(|(name, pattern)| name_fits(pattern, name))
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.folder.join(pattern.names.join("/")).to_string_lossy().into_owned()
    }
}

fn has_wildcard(name: &str) -> bool {
    name.contains(['*', '?'])
}

/// Whether one name is what the pattern of one name stands for.
pub fn name_fits(pattern: &str, name: &OsStr) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    if name.first() == Some(&b'.') && pattern.first() != Some(&b'.') {
        return false;
    }
    // Where to go on after the last star if what follows it does not fit: the star takes one byte more.
    let (mut p, mut n, mut again) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                p += 1;
                again = Some((p, n));
            }
            Some(&byte) if byte == b'?' || byte == name[n] => (p, n) = (p + 1, n + 1),
            _ => match again {
                Some((star, from)) => {
                    (p, n) = (star, from + 1);
                    again = Some((star, n));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fits(pattern: &str, below: &str) -> bool {
        Pattern::parse(pattern).unwrap().fits(Path::new(below))
    }

    #[test]
    fn a_pattern_is_a_folder_and_the_names_below_it() {
        for (text, folder, names) in [
            ("/run/docker.sock", "/run", &["docker.sock"][..]),
            ("/run/app/*.sock", "/run/app", &["*.sock"]),
            ("/run/*/x.sock", "/run", &["*", "x.sock"]),
            ("/x.sock", "/", &["x.sock"]),
        ] {
            let pattern = Pattern::parse(text).unwrap();
            assert_eq!(pattern.folder(), Path::new(folder), "{text}");
            assert_eq!(pattern.names(), names, "{text}");
            assert_eq!(String::from(pattern), text);
        }
    }

    #[test]
    fn names_fit_one_level_each() {
        assert!(fits("/run/docker.sock", "docker.sock"));
        assert!(!fits("/run/docker.sock", "docker.sock2"));
        assert!(fits("/run/app/*.sock", "a.sock"));
        assert!(!fits("/run/app/*.sock", "deep/a.sock"));
        assert!(!fits("/run/app/*.sock", ".sock"), "a hidden name");
        assert!(fits("/run/app/.*", ".sock"));
        assert!(fits("/run/*/x?.sock", "any/x1.sock"));
        assert!(!fits("/run/*/x?.sock", "any/x.sock"));
        assert!(!fits("/run/*/x.sock", "../x.sock"));
        assert!(fits("/run/a*b*c", "axbxxbxc"));
        assert!(!fits("/run/a*b*c", "axbxcx"));
    }

    #[test]
    fn what_is_no_pattern_is_refused_with_its_reason() {
        for (text, reason) in [
            ("", "is not absolute"),
            ("run/x", "is not absolute"),
            ("/", "has the name \"\""),
            ("/run//x", "has the name \"\""),
            ("/run/", "has the name \"\""),
            ("/run/../x", "has the name \"..\""),
            ("/run/./x", "has the name \".\""),
            ("/run/**", "`**`"),
            ("/*", "in its first name"),
            ("/*/x.sock", "in its first name"),
            ("/run/[ab].sock", "wildcards `*` and `?` only"),
            ("/run/{a,b}.sock", "wildcards `*` and `?` only"),
        ] {
            let error = Pattern::parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn a_star_stands_for_any_bytes(before in "[a-z*?]{0,4}", middle in "[a-z.]{0,8}", after in "[a-z]{0,4}") {
            let name = format!("{before}{middle}{after}");
            if !name.is_empty() && !name.starts_with('.') {
                let pattern = format!("{before}*{after}");
                let matched = name_fits(&pattern, OsStr::new(&name));
                prop_assert!(matched, "{} {}", pattern, name);
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text: String, name in "[^/]{0,16}") {
            if let Ok(pattern) = Pattern::parse(&text) {
                prop_assert_eq!(String::from(pattern.clone()), text);
                let _ = pattern.fits(Path::new(&name));
            }
        }
    }
}
