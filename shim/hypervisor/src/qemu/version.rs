//! Which QEMU this is, and what follows from it.

use std::fmt;

/// A version of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
}

impl Version {
    /// Reads the first line that `qemu-system-x86_64 --version` prints.
    pub fn parse(line: &str) -> Option<Self> {
        let text = line.strip_prefix("QEMU emulator version ")?;
        let mut numbers = text.split(|c: char| !c.is_ascii_digit());
        let mut next = || numbers.next()?.parse().ok();
        Some(Self { major: next()?, minor: next()? })
    }

    /// The processor to emulate: all that this QEMU can, less what it does wrong.
    pub fn cpu(self) -> &'static str {
        // Up to 7.2 at least, the translator corrupts the flags after cmpxchg16b, and kernels that use
        // it panic at random; 10.0 does not. What lies in between was not tried, so it is spared.
        if self < (Self { major: 10, minor: 0 }) { "max,-cx16" } else { "max" }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_distributions_print_them() {
        let read = |line| Version::parse(line).map(|v| (v.major, v.minor));
        assert_eq!(read("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)"), Some((7, 2)));
        assert_eq!(read("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(read("QEMU emulator version 9"), None);
        assert_eq!(read("qemu-img version 7.2.22"), None);
        assert_eq!(read(""), None);
    }

    #[test]
    fn old_versions_do_without_cx16() {
        assert_eq!(Version { major: 7, minor: 2 }.cpu(), "max,-cx16");
        assert_eq!(Version { major: 10, minor: 0 }.cpu(), "max");
        assert_eq!(Version { major: 11, minor: 1 }.cpu(), "max");
    }
}
