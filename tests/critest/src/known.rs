//! The known differences: which spec need not pass where, and why. Must not know what a run said.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};

/// Where a spec need not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Where {
    /// On the test machine, whatever the runtime.
    Here,
    /// With bulkhead, by either handler.
    Bulkhead,
}

/// Why a spec need not pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reason {
    /// For who reads the table.
    pub(crate) text: String,
    /// Words that the spec's own message has, so that no other failure hides behind the reason.
    pub(crate) says: String,
}

/// Reasons by the names of specs.
#[derive(Debug, Default)]
pub(crate) struct Known(BTreeMap<(Where, String), Reason>);

impl Known {
    pub(crate) fn reason(&self, place: Where, spec: &str) -> Option<&Reason> {
        self.0.get(&(place, spec.to_owned()))
    }

    /// The specs that are named for a place.
    pub(crate) fn specs(&self, place: Where) -> impl Iterator<Item = &str> {
        self.0.keys().filter(move |(at, _)| *at == place).map(|(_, spec)| spec.as_str())
    }
}

/// Reads the file: sections `[here]` and `[bulkhead]`, in them the name of one or more specs, each on a line,
/// then on indented lines `says` with words of their message, and their reason. `#` begins a remark.
pub(crate) fn parse(text: &str) -> anyhow::Result<Known> {
    let mut known = Known::default();
    let mut place = None;
    let mut specs = Vec::new();
    let mut reason = Reason::default();
    let lines = text.lines().map(str::trim_end).enumerate();
    for (number, line) in lines.filter(|(_, line)| !line.starts_with('#')) {
        let at = || format!("line {}", number + 1);
        if line.starts_with(char::is_whitespace) {
            ensure!(!specs.is_empty(), "{}: a reason without a spec above it", at());
            let line = line.trim_start();
            if let Some(words) = line.strip_prefix("says ") {
                reason.says = words.to_owned();
                continue;
            }
            if !reason.text.is_empty() {
                reason.text.push(' ');
            }
            reason.text.push_str(line);
            continue;
        }
        if !reason.text.is_empty() {
            known.add(place, &mut specs, &mut reason).with_context(at)?;
        }
        match line {
            "" => ensure!(specs.is_empty(), "{}: a spec without a reason below it", at()),
            "[here]" => place = Some(Where::Here),
            "[bulkhead]" => place = Some(Where::Bulkhead),
            // A spec's name may begin with a mark in brackets; a section is nothing else.
            _ if line.starts_with('[') && line.find(']') == Some(line.len() - 1) => {
                bail!("{}: unknown section {line}", at())
            }
            _ => specs.push(line.to_owned()),
        }
    }
    ensure!(specs.is_empty() || !reason.text.is_empty(), "the last spec has no reason below it");
    known.add(place, &mut specs, &mut reason)?;
    Ok(known)
}

impl Known {
    fn add(
        &mut self,
        place: Option<Where>,
        specs: &mut Vec<String>,
        reason: &mut Reason,
    ) -> anyhow::Result<()> {
        let reason = std::mem::take(reason);
        for spec in specs.drain(..) {
            let place = place.context("a spec before the first section")?;
            ensure!(!reason.says.is_empty(), "{spec}: a line `says …` is missing");
            let before = self.0.insert((place, spec.clone()), reason.clone());
            ensure!(before.is_none(), "named twice: {spec}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_share_the_reason_below_them() {
        let text = "# remark\n[here]\na > b\n    says x y\n    no\n    network\n\n[bulkhead]\nc\nd\n  says z\n  two\n";
        let known = parse(text).unwrap();
        let reason = |text: &str, says: &str| Some(Reason { text: text.to_owned(), says: says.to_owned() });
        assert_eq!(known.reason(Where::Here, "a > b").cloned(), reason("no network", "x y"));
        assert_eq!(known.reason(Where::Bulkhead, "c").cloned(), reason("two", "z"));
        assert_eq!(known.reason(Where::Bulkhead, "d").cloned(), reason("two", "z"));
        assert_eq!(known.reason(Where::Here, "c"), None);
        assert_eq!(known.specs(Where::Bulkhead).collect::<Vec<_>>(), ["c", "d"]);
    }

    #[test]
    fn the_name_of_a_spec_may_begin_with_a_mark() {
        let known = parse("[here]\n[sig-node] a > b [Slow]\n  says x\n  c\n").unwrap();
        assert_eq!(known.specs(Where::Here).collect::<Vec<_>>(), ["[sig-node] a > b [Slow]"]);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (text, word) in [
            ("[elsewhere]\n", "elsewhere"),
            ("a\n  says x\n  b\n", "section"),
            ("[here]\na\n", "no reason"),
            ("[here]\na\n\nb\n  c\n", "without a reason"),
            ("[here]\n  b\n", "without a spec"),
            ("[here]\na\n  b\n", "says"),
            ("[here]\na\n  says x\n", "no reason"),
            ("[here]\na\n  says x\n  b\na\n  says x\n  c\n", "twice"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(word), "{text:?}: {error}");
        }
    }

    #[test]
    fn the_files_that_are_in_use_can_be_read() {
        parse(include_str!("../differences")).unwrap();
        parse(include_str!("../../e2e/differences")).unwrap();
    }
}
