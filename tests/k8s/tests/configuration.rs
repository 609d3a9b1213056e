//! What a pod is told, and hears of later.

use anyhow::{Context as _, Result, ensure};
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
    tokens(t)?;
    // The kubelet looks again after some seconds; who watches hears of it at once.
    let program =
        std::env::var("BULKHEAD_TEST_WATCHER").context("BULKHEAD_TEST_WATCHER names the watcher")?;
    t.kubectl_ok(&["cp", &program, "configuration:/tmp/watcher"])?;
    let watch = |folder: &str| {
        let watch = t.kubectl(&["exec", "configuration", "--", "/tmp/watcher", folder]).spawn()?;
        watch.wait_for_text("watching\n")?;
        anyhow::Ok(watch)
    };
    let watching = [watch("/settings")?, watch("/password")?];
    let change = r#"{"data": {"colour": "green", "page": "another\n"}}"#;
    t.kubectl_ok(&["patch", "configmap", "settings", "-p", change])?;
    t.kubectl_ok(&["patch", "secret", "password", "-p", r#"{"stringData": {"word": "close"}}"#])?;
    for watch in &watching {
        watch.wait_for_text("..data\n")?;
    }
    let script = "cat /settings/colour /password/word /settings/page; echo $COLOUR";
    let seen = t.in_pod("configuration", "main", script)?;
    ensure!(seen == "greencloseanother\nblue", "a variable stays as it was: {seen}");
    Ok(())
}

/// One for the API server, as every pod has it, and one for somebody else, which the API server refuses.
fn tokens(t: &Context<'_>) -> Result<()> {
    t.in_pod("configuration", "main", "nc -w 60 kubernetes.default.svc 443 </dev/null")?;
    let config = |field: &str| {
        t.kubectl_ok(&[
            "config",
            "view",
            "--raw",
            "-o",
            &format!("jsonpath={{.clusters[0].cluster.{field}}}"),
        ])
    };
    let (server, authority) = (config("server")?, config("certificate-authority")?);
    let whoami = |place: &str| {
        let token = t.in_pod("configuration", "main", &format!("cat {place}"))?;
        t.kubectl(&["auth", "whoami", "--kubeconfig=/dev/null", "--token", &token])
            .args(["--server", &server, "--certificate-authority", &authority])
            .args(["-o", "jsonpath={.status.userInfo.username}"])
            .output()
    };
    let own = whoami("/var/run/secrets/kubernetes.io/serviceaccount/token")?.ok()?;
    ensure!(own.out() == "system:serviceaccount:default:default", "{own}");
    whoami("/about/token")?.expect_failure()?.expect_stderr(&["Unauthorized"])?;
    Ok(())
}
