//! Finished spans in OpenTelemetry's format, appended to a file.
//! Knows spans; does not know what they measure.
//!
//! One line is one `ExportTraceServiceRequest` in OTLP's JSON, which is what OpenTelemetry calls a file exporter
//! (opentelemetry.io, "OpenTelemetry Protocol File Exporter" and "OTLP, JSON Protobuf Encoding"); the collector reads
//! such files by its receiver `otlpjsonfile`. All spans of a process are one trace under one span, `pod`.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    sync::{Mutex, OnceLock},
    time::SystemTime,
};

use serde_json::{Value, json};
use tracing::{Subscriber, span};
use tracing_subscriber::{layer::Context, registry::LookupSpan};

/// The span that is around all others.
const ROOT: &str = "pod";
/// `SPAN_KIND_INTERNAL` (opentelemetry/proto/trace/v1/trace.proto).
const INTERNAL: u32 = 1;

/// The trace of this process, if it writes one.
static TRACE: OnceLock<Trace> = OnceLock::new();

/// A trace that is being written.
struct Trace {
    file: Mutex<File>,
    began: SystemTime,
    id: String,
    root: String,
    resource: Value,
}

/// Begins the trace of this process, of the sandbox `id`; it began to live at `began`.
pub fn begin(path: &Path, namespace: &str, id: &str, began: SystemTime) -> io::Result<()> {
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    let _ = TRACE.set(Trace::new(file, namespace, id, began));
    Ok(())
}

/// Adds a span that has no place in the code, such as the guest kernel's part of a boot.
pub fn append(name: &str, from: SystemTime, to: SystemTime) {
    if let Some(trace) = TRACE.get() {
        trace.write(name, &random(8), Some(&trace.root), from, to);
    }
}

/// Ends the trace: the span that is around all others.
pub fn end() {
    if let Some(trace) = TRACE.get() {
        trace.write(ROOT, &trace.root, None, trace.began, SystemTime::now());
    }
}

impl Trace {
    fn new(file: File, namespace: &str, id: &str, began: SystemTime) -> Self {
        let text = |key: &str, value: &str| json!({ "key": key, "value": { "stringValue": value } });
        let resource = json!({ "attributes": [
            text("service.name", "bulkhead"),
            text("service.version", env!("CARGO_PKG_VERSION")),
            text("containerd.namespace", namespace),
            text("containerd.sandbox.id", id),
            { "key": "process.pid", "value": { "intValue": std::process::id().to_string() } },
        ] });
        Self { file: Mutex::new(file), began, id: random(16), root: random(8), resource }
    }

    fn write(&self, name: &str, id: &str, parent: Option<&str>, from: SystemTime, to: SystemTime) {
        let line = self.line(name, id, parent, from, to);
        // One write a line: several shims append to one file.
        let _ = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).write_all(line.as_bytes());
    }

    fn line(&self, name: &str, id: &str, parent: Option<&str>, from: SystemTime, to: SystemTime) -> String {
        // Numbers of 64 bits are text in this format.
        let nanos = |at: SystemTime| {
            at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos().to_string()
        };
        let span = json!({
            "traceId": self.id,
            "spanId": id,
            "parentSpanId": parent.unwrap_or_default(),
            "name": name,
            "kind": INTERNAL,
            "startTimeUnixNano": nanos(from),
            "endTimeUnixNano": nanos(to),
        });
        let scope = json!({ "scope": { "name": "bulkhead" }, "spans": [span] });
        let request = json!({ "resourceSpans": [{ "resource": self.resource, "scopeSpans": [scope] }] });
        format!("{request}\n")
    }
}

/// So many random bytes as hexadecimal digits.
fn random(bytes: usize) -> String {
    let mut random = vec![0; bytes];
    // An id of zeros is none (W3C Trace Context); a kernel without random bytes has other worries.
    let _ = getrandom::fill(&mut random);
    random.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Puts each span of ours that ends into the trace of this process.
pub struct Layer;

struct Began {
    at: SystemTime,
    id: String,
}

impl<S> tracing_subscriber::Layer<S> for Layer
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, _: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && span.metadata().target().starts_with("bulkhead")
        {
            span.extensions_mut().insert(Began { at: SystemTime::now(), id: random(8) });
        }
    }

    fn on_close(&self, id: span::Id, context: Context<'_, S>) {
        if let Some(trace) = TRACE.get()
            && let Some(span) = context.span(&id)
            && let Some(began) = span.extensions().get::<Began>()
        {
            let around =
                span.parent().and_then(|parent| Some(parent.extensions().get::<Began>()?.id.clone()));
            let parent = around.as_deref().unwrap_or(&trace.root);
            trace.write(span.name(), &began.id, Some(parent), began.at, SystemTime::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use opentelemetry_proto::tonic::{collector::trace::v1::ExportTraceServiceRequest, trace::v1::Span};

    use super::*;

    #[test]
    fn a_line_is_what_opentelemetry_reads() {
        let began = SystemTime::UNIX_EPOCH + Duration::from_nanos(7);
        let trace = Trace::new(tempfile::tempfile().unwrap(), "k8s.io", "a\"b", began);
        let to = began + Duration::from_secs(1_800_000_000);
        let line = trace.line("launch", "0102030405060708", Some(&trace.root), began, to);
        assert_eq!(line.lines().count(), 1);
        let request: ExportTraceServiceRequest = serde_json::from_str(&line).unwrap();
        let [of_resource] = &request.resource_spans[..] else { panic!("{request:?}") };
        let attributes = &of_resource.resource.as_ref().unwrap().attributes;
        let said = format!("{attributes:?}");
        assert!(said.contains("service.name") && said.contains("a\\\"b"), "{said}");
        let [Span { name, kind, trace_id, span_id, parent_span_id, start_time_unix_nano, .. }] =
            &of_resource.scope_spans[0].spans[..]
        else {
            panic!("{request:?}")
        };
        assert_eq!((name.as_str(), *kind, trace_id.len(), *start_time_unix_nano), ("launch", 1, 16, 7));
        assert_eq!((span_id[..].to_vec(), parent_span_id.len()), (vec![1, 2, 3, 4, 5, 6, 7, 8], 8));
        let root = trace.line(ROOT, &trace.root, None, began, to);
        let request: ExportTraceServiceRequest = serde_json::from_str(&root).unwrap();
        let root = &request.resource_spans[0].scope_spans[0].spans[0];
        assert!(root.parent_span_id.is_empty());
        assert_eq!(&root.span_id, parent_span_id);
    }
}
