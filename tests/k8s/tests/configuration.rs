//! What a pod is told, and hears of later.

use anyhow::{Result, ensure};
use harness::{Context, Test};

pub(crate) const TESTS: &[Test] =
    &[Test::common("configuration::as_variables_and_files_that_follow", configuration)];

fn configuration(t: &mut Context<'_>) -> Result<()> {
    t.example("configuration.yaml")?;
    t.ready(&["configuration"])?;
    let seen = t.in_pod("configuration", "main", "echo $COLOUR; echo $WORD; echo $ADDRESS; echo $LIMIT")?;
    let address = t.field("pod/configuration", "{.status.podIP}")?;
    ensure!(seen == format!("blue\nopen sesame\n{address}\n96"), "{seen}");
    let seen =
        t.in_pod("configuration", "main", "cat /settings/page /password/word; stat -L -c %a /password/word")?;
    ensure!(seen == "first line\nsecond line\nopen sesame400", "{seen}");
    let seen = t.in_pod("configuration", "main", "cat /about/labels; echo; cat /about/note")?;
    ensure!(seen == "tier=\"front\"\nof this pod", "{seen}");
    // A token of this pod for whom it names, which is not the one to speak to the API server with.
    let token = t.in_pod("configuration", "main", "cat /about/token")?;
    ensure!(token.split('.').count() == 3, "{token}");
    let script = "wget -q -O - --no-check-certificate --header \"Authorization: Bearer \
                  $(cat /var/run/secrets/kubernetes.io/serviceaccount/token)\" \
                  https://kubernetes.default.svc/version | grep -c v1.36";
    let version = t.kubectl(&["exec", "configuration", "--", "sh", "-c", script]).output()?;
    ensure!(version.out() == "1" || version.err().contains("TLS"), "{version}");
    let change = r#"{"data": {"colour": "green", "page": "another\n"}}"#;
    t.kubectl_ok(&["patch", "configmap", "settings", "-p", change])?;
    t.kubectl_ok(&["patch", "secret", "password", "-p", r#"{"stringData": {"word": "close"}}"#])?;
    // The kubelet looks again after some seconds; who watches for it in the pod has it at once.
    let script = "until [ $(cat /settings/colour) = green ] && [ $(cat /password/word) = close ]; do \
                  usleep 100000; done; cat /settings/page; echo $COLOUR";
    let seen = t.in_pod("configuration", "main", script)?;
    ensure!(seen == "another\nblue", "a variable stays as it was: {seen}");
    Ok(())
}
