//! A talk with QEMU by its machine protocol (QMP): one command at a time, and its answer.
//! Knows the protocol's lines; does not know what the commands mean.

use std::{io, os::unix::net::UnixStream as StdStream, time::Duration};

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
};

/// How long a command may take: what it does is done in microseconds, but for what waits for a disk.
const DEADLINE: Duration = Duration::from_secs(20);

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum QmpError {
    /// QEMU says why.
    #[error("QEMU refuses {command}: {reason}")]
    Refused {
        /// Which.
        command: &'static str,
        /// In QEMU's words.
        reason: String,
    },
    /// It did not answer.
    #[error("QEMU does not answer {0} within {DEADLINE:?}")]
    Late(&'static str),
    /// It is gone, or what it says is no QMP.
    #[error("QEMU cannot be told {command}: {source}")]
    Broken {
        /// What.
        command: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A line of QEMU's: a greeting, an event, or an answer.
#[derive(Debug, Deserialize)]
struct Line {
    id: Option<u64>,
    error: Option<Refusal>,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    desc: String,
}

/// One end of the talk.
#[derive(Debug)]
pub(super) struct Qmp {
    /// Answers; closed when QEMU has gone, or says what is no QMP.
    answers: mpsc::UnboundedReceiver<Line>,
    to: OwnedWriteHalf,
    last: u64,
}

/// Hands answers on, and reads away everything else: a guest can bring about events, which QEMU would have to keep for
/// who does not listen. Each answer is to a command of ours.
async fn listen(mut from: Lines<BufReader<OwnedReadHalf>>, answers: mpsc::UnboundedSender<Line>) {
    while let Ok(Some(line)) = from.next_line().await {
        match serde_json::from_str::<Line>(&line) {
            Ok(line) if line.id.is_some() => {
                if answers.send(line).is_err() {
                    return;
                }
            }
            Ok(_) => {}
            Err(error) => return tracing::warn!(%error, "QEMU says what is no QMP"),
        }
    }
}

impl Qmp {
    /// Speaks by `stream`, at whose other end QEMU is, or will be.
    ///
    /// # Errors
    /// The runtime cannot watch it.
    pub(super) fn new(stream: StdStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (from, to) = UnixStream::from_std(stream)?.into_split();
        let (send, answers) = mpsc::unbounded_channel();
        // Ends with QEMU.
        tokio::spawn(listen(BufReader::new(from).lines(), send));
        Ok(Self { answers, to, last: 0 })
    }

    /// Has a command carried out. The first of a talk is made to be preceded by what QEMU wants to hear first.
    pub(super) async fn command(&mut self, command: &'static str, arguments: Value) -> Result<(), QmpError> {
        if self.last == 0 {
            self.ask("qmp_capabilities", json!({})).await?;
        }
        self.ask(command, arguments).await
    }

    async fn ask(&mut self, command: &'static str, arguments: Value) -> Result<(), QmpError> {
        self.last += 1;
        let id = self.last;
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments, "id": id }));
        let asked = async {
            self.to.write_all(line.as_bytes()).await?;
            // An answer that came too late for the one before is passed over by its number.
            while let Some(line) = self.answers.recv().await {
                if line.id == Some(id) {
                    return Ok(line.error);
                }
            }
            Err(io::ErrorKind::UnexpectedEof.into())
        };
        match tokio::time::timeout(DEADLINE, asked).await {
            Ok(Ok(None)) => Ok(()),
            Ok(Ok(Some(Refusal { desc: reason }))) => Err(QmpError::Refused { command, reason }),
            Ok(Err(source)) => Err(QmpError::Broken { command, source }),
            Err(_) => Err(QmpError::Late(command)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, Write};

    use super::*;

    #[tokio::test]
    async fn answers_are_known_by_their_numbers_and_refusals_are_told() {
        let (ours, theirs) = StdStream::pair().unwrap();
        let qemu = std::thread::spawn(move || {
            let mut heard = Vec::new();
            let mut say = theirs.try_clone().unwrap();
            writeln!(say, r#"{{"QMP": {{"version": {{}}, "capabilities": ["oob"]}}}}"#).unwrap();
            for line in io::BufReader::new(theirs).lines().map_while(Result::ok) {
                let line: Value = serde_json::from_str(&line).unwrap();
                writeln!(say, r#"{{"event": "RESUME", "timestamp": {{"seconds": 1, "microseconds": 2}}}}"#)
                    .unwrap();
                writeln!(say, r#"{{"return": {{}}, "id": 4711}}"#).unwrap();
                match line["execute"].as_str().unwrap() {
                    "bad" => writeln!(
                        say,
                        r#"{{"id": {}, "error": {{"class": "GenericError", "desc": "no such node"}}}}"#,
                        line["id"]
                    ),
                    _ => writeln!(say, r#"{{"return": {{}}, "id": {}}}"#, line["id"]),
                }
                .unwrap();
                heard.push(line["execute"].as_str().unwrap().to_owned());
                if heard.last().is_some_and(|command| command == "last") {
                    break;
                }
            }
            heard
        });
        let mut qmp = Qmp::new(ours).unwrap();
        qmp.command("good", json!({})).await.unwrap();
        let refused = qmp.command("bad", json!({})).await.unwrap_err();
        assert_eq!(refused.to_string(), "QEMU refuses bad: no such node");
        qmp.command("last", json!({})).await.unwrap();
        assert_eq!(qemu.join().unwrap(), ["qmp_capabilities", "good", "bad", "last"]);
        let gone = qmp.command("more", json!({})).await.unwrap_err().to_string();
        assert!(gone.starts_with("QEMU cannot be told more"), "{gone}");
    }
}
