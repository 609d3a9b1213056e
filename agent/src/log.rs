//! Where the agent's words go: warnings to the console, libcontainer's to the one who waits for an answer.
//! Knows levels and file descriptors; must not know what is logged.

use std::{
    fmt::Write as _,
    os::fd::RawFd,
    sync::atomic::{AtomicI32, Ordering},
};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Layer,
    filter::{LevelFilter, Targets},
    layer::{Context, SubscriberExt},
    util::SubscriberInitExt,
};

/// Descriptor that gets libcontainer's errors in a launcher's worker; -1 = none.
static CAPTURE: AtomicI32 = AtomicI32::new(-1);

/// Key on the kernel's command line that raises the level, e.g. `bulkhead.log=debug`.
const KEY: &str = "bulkhead.log=";

/// Longest line that is captured; a pipe takes this much at once.
const LINE_MAX: usize = 1024;

/// Starts logging to the console.
pub(crate) fn init(cmdline: &str) {
    tracing_subscriber::registry()
        .with(Capture)
        .with(
            tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .with_ansi(false)
                .without_time()
                .with_filter(filter(cmdline)),
        )
        .init();
}

/// Sends the errors of libcontainer in this process, and in those it forks, to `fd` also.
pub(crate) fn capture_into(fd: RawFd) {
    CAPTURE.store(fd, Ordering::Relaxed);
}

/// What libcontainer finds worth an error is part of an answer, hence not repeated on the console.
fn filter(cmdline: &str) -> Targets {
    let quiet = || {
        Targets::new()
            .with_default(Level::WARN)
            .with_target("libcontainer", LevelFilter::OFF)
            .with_target("libcgroups", LevelFilter::OFF)
    };
    match cmdline.split_whitespace().find_map(|word| word.strip_prefix(KEY)) {
        Some(level) => level.parse().unwrap_or_else(|_| quiet()),
        None => quiet(),
    }
}

struct Capture;

impl<S: Subscriber> Layer<S> for Capture {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let fd = CAPTURE.load(Ordering::Relaxed);
        let target = event.metadata().target();
        if fd < 0
            || *event.metadata().level() != Level::ERROR
            || !(target.starts_with("libcontainer") || target.starts_with("libcgroups"))
        {
            return;
        }
        let mut line = Line::default();
        event.record(&mut line);
        let mut text = line.message + &line.fields;
        text.truncate((0..=LINE_MAX.min(text.len())).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0));
        text.push('\n');
        crate::sys::write_raw(fd, text.as_bytes());
    }
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing into a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_raises_the_level() {
        let usual = filter("console=ttyS0 quiet");
        assert!(usual.would_enable("bulkhead_agent", &Level::WARN));
        assert!(!usual.would_enable("bulkhead_agent", &Level::INFO));
        assert!(!usual.would_enable("libcontainer::tty", &Level::ERROR));
        let raised = filter("console=ttyS0 bulkhead.log=debug panic=-1");
        assert!(raised.would_enable("libcontainer::tty", &Level::DEBUG));
        assert_eq!(filter("bulkhead.log=no,such=thing"), usual);
    }
}
