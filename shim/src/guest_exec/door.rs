//! The shim's end: lets whoever may open the socket run programs in the guest.
//! Knows the agent and streams; that it may be asked at all is decided by who makes it.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde::Serialize;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::oneshot,
    time::timeout,
};
use tracing::{debug, info, warn};

use super::{Answer, Exits, Names, Opening, Program, Size, Word, line};
use crate::{
    error::{Fault, Kind},
    guest::Agent,
    stdio::{Hub, Sink, Source, Tokens},
    tasks,
};

/// How long a peer may take for its first line, and for the streams that it is to open.
const PREFACE: Duration = Duration::from_secs(10);

/// A connection that turned out to be a stream. Some of its bytes may have been read already.
type Stream = (BufReader<OwnedReadHalf>, OwnedWriteHalf);

/// What goes on in the guest, as far as it concerns these programs.
trait Guest: Send + Sync + 'static {
    fn start(
        &self,
        exec: &str,
        program: &Program,
        tokens: Tokens,
    ) -> impl Future<Output = Result<(), Fault>> + Send;
    fn kill(&self, exec: &str) -> impl Future<Output = Result<(), Fault>> + Send;
    fn resize(&self, exec: &str, size: Size) -> impl Future<Output = Result<(), Fault>> + Send;
}

impl Guest for Agent {
    async fn start(&self, exec: &str, program: &Program, tokens: Tokens) -> Result<(), Fault> {
        self.debug_exec(exec, program, tokens).await
    }

    async fn kill(&self, exec: &str) -> Result<(), Fault> {
        self.kill_debug_exec(exec).await
    }

    async fn resize(&self, exec: &str, size: Size) -> Result<(), Fault> {
        self.resize_debug_exec(exec, size).await
    }
}

/// What the connections of one pod have in common.
struct Door<G> {
    guest: G,
    hub: Hub,
    exits: Exits,
    /// Streams that were named and not opened yet.
    named: Mutex<HashMap<String, oneshot::Sender<Stream>>>,
    last: AtomicU64,
}

/// Serves as long as the process lives. The ends of programs are told to `exits`.
pub async fn serve(listener: UnixListener, agent: Agent, hub: Hub, exits: Exits) {
    serve_guest(listener, agent, hub, exits).await;
}

async fn serve_guest<G: Guest>(listener: UnixListener, guest: G, hub: Hub, exits: Exits) {
    let door = Arc::new(Door { guest, hub, exits, named: Mutex::default(), last: AtomicU64::new(0) });
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tasks::spawn(door.clone().connection(stream))),
            Err(error) => return warn!(%error, "no program can be run in the guest any more"),
        }
    }
}

/// Who has asked for a program.
struct Peer {
    said: Lines<BufReader<OwnedReadHalf>>,
    answers: OwnedWriteHalf,
}

impl Peer {
    async fn tell(&mut self, answer: &impl Serialize) -> io::Result<()> {
        self.answers.write_all(line(answer).as_bytes()).await
    }
}

impl<G: Guest> Door<G> {
    fn named(&self) -> std::sync::MutexGuard<'_, HashMap<String, oneshot::Sender<Stream>>> {
        self.named.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    async fn connection(self: Arc<Self>, stream: UnixStream) {
        let (reader, answers) = stream.into_split();
        let mut said = BufReader::new(reader).lines();
        let Ok(Ok(Some(first))) = timeout(PREFACE, said.next_line()).await else {
            return debug!("a connection for a program in the guest said nothing");
        };
        match serde_json::from_str(&first) {
            Ok(Opening::Stream(name)) => {
                let waits = self.named().remove(&name);
                if let Some(waits) = waits {
                    let _ = waits.send((said.into_inner(), answers));
                }
            }
            Ok(Opening::Run(program)) => {
                let exec = (self.last.fetch_add(1, Ordering::Relaxed) + 1).to_string();
                let mut peer = Peer { said, answers };
                info!(exec, ?program, "a program in the guest itself");
                let answer = match self.run(&exec, &program, &mut peer).await {
                    Ok(Some(status)) => Answer::Exited(status),
                    Ok(None) => return info!(exec, "whoever ran it has gone: it is killed"),
                    Err(fault) => Answer::Failed(fault.message),
                };
                info!(exec, ?answer, "the program in the guest has ended");
                // The peer may have gone.
                let _ = peer.tell(&answer).await;
            }
            Err(error) => {
                warn!(%error, "a connection for a program in the guest says what nobody understands")
            }
        }
    }

    /// Runs a program to its end and answers its status; none if the peer has gone before.
    async fn run(
        self: &Arc<Self>,
        exec: &str,
        program: &Program,
        peer: &mut Peer,
    ) -> Result<Option<u8>, Fault> {
        let Some(tokens) = self.open(program, peer).await? else { return Ok(None) };
        let exited = self.exits.expect(exec);
        if let Err(fault) = self.guest.start(exec, program, tokens).await {
            self.hub.withdraw(&tokens.all());
            self.exits.forget(exec);
            if fault.kind == Kind::DeadlineExceeded {
                // It may come yet, and nobody is to wait for that.
                let (door, exec) = (self.clone(), exec.to_owned());
                tasks::spawn(async move { drop(door.guest.kill(&exec).await) });
            }
            return Err(fault);
        }
        if peer.tell(&Answer::Started).await.is_err() {
            return self.give_up(exec).await;
        }
        tokio::pin!(exited);
        loop {
            tokio::select! {
                status = &mut exited => return match status {
                    Ok(status) => Ok(Some(status)),
                    Err(_) => Err(Fault::new(Kind::Unavailable, "the machine ended while the program ran")),
                },
                said = peer.said.next_line() => {
                    let Ok(Some(said)) = said else { return self.give_up(exec).await };
                    match serde_json::from_str(&said) {
                        Ok(Word::Resize(size)) => {
                            if let Err(fault) = self.guest.resize(exec, size).await {
                                debug!(exec, "the size of its terminal: {fault}");
                            }
                        }
                        Err(error) => debug!(exec, %error, "what its peer says is not understood"),
                    }
                }
            }
        }
    }

    async fn give_up(&self, exec: &str) -> Result<Option<u8>, Fault> {
        self.exits.forget(exec);
        match self.guest.kill(exec).await {
            Err(fault) if fault.kind != Kind::NotFound => {
                Err(fault.while_doing("end the program that nobody waits for"))
            }
            _ => Ok(None),
        }
    }

    /// Has the peer open its streams, and expects the guest's ends of them. None if the peer has gone.
    async fn open(&self, program: &Program, peer: &mut Peer) -> Result<Option<Tokens>, Fault> {
        let stdin = if program.stdin { Some(self.name()?) } else { None };
        let stdout = self.name()?;
        let stderr = if program.terminal.is_none() { Some(self.name()?) } else { None };
        let name = |named: &Option<Named>| named.as_ref().map(|named| named.name.clone());
        let names = Names { stdin: name(&stdin), stdout: stdout.name.clone(), stderr: name(&stderr) };
        let opened = async {
            peer.tell(&Answer::Streams(names.clone())).await?;
            let stream = async |named: Option<Named>| match named {
                Some(named) => named.stream.await.map(Some).map_err(io::Error::other),
                None => Ok(None),
            };
            io::Result::Ok((stream(stdin).await?, stream(Some(stdout)).await?, stream(stderr).await?))
        };
        let opened = timeout(PREFACE, opened).await;
        for name in [names.stdin, Some(names.stdout), names.stderr].into_iter().flatten() {
            self.named().remove(&name);
        }
        let Ok(opened) = opened else {
            let late = format!("the streams of the program were not opened within {} s", PREFACE.as_secs());
            return Err(Fault::new(Kind::DeadlineExceeded, late));
        };
        let Ok((stdin, stdout, stderr)) = opened else { return Ok(None) };
        let source = stdin.map(|(reader, _)| Box::new(reader) as Source);
        let sinks = [stdout, stderr].map(|stream| stream.map(|(_, writer)| Box::new(writer) as Sink));
        let tokens = self.hub.open_streams(source, sinks);
        tokens.map(Some).map_err(|e| Fault::of(Kind::Internal, &e))
    }

    /// A new name for a stream, and where it comes.
    fn name(&self) -> Result<Named, Fault> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)
            .map_err(|e| Fault::internal("draw a name for a stream", &io::Error::other(e)))?;
        let name: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let (come, stream) = oneshot::channel();
        self.named().insert(name.clone(), come);
        Ok(Named { name, stream })
    }
}

struct Named {
    name: String,
    stream: oneshot::Receiver<Stream>,
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio::{
        io::{AsyncReadExt, Lines},
        sync::mpsc,
    };

    use super::*;

    /// What was asked of the guest, which starts what is not called "missing".
    struct Played(mpsc::UnboundedSender<String>);

    impl Guest for Played {
        async fn start(&self, exec: &str, program: &Program, tokens: Tokens) -> Result<(), Fault> {
            let kinds = [tokens.stdin, tokens.stdout, tokens.stderr].map(|token| u8::from(token.is_some()));
            let _ = self.0.send(format!("start {exec} {:?} {kinds:?}", program.args));
            match program.args[0].as_str() {
                "missing" => Err(Fault::new(Kind::Internal, "exec: \"missing\": not found")),
                "late" => Err(Fault::new(Kind::DeadlineExceeded, "the guest did not answer within 1 s")),
                _ => Ok(()),
            }
        }

        async fn kill(&self, exec: &str) -> Result<(), Fault> {
            let _ = self.0.send(format!("kill {exec}"));
            Ok(())
        }

        async fn resize(&self, exec: &str, size: Size) -> Result<(), Fault> {
            let _ = self.0.send(format!("resize {exec} {}x{}", size.width, size.height));
            Ok(())
        }
    }

    struct Scene {
        dir: tempfile::TempDir,
        exits: Exits,
        asked: mpsc::UnboundedReceiver<String>,
    }

    impl Scene {
        fn set() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (ask, asked) = mpsc::unbounded_channel();
            let hub = Hub::new(mpsc::unbounded_channel().0, Arc::default());
            let (exits, listener) =
                (Exits::default(), UnixListener::bind(dir.path().join(super::super::SOCKET)));
            tokio::spawn(serve_guest(listener.unwrap(), Played(ask), hub, exits.clone()));
            Self { dir, exits, asked }
        }

        async fn run(
            &self,
            program: Program,
        ) -> (OwnedWriteHalf, Lines<BufReader<OwnedReadHalf>>, Vec<UnixStream>) {
            let control = opened(self.dir.path(), &Opening::Run(program)).await;
            let (reader, writer) = control.into_split();
            let mut answers = BufReader::new(reader).lines();
            let Answer::Streams(names) = next(&mut answers).await else { panic!("no streams") };
            let mut streams = Vec::new();
            for name in [names.stdin, Some(names.stdout), names.stderr].into_iter().flatten() {
                streams.push(opened(self.dir.path(), &Opening::Stream(name)).await);
            }
            (writer, answers, streams)
        }

        async fn asked(&mut self) -> String {
            self.asked.recv().await.unwrap()
        }
    }

    async fn opened(dir: &Path, opening: &Opening) -> UnixStream {
        let mut stream = UnixStream::connect(dir.join(super::super::SOCKET)).await.unwrap();
        stream.write_all(line(opening).as_bytes()).await.unwrap();
        stream
    }

    async fn next(answers: &mut Lines<BufReader<OwnedReadHalf>>) -> Answer {
        serde_json::from_str(&answers.next_line().await.unwrap().unwrap()).unwrap()
    }

    fn program(name: &str) -> Program {
        Program { args: vec![name.into()], ..Program::default() }
    }

    #[tokio::test]
    async fn a_program_is_told_from_its_start_to_its_end() {
        let mut scene = Scene::set();
        let (mut says, mut answers, _streams) =
            scene.run(Program { stdin: true, terminal: Some(Size::default()), ..program("sh") }).await;
        assert_eq!(next(&mut answers).await, Answer::Started);
        assert_eq!(scene.asked().await, "start 1 [\"sh\"] [1, 1, 0]");
        let size = Size { width: 80, height: 24 };
        says.write_all(line(&Word::Resize(size)).as_bytes()).await.unwrap();
        assert_eq!(scene.asked().await, "resize 1 80x24");
        scene.exits.told("1", 7);
        assert_eq!(next(&mut answers).await, Answer::Exited(7));
    }

    #[tokio::test]
    async fn a_program_whose_peer_goes_is_killed() {
        let mut scene = Scene::set();
        let (says, mut answers, streams) = scene.run(program("sleep")).await;
        assert_eq!(next(&mut answers).await, Answer::Started);
        assert_eq!((scene.asked().await.as_str(), streams.len()), ("start 1 [\"sleep\"] [0, 1, 1]", 2));
        drop((says, answers));
        assert_eq!(scene.asked().await, "kill 1");
    }

    #[tokio::test]
    async fn what_the_guest_refuses_is_told_and_its_streams_end() {
        let mut scene = Scene::set();
        let (_says, mut answers, mut streams) = scene.run(program("missing")).await;
        assert_eq!(next(&mut answers).await, Answer::Failed("exec: \"missing\": not found".into()));
        for stream in &mut streams {
            assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        }
        let (_says, mut answers, _streams) = scene.run(program("late")).await;
        assert_eq!(next(&mut answers).await, Answer::Failed("the guest did not answer within 1 s".into()));
        for asked in ["start 1 [\"missing\"] [0, 1, 1]", "start 2 [\"late\"] [0, 1, 1]", "kill 2"] {
            assert_eq!(scene.asked().await, asked, "what comes too late is killed");
        }
    }

    #[tokio::test]
    async fn the_end_of_the_machine_is_told() {
        let scene = Scene::set();
        let (_says, mut answers, _streams) = scene.run(program("sh")).await;
        assert_eq!(next(&mut answers).await, Answer::Started);
        scene.exits.guest_gone();
        assert_eq!(
            next(&mut answers).await,
            Answer::Failed("the machine ended while the program ran".into())
        );
    }

    #[tokio::test]
    async fn nonsense_and_unknown_streams_are_closed() {
        let scene = Scene::set();
        for said in ["hello\n", "{\"stream\":\"x\"}\n", "{\"run\":{}}\n"] {
            let mut stream = UnixStream::connect(scene.dir.path().join(super::super::SOCKET)).await.unwrap();
            stream.write_all(said.as_bytes()).await.unwrap();
            assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "{said}");
        }
    }

    #[test]
    fn what_is_asked_is_not_in_the_log() {
        let program =
            Program { args: vec!["hush".into()], env: vec!["TOKEN=hush".into()], ..program("hush") };
        assert!(!format!("{program:?}").contains("hush"), "{program:?}");
    }
}
