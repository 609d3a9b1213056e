//! What cannot be: one sentence where the user looks, and nothing left on the node.

use anyhow::{Result, ensure};
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] = &[Test::bulkhead(
    "refusals::each_is_one_sentence",
    "what is refused is what a machine cannot have",
    refusals,
)];

fn refusals(t: &mut Context<'_>) -> Result<()> {
    t.example("refused.yaml")?;
    for (pod, words) in [
        ("host-network", &["hostNetwork", "virtual machine"][..]),
        ("annotation", &["io.bulkhead.sandbox.vcpu", "did you mean `io.bulkhead.sandbox.vcpus`"]),
        ("handler", &["no runtime for \"nowhere\" is configured"]),
    ] {
        let said = t.event(pod, words)?;
        ensure!(said.starts_with("FailedCreatePodSandBox: "), "{said}");
        ensure!(said.len() < 500, "one sentence: {said}");
        let described = t.kubectl_ok(&["describe", "pod", pod])?;
        ensure!(words.iter().all(|word| described.contains(word)), "{described}");
        ensure!(t.field(&format!("pod/{pod}"), "{.status.phase}")? == "Pending");
    }
    Ok(())
}
