//! Answers `GET /metrics` on a unix socket, and nothing else: as much of HTTP/1.1 (RFC 9112) as that takes.
//! Knows no figure. One request a connection, bounded in size, number and time: a peer can hold nobody up.

use std::{io, path::Path, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};
use tracing::warn;

use crate::tasks;

/// Connections that are served at once; further ones wait to be accepted.
const CONNECTIONS: usize = 8;
/// The longest request, in bytes.
const REQUEST: usize = 8 << 10;
/// How long one connection may take from its first byte to its last.
const CONNECTION: Duration = Duration::from_secs(10);

/// Where the figures are.
const PATH: &str = "/metrics";
/// The type of the text (Prometheus documentation, "Exposition formats").
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Listens at `path`, for the owner alone: the directory is private while the mode is being set.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

/// Yields what is told.
pub type Page = Box<dyn Fn() -> BoxFuture<'static, String> + Send + Sync>;

/// Answers with what `page` yields, as long as the process lives.
pub async fn serve(listener: UnixListener, page: Page) {
    serve_within(CONNECTION, listener, page).await;
}

async fn serve_within(limit: Duration, listener: UnixListener, page: Page) {
    let (page, room) = (Arc::new(page), Arc::new(Semaphore::new(CONNECTIONS)));
    loop {
        // Never closed.
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => return warn!(%error, "metrics are not told any more"),
        };
        let page = page.clone();
        tasks::spawn(async move {
            // A peer that is slow, or gone, is no concern of ours.
            let _ = tokio::time::timeout(limit, connection(stream, &page)).await;
            drop(permit);
        });
    }
}

async fn connection(mut stream: UnixStream, page: &Page) -> io::Result<()> {
    let answer = match request(&mut stream).await? {
        Ok(with_body) => {
            let body = page().await;
            let mut answer = head("200 OK", &format!("Content-Type: {CONTENT_TYPE}\r\n"), body.len());
            if with_body {
                answer.push_str(&body);
            }
            answer
        }
        Err((status, header)) => {
            let body = format!("{status}\n");
            head(status, &format!("Content-Type: text/plain\r\n{header}"), body.len()) + &body
        }
    };
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

fn head(status: &str, headers: &str, length: usize) -> String {
    format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n")
}

/// A status line's end and further headers.
type Refusal = (&'static str, &'static str);

/// Reads a request: whether its answer has a body, or why there is none but an error's.
async fn request(stream: &mut UnixStream) -> io::Result<Result<bool, Refusal>> {
    let mut bytes = Vec::new();
    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
        if bytes.len() >= REQUEST {
            return Ok(Err(("431 Request Header Fields Too Large", "")));
        }
        let mut chunk = [0; 1024];
        match stream.read(&mut chunk).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => bytes.extend_from_slice(&chunk[..n]),
        }
    }
    let line = bytes.split(|byte| *byte == b'\r').next().unwrap_or_default();
    Ok(asked(std::str::from_utf8(line).unwrap_or_default()))
}

fn asked(line: &str) -> Result<bool, Refusal> {
    let words: Vec<&str> = line.split(' ').collect();
    let [method, target, version] = words[..] else { return Err(("400 Bad Request", "")) };
    if !version.starts_with("HTTP/1.") {
        return Err(("505 HTTP Version Not Supported", ""));
    }
    let path = target.split('?').next().unwrap_or_default();
    match (method, path) {
        ("GET", PATH) => Ok(true),
        ("HEAD", PATH) => Ok(false),
        (_, PATH) => Err(("405 Method Not Allowed", "Allow: GET, HEAD\r\n")),
        _ => Err(("404 Not Found", "")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server of the page "x 1", and how to ask it.
    struct Door(tempfile::TempDir);

    impl Door {
        fn open() -> Self {
            Self::open_within(CONNECTION)
        }

        fn open_within(limit: Duration) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let listener = listen(&folder.path().join("s")).unwrap();
            let page: Page = Box::new(|| Box::pin(async { "x 1\n".to_owned() }));
            tokio::spawn(serve_within(limit, listener, page));
            Self(folder)
        }

        async fn connect(&self) -> UnixStream {
            UnixStream::connect(self.0.path().join("s")).await.unwrap()
        }

        async fn ask(&self, request: &str) -> String {
            let mut stream = self.connect().await;
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        }
    }

    #[tokio::test]
    async fn a_page_is_told_to_who_asks_for_it() {
        let door = Door::open();
        let answer = door.ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert_eq!(
            answer,
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
             Content-Length: 4\r\nConnection: close\r\n\r\nx 1\n"
        );
        let answer = door.ask("HEAD /metrics?x=y HTTP/1.0\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\n"), "{answer}");
        let mode = std::fs::metadata(door.0.path().join("s")).unwrap();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777, 0o600);
    }

    #[tokio::test]
    async fn anything_else_is_refused() {
        let door = Door::open();
        for (request, status) in [
            ("GET / HTTP/1.1", "404 Not Found"),
            ("POST /metrics HTTP/1.1", "405 Method Not Allowed"),
            ("GET /metrics", "400 Bad Request"),
            ("GET /metrics HTTP/2", "505 HTTP Version Not Supported"),
            ("\u{1}", "400 Bad Request"),
        ] {
            let answer = door.ask(&format!("{request}\r\n\r\n")).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{request}: {answer}");
        }
    }

    #[tokio::test]
    async fn a_request_without_an_end_is_cut_off() {
        let mut stream = Door::open().connect().await;
        // The server may close before it has read all: then writing fails, and what it said is there to read.
        let _ = stream.write_all(&[b'x'; REQUEST]).await;
        let mut answer = [0; 16];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer[..], b"HTTP/1.1 431 Req");
    }

    #[tokio::test]
    async fn peers_that_say_nothing_hold_nobody_up() {
        let door = Door::open();
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS - 1 {
            silent.push(door.connect().await);
        }
        assert!(door.ask("GET /metrics HTTP/1.1\r\n\r\n").await.ends_with("x 1\n"));
    }

    #[tokio::test]
    async fn peers_that_take_every_place_lose_them() {
        let limit = Duration::from_millis(200);
        let door = Door::open_within(limit);
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS {
            silent.push(door.connect().await);
        }
        let began = std::time::Instant::now();
        assert!(door.ask("GET /metrics HTTP/1.1\r\n\r\n").await.ends_with("x 1\n"));
        assert!(began.elapsed() >= limit / 2, "there was a place left");
    }
}
