//! `bulkhead metrics`: the figures of the node's pods as one page for Prometheus, each from the pod's own shim.
//! Asks every shim at once and waits for none longer than the rest.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use futures::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::pods::{self, Found, Status};
use crate::config::Config;
use crate::metrics::{SOCKET, families, text::Exposition};

/// How long a shim may take. It waits 2 s for a guest that is silent.
const DEADLINE: Duration = Duration::from_secs(5);
/// The longest page that is taken from a shim, in bytes.
const LONGEST: u64 = 8 << 20;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// One pod alone: its id, NAMESPACE/ID, or the beginning of an id [default: all]
    pod: Option<String>,
}

pub(super) fn run(arguments: &Arguments, config: Option<&Path>, out: &mut dyn Write) -> anyhow::Result<()> {
    let (pods, mut complaints) = pods::find(&Config::load(config)?.state_dir)?;
    let page = match &arguments.pod {
        Some(name) => {
            let pod = pods::choose(pods, name)?;
            ensure!(
                pod.status() != Status::Dead,
                "pod `{}` has no shim any more to tell figures",
                pod.name()
            );
            let scraped = scrape(std::slice::from_ref(&pod))?.pop().context("nobody was asked")?;
            scraped.with_context(|| complaint(&pod))?
        }
        None => node(&pods, &mut complaints)?,
    };
    write!(out, "{page}")?;
    for complaint in complaints {
        eprintln!("bulkhead: {complaint}");
    }
    Ok(())
}

fn complaint(pod: &Found) -> String {
    format!("pod `{}` does not tell its figures", pod.name())
}

/// The page of the whole node; what is missing from it is added to the complaints.
fn node(pods: &[Found], complaints: &mut Vec<String>) -> anyhow::Result<Exposition> {
    let mut page = Exposition::default();
    for status in Status::ALL {
        let count = pods.iter().filter(|pod| pod.status() == status).count();
        page.put(families::NODE_PODS, &[("status", status.as_str())], count as u64);
    }
    for (pod, scraped) in pods.iter().zip(scrape(pods)?) {
        let labels = [("namespace", pod.state.namespace.as_str()), ("pod", pod.state.id.as_str())];
        page.put(families::NODE_SCRAPED, &labels, u64::from(scraped.is_ok()));
        match scraped {
            Ok(told) => {
                for name in page.merge(told) {
                    complaints.push(format!("pod `{}` has `{name}` of another type: left out", pod.name()));
                }
            }
            // What the table of `bulkhead ps` calls dead is no fault of the scrape.
            Err(_) if pod.status() == Status::Dead => {}
            Err(error) => complaints.push(format!("{}: {error:#}", complaint(pod))),
        }
    }
    Ok(page)
}

/// Asks them all at once.
pub(super) fn scrape(pods: &[Found]) -> anyhow::Result<Vec<anyhow::Result<Exposition>>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(join_all(pods.iter().map(|pod| async {
        let socket = pod.dir.join(SOCKET);
        let Ok(answer) = tokio::time::timeout(DEADLINE, ask(&socket)).await else {
            bail!("no answer within {} s", DEADLINE.as_secs());
        };
        let text = answer?;
        Exposition::parse(&text).context("what its shim answers is no exposition")
    }))))
}

/// The body of the answer to `GET /metrics` at the socket.
async fn ask(socket: &Path) -> anyhow::Result<String> {
    let connect = UnixStream::connect(socket).await;
    let mut stream = connect.with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: bulkhead\r\nConnection: close\r\n\r\n").await?;
    let mut answer = Vec::new();
    // One byte more shows that there would be more.
    stream.take(LONGEST + 1).read_to_end(&mut answer).await.context("the answer breaks off")?;
    ensure!(answer.len() as u64 <= LONGEST, "the answer is longer than {LONGEST} bytes");
    body(&answer)
}

fn body(answer: &[u8]) -> anyhow::Result<String> {
    let text = std::str::from_utf8(answer).context("the answer is no text")?;
    let (head, body) = text.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    ensure!(status.starts_with("HTTP/1.1 200 "), "it answers {status:?}");
    let length = lines.find_map(|line| line.strip_prefix("Content-Length: ")?.parse::<usize>().ok());
    ensure!(length == Some(body.len()), "the answer breaks off");
    Ok(body.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_page_is_taken() {
        let answer = |head: &str, text: &str| body(format!("{head}\r\n\r\n{text}").as_bytes());
        assert_eq!(answer("HTTP/1.1 200 OK\r\nContent-Length: 4", "x 1\n").unwrap(), "x 1\n");
        for (head, text) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 9", "x 1\n"),
            ("HTTP/1.1 200 OK", "x 1\n"),
            ("HTTP/1.1 404 Not Found\r\nContent-Length: 0", ""),
            ("nothing", ""),
        ] {
            assert!(answer(head, text).is_err(), "{head}");
        }
    }
}
