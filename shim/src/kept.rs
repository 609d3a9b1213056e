//! The last lines of a log in a file that never grows beyond a bound, for `bulkhead logs`.
//! Does not know whose lines they are.
//!
//! ```text
//! ┌ 32 bytes: capacity, bytes ever written ┐┌ the capacity: a ring, whose oldest byte is the next to go ┐
//! ```
//! The file is made once and then only written to: a sandbox's directory that is being removed gets no new one. It
//! lies in the state directory, hence in memory where that is /run, and is gone with its sandbox.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What is kept of one log, in bytes.
pub const CAPACITY: usize = 128 << 10;
/// The shim's own log in a sandbox's directory.
pub const SHIM_LOG: &str = "shim.log";
/// The guest's console there.
pub const CONSOLE_LOG: &str = "console.log";

/// Two numbers in decimal, a blank between them and a newline at the end.
const HEADER: usize = 32;

/// The writer of a log.
#[derive(Debug)]
pub struct Ring {
    file: File,
    capacity: usize,
    written: u64,
}

impl Ring {
    /// A new one at `path`, for the owner alone.
    pub fn create(path: &Path, capacity: usize) -> io::Result<Self> {
        let options = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        Ok(Self { file: options, capacity, written: 0 })
    }

    /// Appends; what was written first makes room.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let kept = &bytes[bytes.len().saturating_sub(self.capacity)..];
        self.written += (bytes.len() - kept.len()) as u64;
        let at = (self.written % self.capacity as u64) as usize;
        let (before_end, from_start) = kept.split_at(kept.len().min(self.capacity - at));
        self.file.write_all_at(before_end, (HEADER + at) as u64)?;
        self.file.write_all_at(from_start, HEADER as u64)?;
        self.written += kept.len() as u64;
        // Last: a reader in between sees a line too few or a broken one, never a gap that it takes for text.
        let header = format!("{:>10} {:>20}\n", self.capacity, self.written);
        self.file.write_all_at(header.as_bytes(), 0)
    }
}

/// The lines that are kept at `path`, the oldest first, and whether older ones have gone.
pub fn read(path: &Path) -> io::Result<(String, bool)> {
    let bytes = std::fs::read(path)?;
    if bytes.is_empty() {
        return Ok((String::new(), false));
    }
    let broken = || io::Error::new(io::ErrorKind::InvalidData, "not a kept log");
    let (header, ring) = bytes.split_at_checked(HEADER).ok_or_else(broken)?;
    let numbers = std::str::from_utf8(header).map_err(|_| broken())?;
    let mut numbers = numbers.split_ascii_whitespace().map(str::parse::<u64>);
    let (Some(Ok(capacity @ 1..)), Some(Ok(written))) = (numbers.next(), numbers.next()) else {
        return Err(broken());
    };
    if written <= capacity {
        let text = ring.get(..written as usize).unwrap_or(ring);
        return Ok((String::from_utf8_lossy(text).into_owned(), false));
    }
    let (newer, older) = ring.split_at_checked((written % capacity) as usize).ok_or_else(broken)?;
    let mut text = older.to_vec();
    text.extend_from_slice(newer);
    // Of the oldest line there is only the end, if anything.
    let whole = text.iter().position(|byte| *byte == b'\n').map_or(text.len(), |at| at + 1);
    Ok((String::from_utf8_lossy(&text[whole..]).into_owned(), true))
}

/// A log whose file comes later than its first lines.
#[derive(Clone, Debug, Default)]
pub struct Kept(Arc<Mutex<State>>);

#[derive(Debug)]
enum State {
    /// What came before there was a place for it.
    Waiting(Vec<u8>),
    Kept(Ring),
    /// It cannot be kept; the reason was told.
    Lost,
}

impl Default for State {
    fn default() -> Self {
        State::Waiting(Vec::new())
    }
}

impl Kept {
    /// Keeps the log in a new file from now on, with what came before.
    pub fn begin(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        let early = match std::mem::replace(&mut *state, State::Lost) {
            State::Waiting(early) => early,
            State::Kept(_) | State::Lost => Vec::new(),
        };
        let mut ring = Ring::create(path, CAPACITY)?;
        ring.append(&early)?;
        *state = State::Kept(ring);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for &Kept {
    /// Takes everything: a log must hold nobody up, and a full disk is no reason to fail.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut *self.lock() {
            State::Waiting(early) if early.len() + bytes.len() <= CAPACITY => early.extend_from_slice(bytes),
            State::Kept(ring) => drop(ring.append(bytes)),
            State::Waiting(_) | State::Lost => {}
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_came_early_is_kept_too_and_the_file_is_private() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("log");
        let kept = Kept::default();
        (&kept).write_all(b"early\n").unwrap();
        kept.begin(&path).unwrap();
        (&kept).write_all(b"late\n").unwrap();
        assert_eq!(read(&path).unwrap(), ("early\nlate\n".to_owned(), false));
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_log_without_a_place_holds_nobody_up() {
        let kept = Kept::default();
        assert!(kept.begin(Path::new("/nonexistent/log")).is_err());
        (&kept).write_all(b"lost\n").unwrap();
        let waiting = Kept::default();
        for _ in 0..2 * CAPACITY / 64 {
            (&waiting).write_all(&[b'x'; 64]).unwrap();
        }
    }

    #[test]
    fn a_file_of_somebody_else_is_refused() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("log");
        for text in ["short", "a text that is long enough for a header, but has none"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        std::fs::write(&path, "").unwrap();
        assert_eq!(read(&path).unwrap(), (String::new(), false));
    }

    proptest! {
        #[test]
        fn the_last_lines_are_there_whole_and_the_file_is_bounded(
            lines in proptest::collection::vec("[a-z]{0,40}\n", 0..40),
            capacity in 1usize..200,
        ) {
            let tmp = tempfile::tempdir().unwrap();
            let path = tmp.path().join("log");
            let mut ring = Ring::create(&path, capacity).unwrap();
            for line in &lines {
                ring.append(line.as_bytes()).unwrap();
            }
            let (text, cut) = read(&path).unwrap();
            let all = lines.concat();
            prop_assert!(std::fs::metadata(&path).unwrap().len() <= (HEADER + capacity) as u64);
            prop_assert_eq!(cut, all.len() > capacity);
            prop_assert!(all.ends_with(&text));
            // All that fits is there, but for the line that is cut.
            let fits = &all[all.len().saturating_sub(capacity)..];
            let whole = if cut { fits.find('\n').map_or("", |at| &fits[at + 1..]) } else { fits };
            prop_assert_eq!(text, whole);
        }
    }
}
