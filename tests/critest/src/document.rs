//! The part of a document that a run writes: counts, and each difference with its reason. Must not know how a spec is
//! judged.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Context;

use crate::report::End;
use crate::table::{Remark, Row, Table};

const BEGIN: &str = "<!-- results: what is between here and the end is written by the run -->\n";
const END: &str = "<!-- end of the results -->\n";

/// The document with the results of this run in place of the last one's.
pub(crate) fn with_results(document: &str, about: &str, table: &Table) -> anyhow::Result<String> {
    let (before, rest) =
        document.split_once(BEGIN).with_context(|| format!("no line {:?}", BEGIN.trim_end()))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("no line {:?}", END.trim_end()))?;
    Ok(format!("{before}{BEGIN}{}{END}{after}", results(about, table)))
}

fn results(about: &str, table: &Table) -> String {
    let mut text = String::new();
    if !about.is_empty() {
        let _ = writeln!(text, "{about}\n");
    }
    counts(&mut text, table);
    let passed = |row: &&Row| row.runc == Some(End::Passed);
    let (with_runc, without): (Vec<_>, Vec<_>) = table.rows.iter().partition(passed);
    section(&mut text, "Pass with runc and not with bulkhead", "reason", &with_runc, |remark| match remark {
        Remark::Reason(reason) => Some(reason.replace('|', "\\|")),
        _ => None,
    });
    section(&mut text, "Do not pass with runc, because of the set-up", "reason", &without, |remark| {
        match remark {
            Remark::Reason(reason) => Some(reason.replace('|', "\\|")),
            _ => None,
        }
    });
    let all: Vec<_> = table.rows.iter().collect();
    section(&mut text, "Without a reason that is known", "what was seen", &all, |remark| match remark {
        Remark::Fault(fault) => Some(cell(fault)),
        _ => None,
    });
    text
}

/// One line for each way in which a spec can end.
fn counts(text: &mut String, table: &Table) {
    type Wanted = fn(Option<&End>) -> bool;
    let ends: [(&str, Wanted); 4] = [
        ("passed", |end| matches!(end, Some(End::Passed))),
        ("failed", |end| matches!(end, Some(End::Failed(_)))),
        ("left itself out", |end| matches!(end, Some(End::Skipped(_)))),
        ("did not run", |end| end.is_none()),
    ];
    let handler = table.handler.as_deref().unwrap_or("-");
    let both = table.rows.iter().filter(|row| row.runc == Some(End::Passed));
    let of = both.clone().count();
    let and = both.filter(|row| row.other == Some(End::Passed)).count();
    let _ = writeln!(text, "**{and} of the {of} specs that pass with runc pass with {handler}.**\n");
    let _ = writeln!(text, "| of {} specs | runc | {handler} |\n|---|---:|---:|", table.rows.len());
    for (name, wanted) in ends {
        let count = |end: fn(&Row) -> Option<&End>| table.rows.iter().filter(|row| wanted(end(row))).count();
        let (runc, other) = (count(|row| row.runc.as_ref()), count(|row| row.other.as_ref()));
        if runc + other > 0 {
            let _ = writeln!(text, "| {name} | {runc} | {other} |");
        }
    }
}

/// The specs that share a remark stand together.
fn section(
    text: &mut String,
    title: &str,
    column: &str,
    rows: &[&Row],
    remark: fn(&Remark) -> Option<String>,
) {
    let mut specs: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for row in rows {
        if let Some(words) = remark(&row.remark) {
            specs.entry(words).or_default().push(&row.spec);
        }
    }
    if specs.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n## {title}\n| spec | {column} |\n|---|---|");
    for (words, names) in specs {
        let names: Vec<_> = names.into_iter().map(cell).collect();
        let _ = writeln!(text, "| {} | {} |", names.join("<br>"), words);
    }
}

/// Text as it may stand in a table of Markdown.
fn cell(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('|', "\\|")
        .replace('<', "&lt;")
        .replace('*', "\\*")
        .replace(['\n', '`'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{parse, tests::written};
    use crate::{known, table};

    const KNOWN: &str = "[here]\nPod > network > far\n  says lost\n  no network\n[bulkhead]\nPod > network > host\n  says refused\n  a machine\n";

    fn table(own: &str) -> Table {
        let runc =
            parse(&written(&[("far", "failed", "lost"), ("host", "passed", ""), ("own", "passed", "")]))
                .unwrap();
        let other = parse(&written(&[
            ("far", "failed", "lost"),
            ("host", "failed", "refused"),
            ("own", own, "broke | <now>"),
        ]))
        .unwrap();
        table::compare(&runc, Some(("bulkhead", &other)), &known::parse(KNOWN).unwrap())
    }

    #[test]
    fn the_rest_of_the_document_stays() {
        let document = format!("# Title\n{BEGIN}old\n{END}\n## More\n");
        let text = with_results(&document, "On a day.", &table("passed")).unwrap();
        assert!(text.starts_with(&format!("# Title\n{BEGIN}On a day.\n\n**1 of the 2 specs")), "{text}");
        assert!(text.ends_with(&format!("{END}\n## More\n")) && !text.contains("old"), "{text}");
        assert_eq!(with_results(&text, "On a day.", &table("passed")).unwrap(), text);
    }

    #[test]
    fn counts_and_reasons_are_told() {
        let text = results("", &table("passed"));
        assert!(text.contains("| passed | 2 | 1 |\n| failed | 1 | 2 |\n"), "{text}");
        assert!(text.contains(
            "not with bulkhead\n| spec | reason |\n|---|---|\n| Pod > network > host | a machine |\n"
        ));
        assert!(text.contains("| Pod > network > far | no network |\n"), "{text}");
        assert!(!text.contains("Without a reason") && !text.contains("did not run"), "{text}");
    }

    #[test]
    fn what_has_no_reason_is_not_hidden() {
        let text = results("", &table("failed"));
        assert!(
            text.contains("| Pod > network > own | no reason is known: broke \\| &lt;now> |\n"),
            "{text}"
        );
    }

    #[test]
    fn a_document_without_markers_is_refused() {
        assert!(with_results("# Title\n", "", &table("passed")).is_err());
    }
}
