//! The shim's own log: lines for containerd, through the fifo `log` in the bundle.
//! Knows how such a line looks; does not know who writes it.
//!
//! containerd copies the fifo to its own log and may be away for a while. A line that cannot be written
//! at once is dropped: the log must never hold up a pod (contract, L1 and L2). The last lines are kept in the
//! sandbox's directory too ([`crate::kept`]).

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Mutex,
};

use tracing::{Event, Subscriber, field::Visit};
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    fmt::{
        FmtContext, FormatEvent, FormatFields, MakeWriter,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    prelude::*,
    registry::LookupSpan,
};

use crate::kept::Kept;

/// Sends every message of at least `level` to the fifo at `path`, and finished spans to the process's trace if it
/// has one. Answers where the last lines are kept, once that is told a file.
pub fn init(path: &Path, level: &str, traced: bool) -> Kept {
    let kept = Kept::default();
    let level = level.parse().unwrap_or(LevelFilter::INFO);
    // Not tracing's EnvFilter: its patterns bring a second engine of regular expressions with them.
    let filter = Targets::new().with_default(level).with_target("ttrpc", LevelFilter::ERROR);
    let lines = tracing_subscriber::fmt::layer()
        .event_format(Logfmt)
        .with_writer(Fifo::new(path.to_owned(), kept.clone()))
        .with_filter(filter);
    let spans = traced.then_some(crate::trace::Layer);
    // Fails only where somebody has set a subscriber before, as tests do.
    let _ = tracing_subscriber::registry().with(lines).with(spans).try_init();
    kept
}

/// The fifo, opened when there is something to write and again after containerd went away.
struct Fifo {
    path: PathBuf,
    file: Mutex<Option<File>>,
    kept: Kept,
}

impl Fifo {
    fn new(path: PathBuf, kept: Kept) -> Self {
        Self { path, file: Mutex::new(None), kept }
    }

    fn open(&self) -> io::Result<File> {
        OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(&self.path)
    }
}

impl<'a> MakeWriter<'a> for Fifo {
    type Writer = Line<'a>;
    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

struct Line<'a>(&'a Fifo);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        (&self.0.kept).write_all(line)?;
        let mut file = self.0.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // Once more with a new descriptor: the old one may lead to a reader that has gone.
        for _ in 0..2 {
            if file.is_none() {
                *file = self.0.open().ok();
            }
            let Some(open) = file.as_mut() else { break };
            match open.write(line) {
                Ok(_) => break,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => *file = None,
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `time="…" level=info msg="…" key=value`, as containerd's own lines are.
struct Logfmt;

impl<S, N> FormatEvent<S, N> for Logfmt
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = match *event.metadata().level() {
            tracing::Level::ERROR => "error",
            tracing::Level::WARN => "warning",
            tracing::Level::INFO => "info",
            tracing::Level::DEBUG => "debug",
            tracing::Level::TRACE => "trace",
        };
        let mut fields = Fields::default();
        event.record(&mut fields);
        out.write_str("time=\"")?;
        SystemTime.format_time(&mut out)?;
        writeln!(out, "\" level={level} msg={:?}{}", fields.message, fields.rest)
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        use fmt::Write as _;
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else if text.contains([' ', '"', '=', '\n']) {
            let _ = write!(self.rest, " {}={text:?}", field.name());
        } else {
            let _ = write!(self.rest, " {}={text}", field.name());
        }
    }

    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifo_without_reader_holds_nobody_up() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR).unwrap();
        let fifo = Fifo::new(path.clone(), Kept::default());
        assert_eq!(fifo.make_writer().write(b"lost\n").unwrap(), 5);
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        fifo.make_writer().write_all(b"first\n").unwrap();
        drop(std::mem::replace(
            &mut reader,
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap(),
        ));
        // Fill the pipe to its brim: the line that does not fit is dropped, not waited for.
        for _ in 0..20_000 {
            fifo.make_writer().write_all(b"0123456789012345678901234567890123456789\n").unwrap();
        }
    }
}
