//! What an operator sees of pods: their figures, their logs, and a report of a fault.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Figures, Run, Test, signal_process, stretched};
use rustix::process::Signal;
use serde_json::Value;

pub(crate) const TESTS: &[Test] = &[
    Test::bulkhead("observe::figures_of_a_pod", OURS, figures_of_a_pod),
    Test::bulkhead("observe::figures_rise_with_work", OURS, figures_rise_with_work),
    Test::bulkhead(
        "observe::a_stopped_machine_holds_no_scrape_up",
        OURS,
        a_stopped_machine_holds_no_scrape_up,
    ),
    Test::bulkhead("observe::figures_of_the_node", OURS, figures_of_the_node),
    Test::bulkhead("observe::ps_of_a_pod", OURS, ps_of_a_pod),
    Test::bulkhead("observe::logs", OURS, logs),
    Test::bulkhead("observe::report_without_secrets", OURS, report_without_secrets),
    Test::bulkhead("observe::spans_for_opentelemetry", OURS, spans_for_opentelemetry),
];

const OURS: &str = "runc's shim tells nothing of itself";

/// Every family has a row there.
const DOCS: &str = include_str!("../../../docs/observability.md");

fn scrape(t: &Context, id: &str) -> Result<Figures> {
    Figures::scrape(&t.pod_dir(id)?.join("metrics.sock"))
}

/// Whether the documents tell of a family. Counters of the machine monitor are told by kind and name.
fn is_documented(family: &str, kind: &str) -> bool {
    if DOCS.contains(&format!("| `{family}` | {kind} |")) {
        return true;
    }
    let Some(rest) = family.strip_prefix("bulkhead_vmm_").and_then(|rest| rest.strip_suffix("_total")) else {
        return false;
    };
    let Some((device, counter)) = rest.split_once('_') else { return false };
    DOCS.contains(&format!("`bulkhead_vmm_{device}_…_total`")) && DOCS.contains(&format!("`{counter}`"))
}

/// Whatever `bulkhead ps` says is compared with somebody who knows it: ctr, the kernel, our clock.
fn ps_of_a_pod(t: &mut Context) -> Result<()> {
    let began = Instant::now();
    t.start_sleeper(&["--memory-limit", "100663296"], "c")?;
    let out = t.bulkhead(&["ps", "--output", "json"])?.output()?.ok()?.out();
    let pods: Value = serde_json::from_str(&out)?;
    let table = t.bulkhead(&["ps"])?.output()?.ok()?.out();
    let most = began.elapsed().as_secs();
    let tasks = t.ctr_ok(&["task", "ls"])?;
    let pid = tasks.lines().nth(1).and_then(|line| line.split_whitespace().nth(1)).context("no task")?;
    let shim = t.process("containerd-shim")?;
    let pod = &pods[0];
    ensure!(pods.as_array().is_some_and(|all| all.len() == 1), "{pods:#}");
    ensure!(pod["namespace"] == t.node().namespace() && pod["id"] == "c", "{pod:#}");
    ensure!(pod["status"] == "running" && pod["shim_pid"] == shim.pid, "the shim is {shim}: {pod:#}");
    let vmm = t.processes().into_iter().find(|p| pod["vmm_pid"] == p.pid).context("no VMM has this pid")?;
    let backend = if vmm.name.starts_with("qemu") { "emulation" } else { "kvm" };
    ensure!(pod["backend"] == backend, "the VMM is {vmm}: {pod:#}");
    // The limit, and the reserve by default.
    ensure!(pod["memory_mib"] == 96 + 128 && pod["vcpus"].as_u64() >= Some(1), "{pod:#}");
    let used = pod["memory_used_bytes"].as_u64().unwrap_or_default() >> 20;
    ensure!((16..2048).contains(&used), "{used} MiB are used: {pod:#}");
    let age = pod["age_seconds"].as_u64().context("no age")?;
    ensure!(age <= most, "it is {age} s old after {most} s");
    let container = serde_json::json!([{ "id": "c", "pid": pid.parse::<u32>()?, "status": "running" }]);
    ensure!(pod["containers"] == container, "{tasks}\n{pod:#}");
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    ensure!(rows.len() == 2 && rows[0].first() == Some(&"NAMESPACE"), "{table}");
    let (shim, vmm) = (shim.pid.to_string(), vmm.pid.to_string());
    let wanted = [t.node().namespace(), "c", "running", backend];
    ensure!(rows[1].starts_with(&wanted), "{table}");
    ensure!(table.contains("of 224 MiB"), "{table}");
    ensure!(rows[1].contains(&shim.as_str()) && rows[1].contains(&vmm.as_str()), "{table}");
    ensure!(table.ends_with(&format!("c (running, pid {pid})")), "{table}");
    let is_age =
        |word: &&str| word.strip_suffix('s').is_some_and(|n| n.parse().is_ok_and(|n: u64| n <= most));
    ensure!(rows[1].iter().any(is_age), "no age of up to {most} s: {table}");
    t.remove("c")?;
    let none = t.bulkhead(&["ps", "--output", "json"])?.output()?.ok()?.out();
    ensure!(none == "[]", "the pod has gone: {none}");
    Ok(())
}

fn figures_of_a_pod(t: &mut Context) -> Result<()> {
    t.start_sleeper(&["--memory-limit", "100663296"], "c")?;
    let dir = t.pod_dir("c")?;
    let mode = std::fs::metadata(dir.join("metrics.sock"))?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "the socket has mode {mode:o}");
    let ledger = std::fs::read_to_string(dir.join("ledger"))?;
    ensure!(ledger.contains("metrics.sock"), "the socket is not in the ledger:\n{ledger}");
    let figures = scrape(t, "c")?;
    for (family, kind) in &figures.families {
        ensure!(is_documented(family, kind), "docs/observability.md does not tell of {kind} {family}");
    }
    let namespace = format!("namespace=\"{}\"", t.node().namespace());
    let pod = [namespace.as_str(), "pod=\"c\""];
    let with = |label: &'static str| [pod[0], pod[1], label];
    ensure!(figures.get("bulkhead_machine_up", &pod)? == 1.0);
    ensure!(figures.get("bulkhead_machine_vcpus", &pod)? >= 1.0);
    ensure!(figures.get("bulkhead_machine_memory_bytes", &pod)? > 100_663_296.0);
    for stage in ["stage=\"launch\"", "stage=\"hello\"", "stage=\"configure\""] {
        let took = figures.get("bulkhead_machine_boot_seconds", &with(stage))?;
        ensure!(took > 0.0 && took < 60.0, "{stage} took {took} s");
    }
    for method in ["method=\"Create\"", "method=\"Start\""] {
        let labels = [pod[0], pod[1], method, "result=\"ok\""];
        ensure!(figures.get("bulkhead_shim_requests_total", &labels)? == 1.0, "{method}");
        let count = figures.get("bulkhead_shim_request_duration_seconds_count", &with(method))?;
        ensure!(count == 1.0, "{method} was timed {count} times");
    }
    ensure!(figures.get("bulkhead_shim_events_dropped_total", &pod)? == 0.0);
    let container = with("container=\"c\"");
    ensure!(figures.get("bulkhead_container_memory_limit_bytes", &container)? == 100_663_296.0);
    ensure!(figures.get("bulkhead_container_memory_bytes", &container)? > 0.0);
    ensure!(figures.get("bulkhead_container_pids", &container)? >= 1.0);
    ensure!(figures.find("bulkhead_container_pids_limit", &container).is_none(), "there is no such limit");
    for part in t.parts()? {
        let process = format!("process=\"{}\"", part.name);
        ensure!(figures.get("bulkhead_process_resident_memory_bytes", &[&process])? > 0.0);
    }
    let backend =
        if figures.families.keys().any(|f| f.starts_with("bulkhead_vmm_")) { "kvm" } else { "emulation" };
    let backend = format!("backend=\"{backend}\"");
    ensure!(
        figures.get("bulkhead_machine_info", &[&backend])? == 1.0,
        "the monitor tells its counters, QEMU has none"
    );
    t.remove("c")
}

fn figures_rise_with_work(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let before = scrape(t, "c")?;
    t.exec_ok("c", "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done")?;
    let after = scrape(t, "c")?;
    for (family, label, least) in [
        ("bulkhead_container_cpu_seconds_total", "container=\"c\"", 0.001),
        ("bulkhead_process_cpu_seconds_total", "process=\"shim\"", 0.0),
        ("bulkhead_pod_cpu_seconds_total", "pod=\"c\"", 0.001),
        ("bulkhead_shim_events_sent_total", "pod=\"c\"", 3.0),
    ] {
        let (was, is) = (before.get(family, &[label])?, after.get(family, &[label])?);
        ensure!(is >= was + least, "{family} was {was} and is {is}");
    }
    let exec = ["method=\"Exec\"", "result=\"ok\""];
    ensure!(before.find("bulkhead_shim_requests_total", &exec).is_none());
    ensure!(after.get("bulkhead_shim_requests_total", &exec)? == 1.0);
    t.remove("c")
}

fn a_stopped_machine_holds_no_scrape_up(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let vmm = t.parts()?.first().cloned().context("no VMM")?;
    let signal = |t: &Context, signal| {
        signal_process(vmm.pid, signal, |pid| t.processes().iter().any(|p| p.pid == pid)).map(drop)
    };
    signal(t, Signal::STOP)?;
    let guest = ["part=\"guest\""];
    for scrapes in 1..=2 {
        let figures = scrape(t, "c")?;
        ensure!(figures.took < stretched(Duration::from_secs(8)), "it took {:?}", figures.took);
        ensure!(figures.get("bulkhead_scrape_errors_total", &guest)? == f64::from(scrapes));
        ensure!(figures.find("bulkhead_container_cpu_seconds_total", &[]).is_none(), "who told that?");
        ensure!(figures.get("bulkhead_machine_up", &[])? == 1.0);
        ensure!(figures.get("bulkhead_process_cpu_seconds_total", &["process=\"shim\""])? >= 0.0);
    }
    // The pod answers what it can answer without its guest.
    let list = t.ctr_ok(&["task", "ls"])?;
    ensure!(list.lines().any(|l| l.starts_with("c ") && l.ends_with("RUNNING")), "task ls shows:\n{list}");
    signal(t, Signal::CONT)?;
    // The question that it owed an answer to is older.
    t.exec_ok("c", "true")?;
    let figures = scrape(t, "c")?;
    ensure!(figures.get("bulkhead_scrape_errors_total", &guest)? == 2.0, "{figures:#?}");
    ensure!(figures.get("bulkhead_container_cpu_seconds_total", &["container=\"c\""])? > 0.0);
    t.remove("c")
}

fn figures_of_the_node(t: &mut Context) -> Result<()> {
    let running = ["status=\"running\""];
    let page = |run: Run| Figures::parse(&String::from_utf8(run.output()?.ok()?.stdout)?);
    let empty = page(t.bulkhead(&["metrics"])?)?;
    ensure!(empty.get("bulkhead_pods", &running)? == 0.0);
    t.start_sleeper(&[], "one")?;
    t.start_sleeper(&[], "two")?;
    let both = page(t.bulkhead(&["metrics"])?)?;
    ensure!(both.get("bulkhead_pods", &running)? == 2.0);
    for pod in ["pod=\"one\"", "pod=\"two\""] {
        ensure!(both.get("bulkhead_pod_scraped", &[pod])? == 1.0);
        ensure!(both.get("bulkhead_container_memory_bytes", &[pod])? > 0.0);
    }
    for (family, kind) in &both.families {
        ensure!(is_documented(family, kind), "docs/observability.md does not tell of {kind} {family}");
    }
    let one = page(t.bulkhead(&["metrics", "one"])?)?;
    ensure!(one.find("bulkhead_machine_up", &["pod=\"one\""]) == Some(1.0));
    ensure!(one.find("bulkhead_machine_up", &["pod=\"two\""]).is_none());
    let output = t.bulkhead(&["metrics", "onne"])?.output()?.expect_failure()?;
    output.expect_stderr(&["there is no pod `onne`; did you mean `one`?"])?;

    // A shim that does not answer hides no other.
    let state: serde_json::Value =
        serde_json::from_slice(&std::fs::read(t.pod_dir("two")?.join("state.json"))?)?;
    let shim = state["shim_pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).context("no pid")?;
    let signal = |t: &Context, signal| {
        signal_process(shim, signal, |pid| t.processes().iter().any(|p| p.pid == pid)).map(drop)
    };
    signal(t, Signal::STOP)?;
    let output = t.bulkhead(&["metrics"])?.output();
    signal(t, Signal::CONT)?;
    let output = output?.ok()?.expect_stderr(&["/two` does not tell its figures: no answer within 5 s"])?;
    let page = Figures::parse(&String::from_utf8(output.stdout)?)?;
    ensure!(page.get("bulkhead_pods", &running)? == 2.0);
    ensure!(page.get("bulkhead_pod_scraped", &["pod=\"two\""])? == 0.0);
    ensure!(page.get("bulkhead_pod_scraped", &["pod=\"one\""])? == 1.0);
    ensure!(page.find("bulkhead_machine_up", &["pod=\"one\""]) == Some(1.0));
    t.remove("one")?;
    t.remove("two")
}

fn logs(t: &mut Context) -> Result<()> {
    t.start_sleeper(&["--privileged"], "c")?;
    // As an error: the console of a quiet kernel shows no less.
    t.exec_ok("c", "echo '<3>from the inside' >/dev/kmsg")?;
    // The shim has read the line when it has served another request.
    t.exec_ok("c", "true")?;
    let all = t.bulkhead(&["logs", "c"])?.output()?.ok()?;
    let text = all.out();
    let (shim, console) = text.split_once("== console of the guest\n").with_context(|| format!("{all}"))?;
    ensure!(shim.starts_with("== shim\n") && shim.contains("msg=\"serving\""), "{all}");
    ensure!(console.contains("from the inside"), "{all}");
    let part = t.bulkhead(&["logs", "--part", "console", "c"])?.output()?.ok()?.out();
    ensure!(part.contains("from the inside") && !part.contains("=="), "{part}");
    let output = t.bulkhead(&["logs", "x"])?.output()?.expect_failure()?;
    output.expect_stderr(&["there is no pod `x`"])?;
    t.remove("c")
}

fn report_without_secrets(t: &mut Context) -> Result<()> {
    const SECRET: &str = "hush-4711";
    t.set_config("", "log_level", "debug".into())?;
    t.start_sleeper(&["--env", &format!("TOKEN={SECRET}")], "c")?;
    let seen = t.exec_ok("c", "echo $TOKEN; cat /proc/1/environ | tr '\\0' '\\n'")?;
    ensure!(seen.matches(SECRET).count() == 2, "{seen}");
    let report = t.dir().join("report.tar.gz");
    let path = report.display().to_string();
    let output = t.bulkhead(&["collect", "--output", &path])?.output()?.ok()?;
    ensure!(output.out() == path && output.err().is_empty(), "{output}");
    let mode = std::fs::metadata(&report)?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "the report has mode {mode:o}");
    let again = t.bulkhead(&["collect", "--output", &path])?.output()?.expect_failure()?;
    again.expect_stderr(&["cannot make ", "File exists"])?;

    let list = Run::new("tar").arg("-tzf").arg(&report).output()?.ok()?.out();
    for name in
        ["README.txt", "version.json", "check.json", "config.toml", "ps.json", "errors.txt", "host/cpuinfo"]
    {
        ensure!(list.lines().any(|line| line.ends_with(&format!("/{name}"))), "no {name} in\n{list}");
    }
    for name in ["state.json", "ledger", "shim.log", "console.log", "metrics.txt", "processes.txt"] {
        let of_pod = |line: &str| line.contains("/pods/") && line.ends_with(&format!("/{name}"));
        ensure!(list.lines().any(of_pod), "no {name} of the pod in\n{list}");
    }
    let content = Run::new("tar").arg("-xzOf").arg(&report).output()?.ok()?;
    let text = String::from_utf8_lossy(&content.stdout);
    ensure!(text.contains("level=debug") && text.contains("Exec {"), "the log lacks what it has to hide");
    let in_numbers: Vec<String> = SECRET.bytes().map(|byte| byte.to_string()).collect();
    for form in [SECRET, &in_numbers.join(", ")] {
        ensure!(!text.contains(form), "{form} is in the report");
    }
    t.remove("c")
}

fn spans_for_opentelemetry(t: &mut Context) -> Result<()> {
    let file = t.dir().join("spans.jsonl");
    t.set_config("", "trace_file", file.display().to_string().into())?;
    t.run_ok(&[], &["true"])?;
    let text = std::fs::read_to_string(&file)?;
    let mut names = Vec::new();
    let (mut traces, mut roots, mut parents) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for line in text.lines() {
        let request: serde_json::Value = serde_json::from_str(line)?;
        let resource = request["resourceSpans"][0]["resource"].to_string();
        ensure!(
            resource.contains("containerd.sandbox.id") && resource.contains(t.node().namespace()),
            "{line}"
        );
        let span = &request["resourceSpans"][0]["scopeSpans"][0]["spans"][0];
        let field = |key: &str| span[key].as_str().unwrap_or_default().to_owned();
        let nanos = |key: &str| field(key).parse::<u64>();
        ensure!(nanos("startTimeUnixNano")? <= nanos("endTimeUnixNano")?, "{line}");
        traces.insert(field("traceId"));
        let set = if field("parentSpanId").is_empty() { &mut roots } else { &mut parents };
        set.insert(if field("parentSpanId").is_empty() { field("spanId") } else { field("parentSpanId") });
        names.push(field("name"));
    }
    for name in ["start", "plan", "launch", "kernel", "hello", "configure", "create", "teardown", "pod"] {
        ensure!(names.iter().any(|known| known == name), "no span {name} among {names:?}");
    }
    ensure!(traces.len() == 1 && roots.len() == 1, "{text}");
    ensure!(parents.is_superset(&roots), "nothing is under the pod's span: {text}");
    Ok(())
}
