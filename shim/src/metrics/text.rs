//! Prometheus' text format, version 0.0.4: families of samples, written and read again.
//! Knows no figure and where none comes from. (Prometheus documentation, "Exposition formats".)

use std::{borrow::Cow, fmt, time::Duration};

/// What kind of figure a family holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Grows and shrinks.
    Gauge,
    /// How often something took up to how long.
    Histogram,
}

impl Kind {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Kind::Counter, Kind::Gauge, Kind::Histogram].into_iter().find(|kind| kind.as_str() == text)
    }

    /// What the names of samples add to that of their family.
    fn suffixes(self) -> &'static [&'static str] {
        match self {
            Kind::Histogram => &["_bucket", "_sum", "_count"],
            _ => &[""],
        }
    }
}

/// A family: name, kind and meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Its name, the unit at its end.
    pub name: Cow<'static, str>,
    /// What kind of figure it holds.
    pub kind: Kind,
    /// What it means, in a line.
    pub help: Cow<'static, str>,
}

/// A figure, as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value(String);

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self(number.to_string())
    }
}

/// In seconds, to the nanosecond.
impl From<Duration> for Value {
    fn from(time: Duration) -> Self {
        let text = format!("{}.{:09}", time.as_secs(), time.subsec_nanos());
        Self(text.trim_end_matches('0').trim_end_matches('.').to_owned())
    }
}

/// Names and values.
type Labels = Vec<(String, String)>;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Sample {
    suffix: &'static str,
    labels: Labels,
    value: Value,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Family {
    meta: Meta,
    samples: Vec<Sample>,
}

/// Families with their samples, in the order in which they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exposition {
    /// Every sample that is put has these labels first.
    common: Labels,
    families: Vec<Family>,
}

/// Why a text is no exposition of ours.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} {why}")]
pub struct ParseError {
    /// From 1.
    pub line: usize,
    /// What is wrong with it.
    pub why: &'static str,
}

impl Exposition {
    /// One without a sample, each of which will have these labels.
    pub fn of(labels: &[(&str, &str)]) -> Self {
        Self { common: owned(labels), families: Vec::new() }
    }

    /// Adds a sample to its family.
    pub fn put(&mut self, meta: &Meta, labels: &[(&str, &str)], value: impl Into<Value>) {
        self.put_part(meta, "", labels, value.into());
    }

    /// Adds a histogram: for each bound how much was within it (not in the ones before alone), and the sum.
    pub fn put_histogram(
        &mut self,
        meta: &Meta,
        labels: &[(&str, &str)],
        within: &[(Duration, u64)],
        count: u64,
        sum: Duration,
    ) {
        let mut bucket = |bound: String, count: u64| {
            let labels: Vec<_> = labels.iter().copied().chain([("le", bound.as_str())]).collect();
            self.put_part(meta, "_bucket", &labels, count.into());
        };
        for (bound, count) in within {
            bucket(Value::from(*bound).0, *count);
        }
        bucket("+Inf".into(), count);
        self.put_part(meta, "_sum", labels, sum.into());
        self.put_part(meta, "_count", labels, count.into());
    }

    fn put_part(&mut self, meta: &Meta, suffix: &'static str, labels: &[(&str, &str)], value: Value) {
        let labels = self.common.iter().cloned().chain(owned(labels)).collect();
        let sample = Sample { suffix, labels, value };
        match self.families.iter_mut().find(|family| family.meta.name == meta.name) {
            Some(family) => family.samples.push(sample),
            None => self.families.push(Family { meta: meta.clone(), samples: vec![sample] }),
        }
    }

    /// Takes the samples of another one over, so that each family is there once. Answers the names of families
    /// that are of another kind there, whose samples are left out.
    pub fn merge(&mut self, other: Self) -> Vec<String> {
        let mut differ = Vec::new();
        for family in other.families {
            match self.families.iter_mut().find(|ours| ours.meta.name == family.meta.name) {
                Some(ours) if ours.meta.kind == family.meta.kind => ours.samples.extend(family.samples),
                Some(_) => differ.push(family.meta.name.into_owned()),
                None => self.families.push(family),
            }
        }
        differ
    }

    /// The names of the families.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.families.iter().map(|family| family.meta.name.as_ref())
    }

    /// Reads what [`Exposition`] writes.
    ///
    /// # Errors
    /// The text is something else, at a line that is named.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut page = Self::default();
        let mut help: Option<(&str, String)> = None;
        // Not `lines`: a carriage return is part of a label.
        for (line, text) in (1..).zip(text.split('\n')) {
            let wrong = |why| ParseError { line, why };
            if let Some(rest) = text.strip_prefix("# HELP ") {
                let (name, words) = rest.split_once(' ').unwrap_or((rest, ""));
                help = Some((name, unescape(words, false).ok_or(wrong("has an unknown escape"))?));
            } else if let Some(rest) = text.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').ok_or(wrong("has no type"))?;
                let kind = Kind::parse(kind).ok_or(wrong("has an unknown type"))?;
                if !is_name(name) || page.names().any(|other| other == name) {
                    return Err(wrong("is not the name of a new family"));
                }
                let words = help.take().filter(|(of, _)| *of == name).map(|(_, words)| words);
                let (name, help) = (name.to_owned().into(), words.unwrap_or_default().into());
                page.families.push(Family { meta: Meta { name, kind, help }, samples: Vec::new() });
            } else if !text.is_empty() && !text.starts_with('#') {
                let family = page.families.last_mut().ok_or(wrong("is of no family"))?;
                family.samples.push(sample(text, &family.meta).map_err(wrong)?);
            }
        }
        Ok(page)
    }
}

impl fmt::Display for Exposition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Family { meta, samples } in &self.families {
            writeln!(f, "# HELP {} {}", meta.name, escape(&meta.help, false))?;
            writeln!(f, "# TYPE {} {}", meta.name, meta.kind.as_str())?;
            for sample in samples {
                write!(f, "{}{}", meta.name, sample.suffix)?;
                for (nth, (name, value)) in sample.labels.iter().enumerate() {
                    let before = if nth == 0 { '{' } else { ',' };
                    write!(f, "{before}{name}=\"{}\"", escape(value, true))?;
                }
                let after = if sample.labels.is_empty() { "" } else { "}" };
                writeln!(f, "{after} {}", sample.value.0)?;
            }
        }
        Ok(())
    }
}

fn owned(labels: &[(&str, &str)]) -> Labels {
    labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Whether this can name a family or a label. Colons are for those who record rules; we use none.
pub fn is_name(text: &str) -> bool {
    let part = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    !text.is_empty() && text.bytes().all(part) && !text.as_bytes()[0].is_ascii_digit()
}

/// `quoted` for the value of a label, which ends with a quotation mark.
fn escape(text: &str, quoted: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '"' if quoted => out.push_str("\\\""),
            c => out.push(c),
        }
    }
    out
}

fn unescape(text: &str, quoted: bool) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        out.push(match c {
            '\\' => match chars.next()? {
                '\\' => '\\',
                'n' => '\n',
                '"' if quoted => '"',
                _ => return None,
            },
            c => c,
        });
    }
    Some(out)
}

fn sample(text: &str, meta: &Meta) -> Result<Sample, &'static str> {
    let end = text.find(['{', ' ']).ok_or("has no value")?;
    let (name, rest) = text.split_at(end);
    let suffix = name.strip_prefix(meta.name.as_ref()).ok_or("is of another family")?;
    let known = meta.kind.suffixes().iter().find(|known| **known == suffix);
    let suffix = known.ok_or("is of another family")?;
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Vec::new(), rest),
    };
    let value = rest.strip_prefix(' ').filter(|value| is_value(value)).ok_or("has no number as its value")?;
    Ok(Sample { suffix, labels, value: Value(value.to_owned()) })
}

/// What stands behind the opening brace, and what behind the closing one.
fn labels(mut text: &str) -> Result<(Labels, &str), &'static str> {
    const BROKEN: &str = "has a broken label";
    let mut labels = Vec::new();
    loop {
        if let Some(rest) = text.strip_prefix('}') {
            return Ok((labels, rest));
        }
        let (name, rest) = text.split_once("=\"").ok_or(BROKEN)?;
        let mut escaped = false;
        let end = rest.find(|c| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        let end = end.ok_or(BROKEN)?;
        let value = unescape(&rest[..end], true).ok_or(BROKEN)?;
        if !is_name(name) {
            return Err(BROKEN);
        }
        labels.push((name.to_owned(), value));
        text = &rest[end + 1..];
        text = match text.strip_prefix(',') {
            Some(rest) if !rest.starts_with('}') => rest,
            None if text.starts_with('}') => text,
            _ => return Err(BROKEN),
        };
    }
}

/// A number of the kinds that we write: digits, and digits with a fraction.
fn is_value(text: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.split_once('.') {
        Some((whole, fraction)) => digits(whole) && digits(fraction),
        None => digits(text),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn meta(name: &'static str, kind: Kind) -> Meta {
        Meta { name: name.into(), kind, help: "What it\nmeans, with a \\.".into() }
    }

    #[test]
    fn a_page_reads_as_the_format_wants_it() {
        let mut page = Exposition::of(&[("pod", "a\"b")]);
        page.put(&meta("x_total", Kind::Counter), &[("part", "c\\d\ne")], 7);
        page.put(&meta("y_seconds", Kind::Gauge), &[], Duration::from_micros(1_500_000));
        page.put(&meta("x_total", Kind::Counter), &[], u64::MAX);
        assert_eq!(
            page.to_string(),
            "# HELP x_total What it\\nmeans, with a \\\\.\n# TYPE x_total counter\n\
             x_total{pod=\"a\\\"b\",part=\"c\\\\d\\ne\"} 7\nx_total{pod=\"a\\\"b\"} 18446744073709551615\n\
             # HELP y_seconds What it\\nmeans, with a \\\\.\n# TYPE y_seconds gauge\ny_seconds{pod=\"a\\\"b\"} 1.5\n"
        );
    }

    #[test]
    fn a_histogram_has_every_bound_and_the_sum() {
        let mut page = Exposition::default();
        let within = [(Duration::from_millis(5), 2), (Duration::from_secs(1), 3)];
        page.put_histogram(&meta("h_seconds", Kind::Histogram), &[], &within, 4, Duration::from_secs(9));
        let text = page.to_string();
        let samples: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            samples,
            [
                "h_seconds_bucket{le=\"0.005\"} 2",
                "h_seconds_bucket{le=\"1\"} 3",
                "h_seconds_bucket{le=\"+Inf\"} 4",
                "h_seconds_sum 9",
                "h_seconds_count 4",
            ]
        );
        assert_eq!(Exposition::parse(&text).unwrap().to_string(), text);
    }

    #[test]
    fn times_are_exact() {
        for (nanos, text) in [(0, "0"), (1, "0.000000001"), (1_000_000_000, "1"), (10_020_000_000, "10.02")] {
            assert_eq!(Value::from(Duration::from_nanos(nanos)).0, text);
        }
    }

    #[test]
    fn merged_families_are_there_once() {
        let mut page = Exposition::of(&[("pod", "a")]);
        page.put(&meta("x", Kind::Gauge), &[], 1);
        page.put(&meta("odd", Kind::Gauge), &[], 1);
        let mut other = Exposition::of(&[("pod", "b")]);
        other.put(&meta("new", Kind::Gauge), &[], 2);
        other.put(&meta("x", Kind::Gauge), &[], 3);
        other.put(&meta("odd", Kind::Counter), &[], 4);
        assert_eq!(page.merge(other), ["odd"]);
        assert_eq!(page.names().collect::<Vec<_>>(), ["x", "odd", "new"]);
        let text = page.to_string();
        assert!(text.contains("x{pod=\"a\"} 1\nx{pod=\"b\"} 3\n") && !text.contains("} 4"), "{text}");
    }

    #[test]
    fn what_is_no_exposition_is_named_by_its_line() {
        let wrong = [
            ("x 1", 1),
            ("# TYPE x gauge\nx", 2),
            ("# TYPE x gauge\nx one", 2),
            ("# TYPE x gauge\ny 1", 2),
            ("# TYPE x gauge\nx{a=\"b\" 1", 2),
            ("# TYPE x gauge\nx{a=\"b\"c=\"d\"} 1", 2),
            ("# TYPE x gauge\nx{a=\"\\q\"} 1", 2),
            ("# TYPE x gauge\nx{1=\"\"} 1", 2),
            ("# TYPE x strange", 1),
            ("# TYPE x gauge\n# TYPE x gauge", 2),
            ("# TYPE x histogram\nx 1", 2),
            ("\n<html>", 2),
        ];
        for (text, line) in wrong {
            assert_eq!(Exposition::parse(text).unwrap_err().line, line, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_label_round_trips(
            labels in proptest::collection::vec(("[a-z_][a-z0-9_]{0,8}", any::<String>()), 0..4),
            help: String,
            number: u64,
        ) {
            let mut page = Exposition::default();
            let meta = Meta { name: "x_total".into(), kind: Kind::Counter, help: help.into() };
            let borrowed: Vec<_> = labels.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
            page.put(&meta, &borrowed, number);
            let text = page.to_string();
            prop_assert_eq!(text.matches('\n').count(), 3, "a line a sample: {}", text);
            prop_assert_eq!(Exposition::parse(&text).unwrap(), page);
        }

        #[test]
        fn any_text_is_survived(text: String, tail in "[{}=\",\\\\ a1\n]{0,40}") {
            let _ = Exposition::parse(&text);
            let _ = Exposition::parse(&format!("# TYPE a gauge\na{tail}"));
        }
    }
}
