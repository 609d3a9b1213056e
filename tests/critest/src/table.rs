//! The table of specs and the verdict. Must not know files.

use std::collections::BTreeSet;
use std::fmt;

use crate::known::{Known, Reason, Where};
use crate::report::{End, Specs};

/// What is said of a spec.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Remark {
    /// It passed wherever it ran.
    None,
    /// It differs, and this is why.
    Reason(String),
    /// It differs and should not, or it is as it should be and yet named as different.
    Fault(String),
}

#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) spec: String,
    /// How it ended with runc; none where it did not run.
    pub(crate) runc: Option<End>,
    /// And with the handler.
    pub(crate) other: Option<End>,
    pub(crate) remark: Remark,
}

/// One row for each spec.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) handler: Option<String>,
    pub(crate) rows: Vec<Row>,
}

/// Holds a handler's report against runc's, or judges runc's alone.
pub(crate) fn compare(runc: &Specs, other: Option<(&str, &Specs)>, known: &Known) -> Table {
    let mut names: BTreeSet<&str> = runc.keys().map(String::as_str).collect();
    names.extend(known.specs(Where::Here));
    if let Some((_, specs)) = other {
        names.extend(specs.keys().map(String::as_str));
        names.extend(known.specs(Where::Bulkhead));
    }
    let rows = names.into_iter().map(|spec| {
        let on_runc = runc.get(spec);
        let on_other = other.map(|(_, specs)| specs.get(spec));
        Row {
            spec: spec.to_owned(),
            runc: on_runc.cloned(),
            other: on_other.flatten().cloned(),
            remark: remark(spec, on_runc, on_other, known),
        }
    });
    Table { handler: other.map(|(handler, _)| handler.to_owned()), rows: rows.collect() }
}

/// Judges one spec. `other` is none where runc is judged alone.
fn remark(spec: &str, runc: Option<&End>, other: Option<Option<&End>>, known: &Known) -> Remark {
    let here = known.reason(Where::Here, spec);
    let on_runc = match (here, runc) {
        (Some(_), None) => {
            return Remark::Fault("named under [here], but the suite has no such spec".to_owned());
        }
        // Another machine may allow what this one forbids, and then it is held against the runtime.
        (_, None | Some(End::Passed)) => Remark::None,
        (Some(reason), Some(End::Failed(why) | End::Skipped(why))) => explained(reason, why),
        (None, Some(End::Failed(why) | End::Skipped(why))) => {
            Remark::Fault(format!("not with runc, and no reason is known: {}", first_line(why)))
        }
    };
    let Some(other) = other else { return on_runc };
    match (known.reason(Where::Bulkhead, spec), other) {
        _ if matches!(on_runc, Remark::Fault(_)) => on_runc,
        (Some(_), None) if runc.is_none() => {
            Remark::Fault("named under [bulkhead], but the suite has no such spec".to_owned())
        }
        (_, None) => Remark::Fault("it did not run".to_owned()),
        (Some(_), Some(End::Passed)) => Remark::Fault("named under [bulkhead], but it passes".to_owned()),
        (None, Some(End::Passed)) => on_runc,
        (Some(reason), Some(End::Failed(why) | End::Skipped(why))) => explained(reason, why),
        (None, Some(End::Failed(why) | End::Skipped(why))) => match here {
            Some(reason) if on_runc != Remark::None => explained(reason, why),
            _ => Remark::Fault(format!("no reason is known: {}", first_line(why))),
        },
    }
}

/// A known reason, if the spec says what it is known to say.
fn explained(reason: &Reason, why: &str) -> Remark {
    if why.contains(&reason.says) {
        Remark::Reason(reason.text.clone())
    } else {
        Remark::Fault(format!("it does not say {:?} but: {}", reason.says, first_line(why)))
    }
}

/// The first line with words, as much of it as a table bears.
fn first_line(message: &str) -> String {
    let line = message.lines().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
    line.trim().chars().take(300).collect()
}

impl Table {
    /// Whether every difference is known and every known difference is one.
    pub(crate) fn is_as_known(&self) -> bool {
        !self.rows.iter().any(|row| matches!(row.remark, Remark::Fault(_)))
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.spec.chars().count()).max().unwrap_or(0);
        let handler = self.handler.as_deref().unwrap_or_default();
        let column = handler.len().max(7);
        let end = |end: &Option<End>| end.as_ref().map_or_else(|| "-".to_owned(), End::to_string);
        writeln!(f, "{:width$}  {:7}  {handler:column$}  reason", "spec", "runc")?;
        for row in &self.rows {
            let (mark, text) = match &row.remark {
                Remark::None => ("", ""),
                Remark::Reason(reason) => ("", reason.as_str()),
                Remark::Fault(fault) => ("UNEXPECTED: ", fault.as_str()),
            };
            let other = if self.handler.is_some() { end(&row.other) } else { String::new() };
            let line = format!("{:width$}  {:7}  {other:column$}  {mark}{text}", row.spec, end(&row.runc));
            writeln!(f, "{}", line.trim_end())?;
        }
        let count = |wanted: fn(&Row) -> bool| self.rows.iter().filter(|row| wanted(row)).count();
        let passed = |end: &Option<End>| *end == Some(End::Passed);
        writeln!(f)?;
        writeln!(
            f,
            "runc: {} of {} passed",
            count(|row| row.runc == Some(End::Passed)),
            count(|row| row.runc.is_some())
        )?;
        if self.handler.is_some() {
            let both = self.rows.iter().filter(|row| passed(&row.runc) && passed(&row.other)).count();
            writeln!(
                f,
                "{handler}: {both} of the {} that pass with runc",
                count(|row| row.runc == Some(End::Passed))
            )?;
        }
        let known = count(|row| matches!(row.remark, Remark::Reason(_)));
        writeln!(
            f,
            "{known} with a known reason, {} unexpected",
            count(|row| matches!(row.remark, Remark::Fault(_)))
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::known;
    use crate::report::{parse, tests::written};

    const KNOWN: &str = "[here]\nPod > network > far\n  says lost\n  no network\n[bulkhead]\nPod > network > host\n  says refused\n  a machine\n";

    fn specs(far: &str, host: &str, own: &str) -> Specs {
        parse(&written(&[("far", far, "lost"), ("host", host, "refused"), ("own", own, "broken\nmore")]))
            .unwrap()
    }

    fn judged(runc: &Specs, other: &Specs) -> Table {
        compare(runc, Some(("bulkhead", other)), &known::parse(KNOWN).unwrap())
    }

    fn faults(table: &Table) -> Vec<&str> {
        let fault = |row: &Row| matches!(row.remark, Remark::Fault(_));
        table.rows.iter().filter(|row| fault(row)).map(|row| row.spec.as_str()).collect()
    }

    #[test]
    fn known_differences_are_no_faults() {
        let table = judged(&specs("failed", "passed", "passed"), &specs("failed", "failed", "passed"));
        assert!(table.is_as_known(), "{table}");
        let text = table.to_string();
        assert!(text.contains("a machine") && text.contains("no network"), "{text}");
        assert!(text.contains("bulkhead: 1 of the 2 that pass with runc"), "{text}");
    }

    #[test]
    fn a_spec_that_passes_with_runc_alone_is_a_fault() {
        let table = judged(&specs("failed", "passed", "passed"), &specs("failed", "failed", "failed"));
        assert_eq!(faults(&table), ["Pod > network > own"]);
        assert!(table.to_string().contains("UNEXPECTED: no reason is known: broken\n"), "{table}");
        let table = judged(&specs("failed", "passed", "passed"), &specs("failed", "failed", "skipped"));
        assert_eq!(faults(&table), ["Pod > network > own"]);
    }

    #[test]
    fn a_known_spec_that_fails_otherwise_is_a_fault() {
        let runc = specs("failed", "passed", "passed");
        let broken = [("far", "failed", "lost"), ("host", "failed", "crashed"), ("own", "passed", "")];
        let table = judged(&runc, &parse(&written(&broken)).unwrap());
        assert_eq!(faults(&table), ["Pod > network > host"]);
        assert!(table.to_string().contains("crashed"), "{table}");
    }

    #[test]
    fn a_spec_that_did_not_run_is_a_fault() {
        let mut other = specs("failed", "failed", "passed");
        other.remove("Pod > network > own");
        assert_eq!(faults(&judged(&specs("failed", "passed", "passed"), &other)), ["Pod > network > own"]);
    }

    #[test]
    fn a_reason_for_what_passes_is_a_fault() {
        let table = judged(&specs("failed", "passed", "passed"), &specs("failed", "passed", "passed"));
        assert_eq!(faults(&table), ["Pod > network > host"]);
    }

    #[test]
    fn what_another_machine_allows_is_held_against_the_runtime() {
        let runc = specs("passed", "passed", "passed");
        assert!(judged(&runc, &specs("passed", "failed", "passed")).is_as_known());
        assert_eq!(faults(&judged(&runc, &specs("failed", "failed", "passed"))), ["Pod > network > far"]);
    }

    #[test]
    fn a_reason_for_what_is_no_spec_is_a_fault() {
        let runc = parse(&written(&[("own", "passed", "")])).unwrap();
        assert_eq!(faults(&judged(&runc, &runc)), ["Pod > network > far", "Pod > network > host"]);
    }

    #[test]
    fn runc_is_judged_by_what_the_machine_forbids() {
        let known = known::parse(KNOWN).unwrap();
        assert!(compare(&specs("failed", "passed", "passed"), None, &known).is_as_known());
        assert_eq!(
            faults(&compare(&specs("failed", "passed", "failed"), None, &known)),
            ["Pod > network > own"]
        );
    }
}
