//! A client for what pods tell of themselves: HTTP over a unix socket, and Prometheus' text.
//! Reads by the format's own rules and shares no line with what it tests.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::pace::stretched;

/// How long an answer may take: what Prometheus waits where it is not told otherwise.
const PATIENCE: Duration = Duration::from_secs(10);

/// A page of samples.
#[derive(Debug)]
pub struct Figures {
    /// Names of the families and their types.
    pub families: BTreeMap<String, String>,
    samples: BTreeMap<String, f64>,
    /// How long it took to get them.
    pub took: Duration,
}

impl Figures {
    /// `GET /metrics` at a unix socket.
    pub fn scrape(socket: &Path) -> Result<Self> {
        let began = Instant::now();
        let answer = get(socket, "/metrics")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no end of the head")?;
        ensure!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        ensure!(head.contains("\r\nContent-Type: text/plain; version=0.0.4"), "{head}");
        ensure!(head.contains(&format!("\r\nContent-Length: {}", body.len())), "{head}");
        let mut figures = Self::parse(body)?;
        figures.took = began.elapsed();
        Ok(figures)
    }

    /// Reads a page, and fails where it is none: a family that is there twice or not told of, a sample that is
    /// there twice or has no number.
    pub fn parse(text: &str) -> Result<Self> {
        ensure!(text.ends_with('\n'), "the last line has no end");
        let mut figures = Self { families: BTreeMap::new(), samples: BTreeMap::new(), took: Duration::ZERO };
        let mut helped = BTreeSet::new();
        let mut family = String::new();
        for line in text.lines() {
            let wrong = || format!("in {line:?}");
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, words) = rest.split_once(' ').with_context(wrong)?;
                ensure!(!words.is_empty() && helped.insert(name), "help again or without words {}", wrong());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').with_context(wrong)?;
                ensure!(helped.contains(name), "a family without help {}", wrong());
                ensure!(figures.families.insert(name.into(), kind.into()).is_none(), "twice {}", wrong());
                family = name.into();
            } else {
                let (sample, value) = line.rsplit_once(' ').with_context(wrong)?;
                let name = sample.split('{').next().unwrap_or_default();
                let suffix = name.strip_prefix(family.as_str()).with_context(wrong)?;
                let histogram = figures.families.get(&family).is_some_and(|kind| kind == "histogram");
                let known = if histogram { &["_bucket", "_sum", "_count"][..] } else { &[""][..] };
                ensure!(known.contains(&suffix), "a sample of another family {}", wrong());
                let value: f64 = value.parse().with_context(wrong)?;
                ensure!(figures.samples.insert(sample.into(), value).is_none(), "twice {}", wrong());
            }
        }
        Ok(figures)
    }

    /// The value of the sample of that family that has all these labels, written as `name="value"`.
    pub fn find(&self, family: &str, labels: &[&str]) -> Option<f64> {
        let fits = |sample: &&String| {
            let (name, rest) = sample.split_once('{').unwrap_or((sample, ""));
            let has = |label: &&str| {
                rest.split_inclusive(['{', ',', '}']).any(|l| l.trim_end_matches([',', '}']) == *label)
            };
            name == family && labels.iter().all(has)
        };
        self.samples.keys().find(fits).map(|sample| self.samples[sample])
    }

    /// As [`Figures::find`]; fails where there is no such sample.
    pub fn get(&self, family: &str, labels: &[&str]) -> Result<f64> {
        self.find(family, labels).with_context(|| format!("no {family} with {labels:?} in {self:#?}"))
    }
}

fn get(socket: &Path, path: &str) -> Result<String> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(stretched(PATIENCE)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: pod\r\n\r\n")?;
    let mut answer = String::new();
    if let Err(error) = stream.read_to_string(&mut answer) {
        bail!("no whole answer: {error}; so far:\n{answer}");
    }
    Ok(answer)
}
