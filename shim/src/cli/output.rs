//! How answers are printed: aligned columns for eyes, JSON for programs.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use serde::Serialize;

/// How to print an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// Aligned columns
    #[default]
    Table,
    /// One JSON document
    Json,
}

/// Prints a value as indented JSON.
pub(super) fn json(out: &mut dyn Write, value: &impl Serialize) -> anyhow::Result<()> {
    // As a string first: a write error inside serde_json would lose its kind.
    let text = serde_json::to_string_pretty(value)?;
    Ok(writeln!(out, "{text}")?)
}

/// Prints rows in columns as wide as their widest cell, two blanks apart; the last column is not padded.
pub(super) fn columns<const N: usize>(out: &mut dyn Write, rows: &[[String; N]]) -> io::Result<()> {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// A colour of the terminal (ECMA-48, SGR).
#[derive(Clone, Copy)]
pub(super) enum Colour {
    Green,
    Yellow,
    Red,
}

/// Colours `text` where stdout is a terminal that has not asked to be spared (no-color.org).
pub(super) fn coloured(text: &str, colour: Colour) -> String {
    let spared = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if spared || !io::stdout().is_terminal() {
        return text.to_owned();
    }
    let code = match colour {
        Colour::Green => 32,
        Colour::Yellow => 33,
        Colour::Red => 31,
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// A time span in its two largest units, as `kubectl get` and `docker ps` have it.
pub(super) fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..600 => format!("{}m{}s", seconds / 60, seconds % 60),
        600..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// An amount of memory in MiB with one decimal where that tells something.
pub(super) fn mib(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 10.0 { format!("{mib:.1} MiB") } else { format!("{mib:.0} MiB") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_have_no_trailing_blanks() {
        let mut out = Vec::new();
        let rows = [["A".to_owned(), "B".to_owned()], ["longer".to_owned(), String::new()]];
        columns(&mut out, &rows).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "A       B\nlonger\n");
    }

    #[test]
    fn ages_have_two_units_at_most() {
        let cases = [(0, "0s"), (61, "1m1s"), (3599, "59m"), (3660, "1h1m"), (90_000, "1d1h")];
        for (seconds, text) in cases {
            assert_eq!(age(seconds), text);
        }
    }

    #[test]
    fn amounts_of_memory_are_short() {
        assert_eq!((mib(5 << 19).as_str(), mib(200 << 20).as_str()), ("2.5 MiB", "200 MiB"));
    }
}
