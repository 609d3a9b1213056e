//! What ginkgo writes of a run: the end of each spec. Must not know what is expected.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::ensure;
use serde::Deserialize;

/// How a spec ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Passed,
    /// With ginkgo's message.
    Failed(String),
    /// Left out by the spec itself, with its reason.
    Skipped(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Passed => "passed",
            Self::Failed(_) => "FAILED",
            Self::Skipped(_) => "skipped",
        })
    }
}

/// The end of each spec that was to run, by its name.
pub(crate) type Specs = BTreeMap<String, End>;

/// Reads the report of one run.
pub(crate) fn parse(json: &str) -> anyhow::Result<Specs> {
    let suites: Vec<Suite> = serde_json::from_str(json)?;
    let mut specs = Specs::new();
    for report in suites.into_iter().flat_map(|suite| suite.spec_reports.unwrap_or_default()) {
        let failure = report.failure.unwrap_or_default();
        // Specs that a filter has left out have no reason, one that left itself out has.
        if report.state == "skipped" && failure.message.is_empty() {
            continue;
        }
        // What runs before and after the suite counts where it fails.
        if report.leaf_node_type != "It" && report.state == "passed" {
            continue;
        }
        let end = match report.state.as_str() {
            "passed" => End::Passed,
            "skipped" => End::Skipped(failure.message),
            // Panicked, interrupted, aborted, timed out.
            _ => End::Failed(failure.message),
        };
        let path: Vec<_> =
            report.texts.iter().flatten().map(|text| text.trim_start_matches("[k8s.io] ")).collect();
        let leaf =
            if report.leaf_node_text.is_empty() { &report.leaf_node_type } else { &report.leaf_node_text };
        let name = path.into_iter().chain([leaf.as_str()]).collect::<Vec<_>>().join(" > ");
        specs.insert(name, end);
    }
    ensure!(!specs.is_empty(), "it names no spec that ran");
    Ok(specs)
}

// github.com/onsi/ginkgo/v2/types: Report and SpecReport, the parts that matter here.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Option<Vec<SpecReport>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SpecReport {
    #[serde(rename = "ContainerHierarchyTexts")]
    texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    failure: Option<Failure>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    #[serde(default)]
    message: String,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A report as ginkgo writes it, of specs below one container.
    pub(crate) fn written(specs: &[(&str, &str, &str)]) -> String {
        let specs: Vec<_> = specs
            .iter()
            .map(|(name, state, message)| {
                serde_json::json!({"ContainerHierarchyTexts": ["[k8s.io] Pod", "network"], "LeafNodeType": "It",
                    "LeafNodeText": name, "State": state, "Failure": {"Message": message}})
            })
            .collect();
        serde_json::json!([{"SuitePath": "/", "SpecReports": specs}]).to_string()
    }

    #[test]
    fn a_spec_has_the_name_of_its_containers_and_its_own() {
        let specs = parse(&written(&[("has a name", "passed", "")])).unwrap();
        assert_eq!(specs["Pod > network > has a name"], End::Passed);
    }

    #[test]
    fn filtered_specs_are_left_out_and_those_that_skip_themselves_are_not() {
        let specs = parse(&written(&[("a", "skipped", ""), ("b", "skipped", "no such feature")])).unwrap();
        assert_eq!(specs.len(), 1);
        assert_eq!(specs["Pod > network > b"], End::Skipped("no such feature".to_owned()));
    }

    #[test]
    fn every_other_state_is_a_failure() {
        let states = ["failed", "panicked", "timedout", "interrupted", "aborted"];
        for state in states {
            let specs = parse(&written(&[("a", state, "why")])).unwrap();
            assert_eq!(specs["Pod > network > a"], End::Failed("why".to_owned()), "{state}");
        }
    }

    #[test]
    fn a_suite_that_fails_before_its_specs_is_seen() {
        let json = r#"[{"SpecReports": [{"ContainerHierarchyTexts": null, "LeafNodeType": "BeforeSuite",
            "LeafNodeText": "", "State": "panicked", "Failure": {"Message": "no file"}}]}]"#;
        assert_eq!(parse(json).unwrap()["BeforeSuite"], End::Failed("no file".to_owned()));
    }

    #[test]
    fn a_report_without_specs_proves_nothing() {
        assert!(parse(r#"[{"SpecReports": null}]"#).is_err());
        assert!(parse(&written(&[("a", "skipped", "")])).is_err());
    }
}
