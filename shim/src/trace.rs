//! Finished spans as JSON lines, for timelines of a start.
//! Knows spans; does not know what they measure.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    sync::Mutex,
    time::SystemTime,
};

use tracing::{Subscriber, span};
use tracing_subscriber::{layer::Context, registry::LookupSpan};

/// Appends one line for each span of ours that ends:
/// `{"pid":1,"name":"launch","start_unix_nanos":1,"end_unix_nanos":2}`.
pub struct Layer {
    file: Mutex<File>,
}

struct Began(SystemTime);

impl Layer {
    /// Appends to the file at `path`.
    pub fn new(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self { file: Mutex::new(file) })
    }

    fn write(&self, name: &str, from: SystemTime, to: SystemTime) {
        let line = line(name, from, to);
        // One write a line: several shims append to one file.
        let _ = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).write_all(line.as_bytes());
    }
}

fn line(name: &str, from: SystemTime, to: SystemTime) -> String {
    let nanos = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
    format!(
        "{{\"pid\":{},\"name\":{name:?},\"start_unix_nanos\":{},\"end_unix_nanos\":{}}}\n",
        std::process::id(),
        nanos(from),
        nanos(to)
    )
}

impl<S> tracing_subscriber::Layer<S> for Layer
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, _: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && span.metadata().target().starts_with("bulkhead")
        {
            span.extensions_mut().insert(Began(SystemTime::now()));
        }
    }

    fn on_close(&self, id: span::Id, context: Context<'_, S>) {
        if let Some(span) = context.span(&id)
            && let Some(Began(from)) = span.extensions().get::<Began>()
        {
            self.write(span.name(), *from, SystemTime::now());
        }
    }
}

/// Appends a span that has no place in the code, such as the guest kernel's part of a boot, to the file.
pub fn append(path: &Path, name: &str, from: SystemTime, to: SystemTime) {
    if let Ok(layer) = Layer::new(path) {
        layer.write(name, from, to);
    }
}
