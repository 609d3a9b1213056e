//! Unix sockets of the host in a container's volumes.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use harness::{Context, Proc, Test, Toml};

pub(crate) const TESTS: &[Test] = &[
    Test::common("sockets::one_that_is_mounted", mounted),
    Test::common("sockets::each_half_is_closed_by_itself", halves),
    Test::common("sockets::much_both_ways_while_another_stands_still", much),
    Test::common("sockets::those_in_a_folder", folder),
    Test::common("sockets::each_side_sees_the_others_end", ends),
    Test::bulkhead(
        "sockets::nobody_listens",
        "with runc the socket that is mounted stays the one that it was, and refuses by itself",
        nobody,
    ),
    Test::bulkhead("sockets::one_that_is_not_allowed", "the key is bulkhead's", refused),
    Test::bulkhead(
        "sockets::more_connections_than_a_pod_may_have",
        "only what passes through a shim has to be bounded",
        many,
    ),
];

/// How long a server waits for its client.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the client is in a container.
const TALKER: &str = "/talker";

/// A folder with a socket of the host in it.
struct Place {
    folder: PathBuf,
    socket: PathBuf,
    listener: UnixListener,
}

impl Place {
    /// Allowed by a pattern for its folder.
    fn allowed(t: &mut Context) -> Result<Self> {
        let place = Self::new(t)?;
        let pattern = place.folder.join("*.sock").display().to_string();
        t.set_config("volumes", "host_sockets", Toml::Array(vec![pattern.into()]))?;
        Ok(place)
    }

    fn new(t: &Context) -> Result<Self> {
        let folder = t.dir().join("run");
        fs::create_dir_all(&folder)?;
        let socket = folder.join("a.sock");
        let listener =
            UnixListener::bind(&socket).with_context(|| format!("listen at {}", socket.display()))?;
        Ok(Self { folder, socket, listener })
    }

    /// Serves one connection in a thread of its own.
    fn serve<T: Send + 'static>(
        &self,
        how: impl FnOnce(UnixStream) -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let listener = self.listener.try_clone()?;
        Ok(std::thread::spawn(move || {
            let (peer, _) = listener.accept()?;
            peer.set_read_timeout(Some(PATIENCE))?;
            peer.set_write_timeout(Some(PATIENCE))?;
            how(peer)
        }))
    }

    /// Flags of a container with the socket at /s.
    fn flags(&self) -> Result<Vec<String>> {
        with_talker(&self.socket, "/s", "rw")
    }
}

/// Flags of a container with the client, and something of the host.
fn with_talker(source: &Path, target: &str, mode: &str) -> Result<Vec<String>> {
    let talker = std::env::var("BULKHEAD_TEST_TALKER").context("BULKHEAD_TEST_TALKER names the talker")?;
    let bind = |source: &Path, target: &str, mode: &str| {
        [
            "--mount".to_owned(),
            format!("type=bind,src={},dst={target},options=rbind:{mode}", source.display()),
        ]
    };
    Ok([bind(Path::new(&talker), TALKER, "ro"), bind(source, target, mode)].concat())
}

fn flags(owned: &[String]) -> Vec<&str> {
    owned.iter().map(String::as_str).collect()
}

fn served<T>(server: JoinHandle<Result<T>>) -> Result<T> {
    server.join().map_err(|_| anyhow!("the server has panicked"))?
}

fn all(mut peer: &UnixStream) -> Result<String> {
    let mut text = String::new();
    peer.read_to_string(&mut text).context("read what the container says")?;
    Ok(text)
}

/// Answers what was asked, once all of the question is there.
fn answer(mut peer: UnixStream) -> Result<()> {
    let question = all(&peer)?;
    peer.write_all(format!("{question} is answered").as_bytes())?;
    Ok(())
}

/// Starts the client in a running container.
fn talk(t: &Context, exec: &str, path: &str) -> Result<Proc> {
    t.exec("c", exec, &[TALKER, path]).stdin_open().spawn()
}

fn mounted(t: &mut Context) -> Result<()> {
    let place = Place::allowed(t)?;
    chown(&place.socket, Some(1000), Some(3000))?;
    fs::set_permissions(&place.socket, PermissionsExt::from_mode(0o620))?;
    t.start_sleeper(&flags(&place.flags()?), "c")?;
    let seen = t.exec_ok("c", "stat -c '%F %a %u %g' /s")?;
    ensure!(seen == "socket 620 1000 3000", "saw {seen:?}");

    for round in ["first", "second"] {
        let server = place.serve(answer)?;
        let said = t.exec_ok("c", &format!("printf {round} | {TALKER} /s"))?;
        ensure!(said == format!("{round} is answered"), "the client got {said:?}");
        served(server)?;
    }
    // Whoever may not write to it may not connect.
    for (user, may) in [("1000:1000", true), ("65534:3000", true), ("65534:65534", false)] {
        let server = may.then(|| place.serve(answer)).transpose()?;
        let run = t.ctr().args(["task", "exec", "--exec-id", "u", "--user", user, "c", "sh", "-c"]);
        let output = run.arg(format!("printf x | {TALKER} /s")).output()?;
        match server {
            Some(server) => {
                output.ok()?;
                served(server)?;
            }
            None => drop(output.expect_failure()?.expect_stderr(&["Permission denied"])?),
        }
    }
    t.remove("c")
}

fn halves(t: &mut Context) -> Result<()> {
    let place = Place::allowed(t)?;
    t.start_sleeper(&flags(&place.flags()?), "c")?;
    let server = place.serve(|mut peer| {
        peer.write_all(b"said first")?;
        peer.shutdown(std::net::Shutdown::Write)?;
        all(&peer)
    })?;
    let mut client = talk(t, "e", "/s")?;
    client.wait_for_text("said first")?;
    client.write_stdin(b"and ")?;
    client.write_stdin(b"heard last")?;
    client.close_stdin();
    client.wait()?.ok()?;
    let heard = served(server)?;
    ensure!(heard == "and heard last", "the server heard {heard:?}");
    t.remove("c")
}

fn much(t: &mut Context) -> Result<()> {
    const BYTES: usize = 4 << 20;
    let place = Place::allowed(t)?;
    t.start_sleeper(&flags(&place.flags()?), "c")?;
    // One that nobody reads from, however much it says.
    let (let_go, held) = std::sync::mpsc::channel::<()>();
    let still = place.serve(move |mut peer| {
        peer.write_all(b"x")?;
        let _ = held.recv();
        Ok(())
    })?;
    let mut blocked =
        t.exec("c", "blocked", &["sh", "-c", &format!("head -c {BYTES} /dev/zero | {TALKER} /s")]).spawn()?;
    blocked.wait_for_text("x")?;

    let echo = place.serve(|mut peer| {
        let mut writer = peer.try_clone()?;
        let copied = std::io::copy(&mut peer, &mut writer)?;
        writer.shutdown(std::net::Shutdown::Write)?;
        Ok(copied)
    })?;
    let script = format!(
        "head -c {BYTES} /dev/urandom >/tmp/a; {TALKER} /s </tmp/a >/tmp/b; cmp /tmp/a /tmp/b && echo same"
    );
    let said = t.exec_ok("c", &script)?;
    ensure!(said == "same", "{said}");
    ensure!(served(echo)? == BYTES as u64);

    let_go.send(())?;
    served(still)?;
    // The server has closed while there was something to read.
    blocked.close_stdin();
    blocked.wait()?;
    t.remove("c")
}

fn folder(t: &mut Context) -> Result<()> {
    let place = Place::allowed(t)?;
    let deep = place.folder.join("deep");
    fs::create_dir(&deep)?;
    fs::write(place.folder.join("file"), "of the host")?;
    for mode in ["rw", "ro"] {
        t.start_sleeper(&flags(&with_talker(&place.folder, "/m", mode)?), "c")?;
        let server = place.serve(answer)?;
        let said = t.exec_ok("c", &format!("printf {mode} | {TALKER} /m/a.sock; cat /m/file"))?;
        ensure!(said == format!("{mode} is answeredof the host"), "the client got {said:?}");
        served(server)?;
        let made = t.exec("c", "touch", &["touch", "/m/deep/made"]).output()?;
        ensure!(made.ok().is_ok() == (mode == "rw"), "a folder that is {mode}");
        t.remove("c")?;
    }
    ensure!(deep.join("made").exists(), "what the container has made is not on the host");
    let mut left: Vec<_> = fs::read_dir(&place.folder)?.flatten().map(|entry| entry.file_name()).collect();
    left.sort();
    ensure!(left == ["a.sock", "deep", "file"], "the folder has {left:?}");
    Ok(())
}

fn ends(t: &mut Context) -> Result<()> {
    let place = Place::allowed(t)?;
    t.start_sleeper(&flags(&place.flags()?), "c")?;
    // The server's end is seen by a client that says nothing.
    let server = place.serve(|mut peer| Ok(peer.write_all(b"hello")?))?;
    let client = talk(t, "e", "/s")?;
    client.wait_for_text("hello")?;
    served(server)?;
    client.wait()?.ok()?;

    // The client's end is seen by a server that says nothing.
    let greets = |mut peer: UnixStream| {
        peer.write_all(b"hello")?;
        let heard = all(&peer)?;
        // More than is in any buffer on the way.
        let refused = (0..1000).any(|_| peer.write_all(&[0; 1 << 16]).is_err());
        ensure!(refused, "the client has gone, and the server can write");
        Ok(heard)
    };
    let server = place.serve(greets)?;
    let client = talk(t, "e", "/s")?;
    client.wait_for_text("hello")?;
    t.ctr_ok(&["task", "kill", "--signal", "KILL", "--exec-id", "e", "c"])?;
    client.wait()?;
    ensure!(served(server)?.is_empty());

    // So is the container's.
    let server = place.serve(greets)?;
    let client = talk(t, "e", "/s")?;
    client.wait_for_text("hello")?;
    t.ctr_ok(&["task", "kill", "--signal", "KILL", "c"])?;
    client.wait()?;
    ensure!(served(server)?.is_empty());
    t.remove("c")
}

fn nobody(t: &mut Context) -> Result<()> {
    let place = Place::allowed(t)?;
    t.start_sleeper(&flags(&place.flags()?), "c")?;
    let Place { socket, listener, .. } = place;
    drop(listener);
    // It was let in before that could be known, and is closed at once.
    let client = talk(t, "e", "/s")?;
    let output = client.wait()?;
    ensure!(output.out().is_empty(), "{output}");

    // A server that is started anew makes its socket anew.
    fs::remove_file(&socket)?;
    let again = Place { folder: PathBuf::new(), listener: UnixListener::bind(&socket)?, socket };
    let server = again.serve(answer)?;
    let said = t.exec_ok("c", &format!("printf again | {TALKER} /s"))?;
    ensure!(said == "again is answered", "the client got {said:?}");
    served(server)?;
    t.remove("c")
}

fn refused(t: &mut Context) -> Result<()> {
    let place = Place::new(t)?;
    let (link, path) = (place.folder.join("a.socket"), place.socket.display().to_string());
    // Another name, but the same socket.
    std::os::unix::fs::symlink("a.sock", &link)?;
    let other = place.folder.join("*.socket").display().to_string();
    // Off, and on for something else.
    for allowed in [vec![], vec![Toml::from(other)]] {
        t.set_config("volumes", "host_sockets", Toml::Array(allowed))?;
        for source in [&place.socket, &link] {
            let flags = with_talker(source, "/s", "rw")?;
            let output = t.run_rm(&self::flags(&flags), &["true"])?.expect_failure()?;
            output.expect_stderr(&[
                &source.display().to_string(),
                "at /s",
                "`volumes.host_sockets`",
                &path,
            ])?;
        }
        // In a folder it is as any file.
        let flags = with_talker(&place.folder, "/m", "rw")?;
        let output = t.run_rm(&self::flags(&flags), &[TALKER, "/m/a.sock"])?.expect_failure()?;
        output.expect_stderr(&["Connection refused"])?;
    }

    let no_path = Toml::Array(vec!["run/*.sock".into()]);
    t.set_config("volumes", "host_sockets", no_path)?;
    let output = t.run_rm(&[], &["true"])?.expect_failure()?;
    output.expect_stderr(&["`volumes.host_sockets`", "`run/*.sock` is not absolute"])?;
    t.set_config("volumes", "host_sockets", Toml::Array(vec![]))?;
    let annotation = ["--annotation", "io.bulkhead.volumes.host_sockets=/run/x.sock"];
    let output = t.run_rm(&annotation, &["true"])?.expect_failure()?;
    output.expect_stderr(&["volumes.host_sockets", "belongs to the host"])?;
    Ok(())
}

fn many(t: &mut Context) -> Result<()> {
    /// `MOST_CONNECTIONS` of the protocol, and some that have to wait.
    const CONNECTIONS: usize = 128 + 8;
    let place = Place::allowed(t)?;
    t.start_sleeper(&flags(&place.flags()?), "c")?;
    let listener = place.listener.try_clone()?;
    let server = std::thread::spawn(move || {
        let mut held = Vec::new();
        for number in 0..CONNECTIONS {
            // Those that wait come when others have gone.
            if number == 128 {
                held.clear();
            }
            let (mut peer, _) = listener.accept()?;
            peer.write_all(b".")?;
            held.push(peer);
        }
        anyhow::Ok(())
    });
    let script = format!(
        "for n in $(seq {CONNECTIONS}); do ({TALKER} /s </dev/null || echo bad $?) & done; wait; echo"
    );
    let said = t.exec_ok("c", &script)?;
    ensure!(said.trim() == ".".repeat(CONNECTIONS), "{said}");
    served(server)?;
    t.remove("c")
}
