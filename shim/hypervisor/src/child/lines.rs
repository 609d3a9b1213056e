//! Reads what a program writes, line by line, and remembers the last lines.
//! Knows nothing of what the lines mean.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{io::AsyncReadExt, net::unix::pipe, task::JoinHandle};

/// How many lines are remembered.
const KEPT_LINES: usize = 24;
/// How many bytes of one line are remembered. A guest writes its console as it likes: what is kept
/// of it is bounded.
const KEPT_BYTES: usize = 512;
/// How long the rest of a dead program's output is waited for. Its pipe is closed by its death, so
/// this passes only if something that it left behind holds the pipe.
const REST_DEADLINE: Duration = Duration::from_millis(500);

/// Called with each line as it is complete.
pub type LineSink = Box<dyn FnMut(&str) + Send>;

/// The lines of one stream of one program.
#[derive(Debug)]
pub(super) struct Lines {
    kept: Arc<Mutex<VecDeque<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Lines {
    /// Starts to read.
    pub(super) fn read(from: pipe::Receiver, sink: LineSink) -> Self {
        let kept = Arc::new(Mutex::new(VecDeque::new()));
        let reader = Some(tokio::spawn(read_all(from, kept.clone(), sink)));
        Self { kept, reader }
    }

    /// The last lines so far.
    pub(super) fn last(&self) -> Vec<String> {
        lock(&self.kept).iter().cloned().collect()
    }

    /// Waits until the stream has ended, as it does when its writer died. May be cancelled.
    pub(super) async fn finish(&mut self) {
        if let Some(reader) = &mut self.reader {
            if tokio::time::timeout(REST_DEADLINE, &mut *reader).await.is_err() {
                reader.abort();
            }
            self.reader = None;
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        if let Some(reader) = &self.reader {
            reader.abort();
        }
    }
}

async fn read_all(mut from: pipe::Receiver, kept: Arc<Mutex<VecDeque<String>>>, mut sink: LineSink) {
    let mut splitter = Splitter::default();
    let mut buffer = vec![0; 4096];
    let mut line = |text: String| {
        sink(&text);
        let mut kept = lock(&kept);
        if kept.len() == KEPT_LINES {
            kept.pop_front();
        }
        kept.push_back(text);
    };
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        splitter.push(&buffer[..n], &mut line);
    }
    splitter.end(&mut line);
}

/// Cuts bytes into lines and long lines short.
#[derive(Default)]
struct Splitter {
    line: Vec<u8>,
}

impl Splitter {
    fn push(&mut self, bytes: &[u8], line: &mut impl FnMut(String)) {
        for &byte in bytes {
            match byte {
                b'\n' => self.end(line),
                _ if self.line.len() < KEPT_BYTES => self.line.push(byte),
                _ => {}
            }
        }
    }

    fn end(&mut self, line: &mut impl FnMut(String)) {
        let text = String::from_utf8_lossy(&self.line);
        let text = text.trim_end();
        if !text.is_empty() {
            // Control characters of a guest must not reach an operator's terminal.
            line(text.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect());
        }
        self.line.clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(chunks: &[&[u8]]) -> Vec<String> {
        let mut out = Vec::new();
        let mut splitter = Splitter::default();
        for chunk in chunks {
            splitter.push(chunk, &mut |l| out.push(l));
        }
        splitter.end(&mut |l| out.push(l));
        out
    }

    #[test]
    fn lines_are_whole_whatever_the_chunks() {
        assert_eq!(split(&[b"one\r\ntw", b"o\n", b"\n", b"three"]), ["one", "two", "three"]);
    }

    #[test]
    fn an_endless_line_is_cut_and_the_next_is_not() {
        let long = vec![b'x'; 10 * KEPT_BYTES];
        let lines = split(&[&long, &long, b"\nnext\n"]);
        assert_eq!(lines, ["x".repeat(KEPT_BYTES), "next".to_owned()]);
    }

    #[test]
    fn control_characters_are_made_harmless() {
        assert_eq!(split(&[b"a\x1b[2Jb\tc\xff\n"]), ["a\u{fffd}[2Jb\tc\u{fffd}"]);
    }
}
