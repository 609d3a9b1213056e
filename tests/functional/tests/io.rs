//! Bytes in and out of a container.

use std::fmt::Write as _;

use anyhow::{Result, ensure};
use harness::{Context, Output, Run, Test};
use sha2::{Digest, Sha256};

pub(crate) const TESTS: &[Test] = &[
    Test::common("io::stdout_and_stderr_are_apart", stdout_and_stderr_are_apart),
    Test::common("io::stdin_until_eof", stdin_until_eof),
    Test::common("io::binary_through_cat", binary_through_cat),
    Test::common("io::hundred_megabytes_out", hundred_megabytes_out),
    Test::common("io::both_outputs_at_once", both_outputs_at_once),
    Test::common("io::output_of_an_instant_exit", output_of_an_instant_exit),
    Test::common("io::null_io", null_io),
    Test::common("io::log_uri_file", log_uri_file),
    Test::common("io::log_uri_binary", log_uri_binary),
    Test::common("io::exec_stdin_until_eof", exec_stdin_until_eof),
    Test::common("io::reader_that_goes_away", reader_that_goes_away),
];

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, b| {
        write!(text, "{b:02x}").ok();
        text
    })
}

/// Bytes in which each line differs, so that nothing can be lost, doubled or swapped unseen.
fn numbered_lines(bytes: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes + 16);
    let mut n = 1;
    while text.len() < bytes {
        text.extend_from_slice(format!("{n}\n").as_bytes());
        n += 1;
    }
    text.truncate(bytes);
    text
}

fn stdout_and_stderr_are_apart(t: &mut Context) -> Result<()> {
    let output = t.run_rm(&[], &["sh", "-c", "echo out; echo err >&2"])?.ok()?;
    ensure!(output.stdout == b"out\n" && output.stderr == b"err\n", "{output}");
    Ok(())
}

/// Feeds `input` to `run` once it has said "ready": ctr may lose an end of file that comes before the task is made.
fn feed(run: Run, input: &[u8]) -> Result<Output> {
    let mut proc = run.stdin_open().spawn()?;
    proc.wait_for_text("ready")?;
    proc.write_stdin(input)?;
    proc.close_stdin();
    proc.wait()
}

fn stdin_until_eof(t: &mut Context) -> Result<()> {
    let run = t.run(&["--rm"], "c", &["sh", "-c", "echo ready; sha256sum; echo after"]);
    let input = numbered_lines(3_000_000);
    let output = feed(run, &input)?.ok()?;
    ensure!(output.out() == format!("ready\n{}  -\nafter", hex(&input)), "{output}");
    Ok(())
}

fn binary_through_cat(t: &mut Context) -> Result<()> {
    let input: Vec<u8> = (0..500_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let output = feed(t.run(&["--rm"], "c", &["sh", "-c", "printf ready; exec cat"]), &input)?.ok()?;
    ensure!(
        hex(&output.stdout[5..]) == hex(&input),
        "{} bytes came back of {}",
        output.stdout.len() - 5,
        input.len()
    );
    Ok(())
}

/// Numbered pieces of numbered lines: to count that far anew would take a slow processor minutes.
fn hundred_megabytes_out(t: &mut Context) -> Result<()> {
    let (pieces, size) = (100, 1 << 20);
    let command = format!(
        "seq 1 200000 | head -c {size} >/dev/shm/piece; \
         i=0; while [ $i -lt {pieces} ]; do echo piece $i; cat /dev/shm/piece; i=$((i+1)); done"
    );
    let output = t.run(&["--rm"], "c", &["sh", "-c", &command]).deadline(400).output()?.ok()?;
    let piece = numbered_lines(size);
    let wanted: Vec<u8> =
        (0..pieces).flat_map(|i| [format!("piece {i}\n").as_bytes(), &piece].concat()).collect();
    let (got, all) = (output.stdout.len(), wanted.len());
    let wrong = output.stdout.iter().zip(&wanted).position(|(a, b)| a != b);
    ensure!(wrong.is_none() && got == all, "{got} bytes of {all} came, the first wrong one at {wrong:?}");
    Ok(())
}

fn both_outputs_at_once(t: &mut Context) -> Result<()> {
    let size = 5_000_000;
    let command = format!("seq 1 2000000 | head -c {size} & seq 1 2000000 | head -c {size} >&2; wait");
    let output = t.run(&["--rm"], "c", &["sh", "-c", &command]).deadline(200).output()?.ok()?;
    let wanted = hex(&numbered_lines(size));
    ensure!(hex(&output.stdout) == wanted, "stdout: {} bytes of {size}", output.stdout.len());
    ensure!(hex(&output.stderr) == wanted, "stderr: {} bytes of {size}", output.stderr.len());
    Ok(())
}

fn output_of_an_instant_exit(t: &mut Context) -> Result<()> {
    let size = 200_000;
    for _ in 0..3 {
        let output = t.run_rm(&[], &["sh", "-c", &format!("seq 1 100000 | head -c {size}")])?.ok()?;
        ensure!(output.stdout == numbered_lines(size), "{} bytes of {size} came", output.stdout.len());
    }
    Ok(())
}

fn null_io(t: &mut Context) -> Result<()> {
    let output = t
        .run_rm(&["--null-io"], &["sh", "-c", "echo out; echo err >&2; read x || exit 5"])?
        .expect_code(5)?;
    ensure!(output.stdout.is_empty() && output.stderr.is_empty(), "{output}");
    Ok(())
}

fn log_uri_file(t: &mut Context) -> Result<()> {
    let file = t.dir().join("container.log");
    let uri = format!("file://{}", file.display());
    let output = t.run_rm(&["--log-uri", &uri], &["sh", "-c", "echo out; echo err >&2"])?.ok()?;
    ensure!(output.stdout.is_empty(), "{output}");
    let text = std::fs::read_to_string(&file)?;
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    ensure!(lines == ["err", "out"], "the file holds {text:?}");
    Ok(())
}

fn log_uri_binary(t: &mut Context) -> Result<()> {
    // containerd's logger protocol: 3 is stdout, 4 is stderr, closing 5 says "ready"; SIGTERM says that the
    // container has ended, which the pipes say too.
    let done = t.dir().join("done");
    Run::new("mkfifo").arg(&done).output()?.ok()?;
    let script = "#!/bin/sh\ntrap '' TERM\nPATH=/usr/bin:/bin\ncat <&3 >$2.out 5>&- &\ncat <&4 >$2.err 5>&- &\nexec 5>&-\nwait\n\
        echo \"$CONTAINER_NAMESPACE $CONTAINER_ID\" >$2.who\necho done >$2\n";
    let logger = t.write("logger", script)?;
    Run::new("chmod").arg("755").arg(&logger).output()?.ok()?;
    let uri = format!("binary://{}?to={}", logger.display(), done.display());
    let waiter = Run::new("cat").arg(&done).deadline(60).spawn()?;
    t.run_rm(&["--log-uri", &uri], &["sh", "-c", "echo out; echo err >&2"])?.ok()?;
    waiter.wait()?.ok()?;
    let read = |end: &str| std::fs::read_to_string(format!("{}.{end}", done.display()));
    ensure!(
        read("out")? == "out\n" && read("err")? == "err\n",
        "out {:?}, err {:?}",
        read("out"),
        read("err")
    );
    let who = format!("{} c\n", t.node().namespace());
    ensure!(read("who")? == who, "the logger was told {:?}", read("who"));
    Ok(())
}

fn exec_stdin_until_eof(t: &mut Context) -> Result<()> {
    t.start_sleeper(&[], "c")?;
    let input = numbered_lines(1_000_000);
    let run = t.exec("c", "e", &["sh", "-c", "echo ready; sha256sum"]);
    let output = feed(run, &input)?.ok()?;
    ensure!(output.out() == format!("ready\n{}  -", hex(&input)), "{output}");
    t.remove("c")
}

/// ctr is killed while its container writes: the container goes on, and can be removed.
fn reader_that_goes_away(t: &mut Context) -> Result<()> {
    let proc =
        t.run(&[], "c", &["sh", "-c", "trap 'exit 3' TERM; while :; do echo tick; sleep 1; done"]).spawn()?;
    proc.wait_for_text("tick")?;
    drop(proc);
    let said = t.exec_ok("c", "echo still here")?;
    ensure!(said == "still here", "saw {said:?}");
    t.remove("c")
}
