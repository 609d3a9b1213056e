//! The answer: figures beside their targets, as a table for eyes and as JSON.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::ensure;
use serde::Serialize;

use crate::host::Host;
use crate::memory::Growth;
use crate::stats::{Ratio, Summary};
use crate::timeline::Span;

/// Bytes in one.
pub(crate) const MIB: f64 = (1 << 20) as f64;

/// What figures are counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    Seconds,
    Bytes,
    /// Shown in millions, where the target is stated so.
    DecimalBytes,
    /// Times runc's figure.
    TimesRunc,
    /// Seconds more than runc's figure.
    SecondsMore,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::Seconds => format!("{value:.3} s"),
            Self::Bytes => format!("{:.1} MiB", value / MIB),
            Self::DecimalBytes => format!("{:.1} MB", value / 1e6),
            Self::TimesRunc => format!("{value:.2} x"),
            Self::SecondsMore => format!("{value:.3} s more"),
        }
    }
}

/// The most that a measure may be.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Target {
    pub(crate) most: f64,
    pub(crate) unit: Unit,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Measure {
    pub(crate) name: &'static str,
    pub(crate) unit: Unit,
    pub(crate) runc: Option<Summary>,
    pub(crate) bulkhead: Option<Summary>,
    pub(crate) ratio: Option<Ratio>,
    pub(crate) target: Option<Target>,
    /// Why, where a target is missed; or what the figure is.
    pub(crate) note: String,
}

impl Measure {
    /// Measured in rounds, beside runc.
    pub(crate) fn beside(name: &'static str, unit: Unit, runc: &[f64], bulkhead: &[f64]) -> Self {
        Self {
            name,
            unit,
            runc: Summary::of(runc),
            bulkhead: Summary::of(bulkhead),
            ratio: Ratio::of(bulkhead, runc),
            target: None,
            note: String::new(),
        }
    }

    /// Of bulkhead alone.
    pub(crate) fn alone(name: &'static str, unit: Unit, values: &[f64]) -> Self {
        Self { runc: None, ratio: None, ..Self::beside(name, unit, &[], values) }
    }

    pub(crate) fn at_most(mut self, most: f64, unit: Unit) -> Self {
        self.target = Some(Target { most, unit });
        self
    }

    pub(crate) fn with_note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    /// What is held against the target.
    fn figure(&self, unit: Unit) -> Option<f64> {
        match unit {
            Unit::TimesRunc => self.ratio.as_ref().map(|ratio| ratio.ratio),
            Unit::SecondsMore => Some(self.bulkhead.as_ref()?.median - self.runc.as_ref()?.median),
            _ => self.bulkhead.as_ref().map(|summary| summary.median),
        }
    }

    /// Met, or missed by how much.
    pub(crate) fn verdict(&self) -> String {
        let Some(Target { most, unit }) = self.target else { return "-".into() };
        match self.figure(unit) {
            None => "not measured".into(),
            Some(figure) if figure <= most => "met".into(),
            Some(figure) => {
                format!("missed by {} ({:.0} %)", unit.show(figure - most), (figure / most - 1.0) * 100.0)
            }
        }
    }

    fn is_missed(&self) -> bool {
        self.verdict().starts_with("missed")
    }

    fn row(&self) -> [String; 6] {
        let show = |summary: &Option<Summary>| match summary {
            None => "-".to_owned(),
            Some(one) if one.count == 1 => self.unit.show(one.median),
            Some(many) => {
                let [low, high] = many.quartiles.map(|value| self.unit.show(value));
                let low = low.split(' ').next().unwrap_or_default();
                format!("{} ({low} .. {high})", self.unit.show(many.median))
            }
        };
        let ratio = self.ratio.as_ref().map(|ratio| {
            let [low, high] = ratio.interval;
            format!("{:.2} ({low:.2} .. {high:.2})", ratio.ratio)
        });
        [
            self.name.to_owned(),
            show(&self.runc),
            show(&self.bulkhead),
            ratio.unwrap_or_else(|| "-".into()),
            self.target.map_or("-".into(), |target| format!("<= {}", target.unit.show(target.most))),
            self.verdict(),
        ]
    }
}

/// Everything that was found out.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) host: Host,
    /// Images unpacked, page cache warm, no pool and no template.
    pub(crate) start_state: &'static str,
    pub(crate) network: &'static str,
    pub(crate) rounds: usize,
    pub(crate) load_after: f64,
    pub(crate) measures: Vec<Measure>,
    pub(crate) memory_runc: Option<Growth>,
    pub(crate) memory_bulkhead: Option<Growth>,
    /// The stages of the start whose first byte took the median time.
    pub(crate) timeline: Vec<Span>,
    /// What could not be measured, and why.
    pub(crate) problems: Vec<String>,
    /// What should be gone and is not.
    pub(crate) left_behind: Vec<String>,
}

impl Report {
    /// Writes result.json and table.txt, and shows the table; `more` is what else was written there.
    ///
    /// # Errors
    /// A file cannot be written; or not everything could be measured, which is told at last.
    pub(crate) fn save(&self, folder: &Path, more: &str) -> anyhow::Result<()> {
        let table = self.table();
        fs::write(folder.join("result.json"), serde_json::to_string_pretty(self)? + "\n")?;
        fs::write(folder.join("table.txt"), &table)?;
        println!("{table}\n{}: result.json, table.txt{more}", folder.display());
        ensure!(self.problems.is_empty(), "not everything could be measured");
        Ok(())
    }

    /// The table, and below it the notes.
    pub(crate) fn table(&self) -> String {
        let heads = ["MEASURE", "RUNC", "BULKHEAD", "RATIO", "TARGET", "VERDICT"].map(str::to_owned);
        let rows: Vec<_> = std::iter::once(heads).chain(self.measures.iter().map(Measure::row)).collect();
        let widths: [usize; 6] = std::array::from_fn(|column| {
            rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
        });
        let mut out = String::new();
        for row in &rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(widths) {
                // Writing to a string cannot fail.
                let _ = write!(line, "{cell:width$}  ");
            }
            let _ = writeln!(out, "{}", line.trim_end());
        }
        let host = &self.host;
        let _ = writeln!(
            out,
            "\nmedians and (quartiles) of {} interleaved rounds; ratios with a 95 % interval; {}; network: {}",
            self.rounds, self.start_state, self.network
        );
        let _ = writeln!(
            out,
            "{} x {}, Linux {}, load {:.1} before and {:.1} after; {}",
            host.processors,
            host.processor,
            host.kernel,
            host.load_before,
            self.load_after,
            host.acceleration
        );
        for measure in self.measures.iter().filter(|measure| !measure.note.is_empty()) {
            let about = if measure.is_missed() { "why" } else { "note" };
            let _ = writeln!(out, "{about}: {}: {}", measure.name, measure.note);
        }
        for problem in &self.problems {
            let _ = writeln!(out, "NOT MEASURED: {problem}");
        }
        for left in &self.left_behind {
            let _ = writeln!(out, "LEFT BEHIND: {left}");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_target_says_by_how_much() {
        let measure = |seconds| Measure::alone("m", Unit::Seconds, &[seconds]).at_most(1.5, Unit::Seconds);
        assert_eq!(measure(1.5).verdict(), "met");
        assert_eq!(measure(1.8).verdict(), "missed by 0.300 s (20 %)");
        assert_eq!(
            Measure::alone("m", Unit::Seconds, &[]).at_most(1.0, Unit::Seconds).verdict(),
            "not measured"
        );
    }

    #[test]
    fn a_target_may_be_seconds_more_than_runcs() {
        let measure = |seconds| {
            Measure::beside("ready", Unit::Seconds, &[1.0, 1.0], &[seconds, seconds])
                .at_most(1.5, Unit::SecondsMore)
        };
        assert_eq!(measure(2.4).verdict(), "met");
        assert_eq!(measure(2.8).verdict(), "missed by 0.300 s more (20 %)");
        assert_eq!(measure(2.8).row()[4], "<= 1.500 s more");
    }

    #[test]
    fn a_target_may_be_a_multiple_of_runcs() {
        let measure =
            Measure::beside("exec", Unit::Seconds, &[0.1, 0.1], &[0.3, 0.3]).at_most(2.0, Unit::TimesRunc);
        assert_eq!(measure.verdict(), "missed by 1.00 x (50 %)");
        assert_eq!(measure.row()[3], "3.00 (3.00 .. 3.00)");
        assert_eq!(measure.row()[2], "0.300 s (0.300 .. 0.300 s)");
    }
}
