//! `bulkhead exec`: runs a program in the guest of a pod itself, through the pod's shim.
//! Knows the terminal and the streams of this process; what becomes of the program is the shim's and the guest's.

use std::{
    fs::File,
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use nix::sys::{
    signal::Signal as Signals,
    termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr},
};
use serde::Serialize;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    net::{UnixStream, unix::OwnedReadHalf, unix::OwnedWriteHalf},
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    time::timeout,
};

use super::pods::{self, Found, Status};
use crate::config::Config;
use crate::guest_exec::{Answer, Names, Opening, Program, SOCKET, Size, Word, line};

/// Exit status where the program's own is not known, because it was not started or its end was not told: that of
/// `docker exec`, so that a program that fails with 1 is told from us.
const FAILED: u8 = 125;
/// What a shim needs beside the time that its guest has for an answer: it waits for our streams.
const SLACK: Duration = Duration::from_secs(15);
/// How long the last of a program's output may take after its end.
const LAST_OUTPUT: Duration = Duration::from_secs(10);
/// One read or write at most, in bytes.
const CHUNK: usize = 64 << 10;
/// What a program has in its environment, beside TERM.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug, Args)]
#[command(after_help = "\
The program runs as root in the guest's own namespaces, not in a container's. /dev, /proc, /run, /sys and /tmp are the \
guest's; everything else is of a container's root file system, read-only, since the guest has no programs of its own. \
What is on the host's disks for other containers is below /proc/PID/root.

It is off unless `agent.debug_exec` is true in the configuration that the pod was made with. The exit status is the \
program's, 128+n for signal n, or 125 if bulkhead could not run it.

  bulkhead exec POD -- ps -ef
  bulkhead exec POD -it
  bulkhead exec POD -- nsenter --net=/run/bulkhead/ns/net ip route")]
pub(super) struct Arguments {
    /// The pod: its id, NAMESPACE/ID, or the beginning of an id
    pod: String,
    /// Pass standard input on, until its end
    #[arg(short, long)]
    interactive: bool,
    /// Give the program a terminal
    #[arg(short, long)]
    tty: bool,
    /// The container whose programs are used: its id or the beginning of it [default: the only one]
    #[arg(short, long, value_name = "CONTAINER", default_value = "", hide_default_value = true)]
    root: String,
    /// The program and its arguments [default: sh]
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Runs the program; its exit status is ours.
pub(super) fn run(arguments: &Arguments, config: Option<&Path>) -> ExitCode {
    match run_to_the_end(arguments, config) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("bulkhead: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

fn run_to_the_end(arguments: &Arguments, config: Option<&Path>) -> anyhow::Result<u8> {
    let config = Config::load(config)?;
    let (pods, _) = pods::find(&config.state_dir)?;
    let pod = pods::choose(pods, &arguments.pod)?;
    let patience = Duration::from_secs(config.agent.request_timeout_seconds) + SLACK;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let status = runtime.block_on(async {
        let session = timeout(patience, Session::begin(arguments, &pod)).await;
        let late =
            || anyhow!("the shim of pod `{}` did not answer within {} s", pod.name(), patience.as_secs());
        session.map_err(|_| late())??.see_through().await
    });
    // Nothing waits for what is still being written.
    runtime.shutdown_background();
    status
}

impl Arguments {
    fn program(&self) -> Program {
        let args = if self.command.is_empty() { vec!["sh".to_owned()] } else { self.command.clone() };
        let mut env = vec![PATH.to_owned()];
        if self.tty {
            env.extend(std::env::var("TERM").map(|term| format!("TERM={term}")));
        }
        let terminal = self.tty.then(|| window().unwrap_or_default());
        Program { root: self.root.clone(), args, env, stdin: self.interactive, terminal }
    }
}

/// Why nobody answers at the socket.
fn no_door(pod: &Found, error: &io::Error) -> anyhow::Error {
    let name = pod.name();
    match (pod.status(), error.kind()) {
        (Status::Dead, _) => anyhow!("pod `{name}` has no shim any more, and no guest"),
        (Status::Starting, _) => anyhow!("the machine of pod `{name}` does not run yet"),
        (Status::Running, ErrorKind::NotFound) => anyhow!(
            "no program may be run in the guest of pod `{name}`: set `debug_exec = true` in the section [agent] of \
             bulkhead's configuration and make the pod anew"
        ),
        (Status::Running, ErrorKind::PermissionDenied) => {
            anyhow!("only root may run programs in the guest of pod `{name}`")
        }
        _ => anyhow!("cannot reach the shim of pod `{name}`: {error}"),
    }
}

/// A program that runs.
struct Session {
    answers: Lines<BufReader<OwnedReadHalf>>,
    says: OwnedWriteHalf,
    stdin: Option<UnixStream>,
    outputs: [Option<(UnixStream, OwnedFd)>; 2],
    terminal: bool,
}

impl Session {
    async fn begin(arguments: &Arguments, pod: &Found) -> anyhow::Result<Self> {
        let socket = pod.dir.join(SOCKET);
        let program = arguments.program();
        let control = UnixStream::connect(&socket).await.map_err(|error| no_door(pod, &error))?;
        let (reader, mut says) = control.into_split();
        let mut answers = BufReader::new(reader).lines();
        say(&mut says, &Opening::Run(program)).await?;
        let names = match next(&mut answers).await? {
            Answer::Streams(names) => names,
            other => return unexpected(other),
        };
        let Names { stdin, stdout, stderr } = names;
        let open = async |name: Option<String>| match name {
            Some(name) => stream(&socket, name).await.map(Some),
            None => Ok(None),
        };
        let stdin = open(stdin).await?;
        let stdout = open(Some(stdout)).await?.zip(Some(io::stdout().as_fd().try_clone_to_owned()?));
        let stderr = open(stderr).await?.zip(Some(io::stderr().as_fd().try_clone_to_owned()?));
        match next(&mut answers).await? {
            Answer::Started => {}
            other => return unexpected(other),
        }
        Ok(Self { answers, says, stdin, outputs: [stdout, stderr], terminal: arguments.tty })
    }

    /// Passes on what there is to pass on until the program has ended, and answers its exit status.
    async fn see_through(self) -> anyhow::Result<u8> {
        let Self { mut answers, mut says, stdin, outputs, terminal } = self;
        // Before the terminal changes, so that it is changed back on any of them.
        let mut ends = Ends::watch()?;
        let mut resized = signal(SignalKind::window_change())?;
        let _raw = if terminal && stdin.is_some() { Raw::make()? } else { None };
        if let Some(stdin) = stdin {
            feed(stdin.into_std()?)?;
        }
        let (exited, has_exited) = watch::channel(false);
        let [stdout, stderr] = outputs.map(|output| show(output, has_exited.clone()));
        let outputs = async { tokio::try_join!(stdout, stderr) };
        tokio::pin!(outputs);
        let mut shown = false;
        if terminal {
            // It may have changed since the program was asked for.
            resize(&mut says).await;
        }
        let status = loop {
            tokio::select! {
                answer = next(&mut answers) => match answer? {
                    Answer::Exited(status) => break status,
                    other => return unexpected(other),
                },
                all = &mut outputs, if !shown => match all {
                    Ok(_) => shown = true,
                    Err(error) => return not_taken(error),
                },
                Some(()) = resized.recv(), if terminal => resize(&mut says).await,
                signal = ends.next() => return Ok(128 + signal),
            }
        };
        exited.send_replace(true);
        if !shown {
            tokio::select! {
                all = outputs => if let Err(error) = all { return not_taken(error) },
                signal = ends.next() => return Ok(128 + signal),
            }
        }
        Ok(status)
    }
}

/// A program whose output nobody takes ends as one of the host would.
fn not_taken(error: io::Error) -> anyhow::Result<u8> {
    match error.kind() {
        ErrorKind::BrokenPipe => Ok(128 + Signals::SIGPIPE as u8),
        _ => Err(error).context("write the program's output"),
    }
}

fn unexpected<T>(answer: Answer) -> anyhow::Result<T> {
    match answer {
        Answer::Failed(reason) => bail!("{reason}"),
        other => bail!("the shim answers {other:?}, which is not understood: is it of another version?"),
    }
}

async fn say(says: &mut OwnedWriteHalf, said: &impl Serialize) -> anyhow::Result<()> {
    says.write_all(line(said).as_bytes()).await.context("the shim does not listen")
}

async fn next(answers: &mut Lines<BufReader<OwnedReadHalf>>) -> anyhow::Result<Answer> {
    let answer = answers.next_line().await.context("read the shim's answer")?;
    let answer = answer.context("the shim has hung up: the pod has ended")?;
    serde_json::from_str(&answer).with_context(|| format!("the shim answers {answer:?}"))
}

async fn stream(socket: &Path, name: String) -> anyhow::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await.context("open a stream to the shim")?;
    stream.write_all(line(&Opening::Stream(name)).as_bytes()).await.context("open a stream to the shim")?;
    Ok(stream)
}

/// Passes standard input on in a thread that ends with this process: a read of a terminal cannot be taken back.
fn feed(mut to: StdStream) -> anyhow::Result<()> {
    to.set_nonblocking(false)?;
    let mut from = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) if to.write_all(&buffer[..n]).is_ok() => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The program reads no more, or there is no more to read.
                _ => break,
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Write);
    })?;
    Ok(())
}

/// Copies an output of the program to ours until its end, which comes soon when the program has ended.
///
/// # Errors
/// Nobody takes ours any more, or it cannot be written.
async fn show(output: Option<(UnixStream, OwnedFd)>, mut exited: watch::Receiver<bool>) -> io::Result<()> {
    let Some((mut from, to)) = output else { return Ok(()) };
    let mut to = tokio::fs::File::from(File::from(to));
    let mut buffer = vec![0; CHUNK];
    loop {
        let late = async {
            // Whoever could tell is there until the end.
            let _ = exited.wait_for(|exited| *exited).await;
            tokio::time::sleep(LAST_OUTPUT).await;
        };
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            () = late => {
                eprintln!("bulkhead: the program's last output did not come within {} s", LAST_OUTPUT.as_secs());
                return Ok(());
            }
        };
        let Ok(n @ 1..) = read else { return Ok(()) };
        to.write_all(&buffer[..n]).await?;
        to.flush().await?;
    }
}

async fn resize(says: &mut OwnedWriteHalf) {
    if let Some(size) = window() {
        // The end of the conversation is seen where answers are read.
        let _ = say(says, &Word::Resize(size)).await;
    }
}

/// Signals that end this process, and hence the program.
struct Ends([(u8, Signal); 3]);

impl Ends {
    fn watch() -> io::Result<Self> {
        let watched = |kind: SignalKind| io::Result::Ok((kind.as_raw_value() as u8, signal(kind)?));
        Ok(Self([
            watched(SignalKind::interrupt())?,
            watched(SignalKind::terminate())?,
            watched(SignalKind::hangup())?,
        ]))
    }

    async fn next(&mut self) -> u8 {
        let [(int, a), (term, b), (hup, c)] = &mut self.0;
        tokio::select! {
            _ = a.recv() => *int,
            _ = b.recv() => *term,
            _ = c.recv() => *hup,
        }
    }
}

/// The terminal of standard input, which passes each key on as it is until this is dropped.
struct Raw(Termios);

impl Raw {
    /// None where standard input is no terminal.
    fn make() -> anyhow::Result<Option<Self>> {
        let Ok(before) = tcgetattr(io::stdin()) else { return Ok(None) };
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).context("pass on the terminal's keys as they are")?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.0);
    }
}

/// The size of the terminal of standard output, if it is one.
fn window() -> Option<Size> {
    crate::process::window_size(io::stdout().as_fd()).map(|(width, height)| Size { width, height })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn program(words: &[&str]) -> Program {
        Line::try_parse_from([&["exec"], words].concat()).unwrap().arguments.program()
    }

    #[test]
    fn what_is_typed_is_what_is_asked_for() {
        let shell = program(&["web", "-it"]);
        assert_eq!((shell.args, shell.stdin, shell.terminal.is_some()), (vec!["sh".to_owned()], true, true));
        let ps = program(&["web", "--root", "0a1b", "--", "ps", "-ef", "--", "-t"]);
        assert_eq!(ps.args, ["ps", "-ef", "--", "-t"]);
        assert_eq!((ps.root.as_str(), ps.stdin, ps.terminal, ps.env.len()), ("0a1b", false, None, 1));
        for wrong in [&["exec"][..], &["exec", "web", "ps"]] {
            assert!(Line::try_parse_from(wrong).is_err(), "{wrong:?}");
        }
    }
}
