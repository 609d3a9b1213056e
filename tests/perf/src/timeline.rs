//! The stages of one start: from the shim's spans to durations and a drawing.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, ensure};
use serde::Serialize;
use serde_json::Value;

/// A stage, as it is reported.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Span {
    pub(crate) name: String,
    pub(crate) start_unix_nanos: u64,
    pub(crate) end_unix_nanos: u64,
}

impl Span {
    pub(crate) fn seconds(&self) -> f64 {
        self.end_unix_nanos.saturating_sub(self.start_unix_nanos) as f64 / 1e9
    }
}

/// The span of a pod's whole life, which is no stage.
const WHOLE: &str = "pod";

/// Reads the spans of a file of OTLP's JSON lines, in the order of their starts; a file that is not there has none.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<Span>> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let parse = |line| stages(line).with_context(|| format!("{}: not spans: {line}", path.display()));
    let mut spans: Vec<Span> = text.lines().map(parse).collect::<anyhow::Result<Vec<_>>>()?.concat();
    spans.retain(|span| span.name != WHOLE);
    spans.sort_by_key(|span| (span.start_unix_nanos, std::cmp::Reverse(span.end_unix_nanos)));
    Ok(spans)
}

/// The spans of one line.
fn stages(line: &str) -> anyhow::Result<Vec<Span>> {
    let request: Value = serde_json::from_str(line)?;
    let list = |value: &Value, key: &str| value[key].as_array().cloned().unwrap_or_default();
    let scopes = list(&request, "resourceSpans").into_iter().flat_map(|of| list(&of, "scopeSpans"));
    let spans = scopes.flat_map(|scope| list(&scope, "spans"));
    let stage = |span: Value| {
        // Numbers of 64 bits are text in this format.
        let nanos = |key: &str| span[key].as_str()?.parse().ok();
        Some(Span {
            name: span["name"].as_str()?.to_owned(),
            start_unix_nanos: nanos("startTimeUnixNano")?,
            end_unix_nanos: nanos("endTimeUnixNano")?,
        })
    };
    let stages: Vec<Span> = spans.map(stage).collect::<Option<_>>().context("a span lacks a field")?;
    ensure!(!stages.is_empty(), "it has none");
    Ok(stages)
}

/// Seconds from the start of the first stage of one name to the end of the first of another.
pub(crate) fn between(spans: &[Span], from: &str, to: &str) -> Option<f64> {
    let start = spans.iter().find(|span| span.name == from)?.start_unix_nanos;
    let end = spans.iter().find(|span| span.name == to)?.end_unix_nanos;
    Some(end.checked_sub(start)? as f64 / 1e9)
}

const LEFT: f64 = 150.0;
const WIDTH: f64 = 760.0;
const ROW: f64 = 24.0;
const TOP: f64 = 56.0;

/// Draws the stages as bars over time, as an SVG document that stands alone.
pub(crate) fn svg(title: &str, spans: &[Span]) -> String {
    let origin = spans.iter().map(|span| span.start_unix_nanos).min().unwrap_or(0);
    let end = spans.iter().map(|span| span.end_unix_nanos).max().unwrap_or(origin + 1).max(origin + 1);
    let total = (end - origin) as f64 / 1e6;
    let x = |nanos: u64| LEFT + (nanos - origin) as f64 / 1e6 / total * WIDTH;
    let (width, height) = (LEFT + WIDTH + 90.0, TOP + ROW * spans.len() as f64 + 16.0);
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"12\" y=\"20\" font-size=\"14\">{}</text>",
        escaped(title)
    );
    let step = tick(total);
    for mark in (0..).map(|n| f64::from(n) * step).take_while(|mark| *mark <= total) {
        let at = LEFT + mark / total * WIDTH;
        let bottom = height - 12.0;
        let _ = writeln!(
            out,
            "<line x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{bottom}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{}\" fill=\"#666\" text-anchor=\"middle\">{mark:.0} ms</text>",
            TOP - 8.0
        );
    }
    for (row, span) in spans.iter().enumerate() {
        let (y, from, to) = (TOP + ROW * row as f64, x(span.start_unix_nanos), x(span.end_unix_nanos));
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{from:.1}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" rx=\"2\" fill=\"#4878a8\"/>\
             <text x=\"{:.1}\" y=\"{}\" fill=\"#333\">{}</text>",
            LEFT - 8.0,
            y + 16.0,
            escaped(&span.name),
            y + 4.0,
            (to - from).max(1.0),
            ROW - 8.0,
            to.max(from + 1.0) + 5.0,
            y + 16.0,
            milliseconds(span.seconds())
        );
    }
    out.push_str("</svg>\n");
    out
}

/// A round distance of marks that gives five to ten of them.
fn tick(total_ms: f64) -> f64 {
    let magnitude = 10f64.powf((total_ms / 10.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|step| step * magnitude)
        .into_iter()
        .find(|step| total_ms / step <= 10.0)
        .unwrap_or(total_ms)
}

fn milliseconds(seconds: f64) -> String {
    let ms = seconds * 1e3;
    if ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(name: &str, from: u64, to: u64) -> Span {
        Span { name: name.into(), start_unix_nanos: from, end_unix_nanos: to }
    }

    #[test]
    fn spans_are_read_in_order_and_other_keys_ignored() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let line = |name: &str, from: u64, to: u64| {
            let span = serde_json::json!({ "name": name, "kind": 1, "startTimeUnixNano": from.to_string(),
                "endTimeUnixNano": to.to_string() });
            serde_json::json!({ "resourceSpans": [{ "scopeSpans": [{ "spans": [span] }] }] }).to_string()
                + "\n"
        };
        let lines = [line("b", 5, 9), line("a", 1, 4), line(WHOLE, 0, 99)];
        std::fs::write(file.path(), lines.concat()).unwrap();
        assert_eq!(read(file.path()).unwrap(), [span("a", 1, 4), span("b", 5, 9)]);
        std::fs::write(file.path(), "nonsense\n").unwrap();
        assert!(read(file.path()).unwrap_err().to_string().ends_with("not spans: nonsense"));
        std::fs::write(file.path(), "{}\n").unwrap();
        assert!(read(file.path()).is_err());
        assert!(read(Path::new("/nonexistent")).unwrap().is_empty());
    }

    #[test]
    fn a_stretch_goes_from_a_start_to_an_end() {
        let spans =
            [span("launch", 1_000_000_000, 1_100_000_000), span("hello", 1_100_000_000, 1_600_000_000)];
        assert_eq!(between(&spans, "launch", "hello"), Some(0.6));
        assert_eq!(between(&spans, "launch", "absent"), None);
    }

    #[test]
    fn a_drawing_has_a_bar_for_each_stage_within_its_bounds() {
        let drawn = svg("a < b", &[span("launch", 0, 250_000_000), span("x&y", 250_000_000, 1_000_000_000)]);
        assert!(drawn.starts_with("<svg ") && drawn.ends_with("</svg>\n"));
        assert!(drawn.contains("a &lt; b") && drawn.contains("x&amp;y") && drawn.contains("250 ms"));
        assert!(drawn.contains("<rect x=\"150.0\" y=\"60\" width=\"190.0\""), "{drawn}");
        assert!(drawn.contains("<rect x=\"340.0\" y=\"84\" width=\"570.0\""), "{drawn}");
        assert!(svg("none", &[]).ends_with("</svg>\n"));
    }

    #[test]
    fn marks_are_round() {
        assert_eq!((tick(1000.0), tick(90.0), tick(1500.0)), (100.0, 10.0, 200.0));
    }
}
