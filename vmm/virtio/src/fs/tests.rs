//! The device before a backend that a thread plays, which answers as each test wants.

use std::{
    fs::File,
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use vhost::vhost_user::message::FrontendReq;

use super::*;
use crate::{
    ActivateError, Device, DeviceState,
    interrupt::USED_BUFFER,
    testing::{Bench, shared_memory},
};

/// What the backend answers to one message.
type Script = Box<dyn FnMut(FrontendReq, &[u8]) -> Answer + Send>;

enum Answer {
    /// As a backend does that agrees to everything.
    Honest,
    /// These bytes, header and all.
    Raw(Vec<u8>),
    /// Nothing, ever.
    Silence,
    /// The end of the connection.
    HangUp,
}

/// A request and its body.
type Message = (FrontendReq, Vec<u8>);

struct Backend {
    heard: Arc<Mutex<Vec<Message>>>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    fn new(mut script: Script) -> (Self, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let heard: Arc<Mutex<Vec<_>>> = Arc::default();
        let record = heard.clone();
        let thread = std::thread::spawn(move || {
            let mut header = [0; 12];
            while theirs.read_exact(&mut header).is_ok() {
                let word = |n: usize| u32::from_ne_bytes(header[n..n + 4].try_into().unwrap());
                let mut body = vec![0; word(8) as usize];
                theirs.read_exact(&mut body).unwrap();
                let request = FrontendReq::try_from(word(0)).unwrap();
                record.lock().unwrap().push((request, body.clone()));
                let answer = match script(request, &body) {
                    Answer::Honest => honest(request, word(4), &body),
                    Answer::Raw(bytes) => bytes,
                    Answer::Silence => continue,
                    Answer::HangUp => break,
                };
                // The other end may be gone already.
                let _ = theirs.write_all(&answer);
            }
        });
        (Self { heard, thread: Some(thread) }, ours)
    }

    fn heard(&self) -> Vec<FrontendReq> {
        self.heard.lock().unwrap().iter().map(|(request, _)| *request).collect()
    }

    fn forget(&self) {
        self.heard.lock().unwrap().clear();
    }

    fn bodies(&self, request: FrontendReq) -> Vec<Vec<u8>> {
        self.heard.lock().unwrap().iter().filter(|(r, _)| *r == request).map(|(_, b)| b.clone()).collect()
    }
}

fn reply(request: FrontendReq, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for word in [u32::from(request), 1 | 4, body.len() as u32] {
        out.extend(word.to_ne_bytes());
    }
    out.extend(body);
    out
}

fn number(request: FrontendReq, value: u64) -> Vec<u8> {
    reply(request, &value.to_ne_bytes())
}

fn honest(request: FrontendReq, flags: u32, body: &[u8]) -> Vec<u8> {
    match request {
        FrontendReq::GET_FEATURES => number(request, 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 26),
        FrontendReq::GET_PROTOCOL_FEATURES => number(request, u64::MAX),
        FrontendReq::GET_QUEUE_NUM => number(request, 2),
        FrontendReq::GET_VRING_BASE => {
            let mut body = body.to_vec();
            body[4..].copy_from_slice(&7u32.to_ne_bytes());
            reply(request, &body)
        }
        _ if flags & 8 != 0 => number(request, 0),
        _ => Vec::new(),
    }
}

fn agreeable() -> (Backend, UnixStream) {
    Backend::new(Box::new(|_, _| Answer::Honest))
}

/// A backend that does something else at one kind of message.
fn except(at: FrontendReq, mut what: impl FnMut() -> Answer + Send + 'static) -> (Backend, UnixStream) {
    Backend::new(Box::new(move |request, _| if request == at { what() } else { Answer::Honest }))
}

/// For backends that do not answer; the others get the time they have in a machine.
const SHORT: Duration = Duration::from_millis(300);

fn bench(socket: UnixStream) -> Bench<Fs> {
    Bench::with_memory(Fs::new("share", socket, 1).unwrap(), shared_memory())
}

fn impatient(socket: UnixStream) -> Bench<Fs> {
    let fs = Fs::with_patience("share", socket, 1, SHORT, 2 * SHORT).unwrap();
    Bench::with_memory(fs, shared_memory())
}

fn counted(bench: &Bench<Fs>, name: &str) -> u64 {
    let metrics = bench.device.lock().unwrap().metrics();
    metrics.into_iter().find(|(n, _)| *n == name).unwrap().1
}

#[test]
fn the_guest_reads_the_tag_and_the_number_of_rings() {
    let (_backend, socket) = agreeable();
    let fs = Fs::new("share", socket, 1).unwrap();
    let mut config = [0xff; 48];
    config[40..].fill(0);
    fs.read_config(0, &mut config[..40]);
    assert_eq!(&config[..6], b"share\0");
    assert_eq!(config[36..40], 1u32.to_le_bytes());
    let mut outside = [0; 4];
    fs.read_config(38, &mut outside);
    assert_eq!(outside, [0, 0, 0, 0]);
    fs.read_config(u64::MAX, &mut outside);
    assert_eq!(fs.queue_sizes(), [PRIORITY_QUEUE_SIZE, REQUEST_QUEUE_SIZE]);
    assert_eq!(fs.features(), 1 << 28 | 1 << 29, "not what is between us and the backend");
}

#[test]
fn what_cannot_be_is_refused_at_construction() {
    let error = |tag: &str, queues| Fs::new(tag, agreeable().1, queues).err().unwrap().kind();
    assert_eq!(error("", 1), std::io::ErrorKind::InvalidInput);
    assert_eq!(error(&"x".repeat(37), 1), std::io::ErrorKind::InvalidInput);
    assert_eq!(error("x", 0), std::io::ErrorKind::InvalidInput);
    assert_eq!(error("x", 2), std::io::ErrorKind::Unsupported, "the backend has two rings");
    let without = |request| {
        let (_backend, socket) = except(request, move || Answer::Raw(number(request, 0)));
        Fs::new("x", socket, 1).err().unwrap().kind()
    };
    assert_eq!(without(FrontendReq::GET_FEATURES), std::io::ErrorKind::Unsupported);
    assert_eq!(without(FrontendReq::GET_PROTOCOL_FEATURES), std::io::ErrorKind::Unsupported);
}

#[test]
fn activation_hands_over_memory_and_rings() {
    let (backend, socket) = agreeable();
    let mut bench = bench(socket);
    backend.forget();
    bench.activate(1 << 32).unwrap();
    use FrontendReq as R;
    let ring = [
        R::SET_VRING_NUM,
        R::SET_VRING_ADDR,
        R::SET_VRING_BASE,
        R::SET_VRING_CALL,
        R::SET_VRING_KICK,
        R::SET_VRING_ENABLE,
    ];
    let expected: Vec<R> = [R::SET_FEATURES, R::SET_MEM_TABLE].into_iter().chain(ring).chain(ring).collect();
    assert_eq!(backend.heard(), expected);
    assert_eq!(backend.bodies(R::SET_FEATURES), [(1u64 << 32 | 1 << 30).to_ne_bytes()]);
    let table = &backend.bodies(R::SET_MEM_TABLE)[0];
    assert_eq!(table.len(), 8 + 32);
    assert_eq!(table[16..24], (crate::testing::MEMORY as u64).to_ne_bytes(), "its size");
    let addresses = &backend.bodies(R::SET_VRING_ADDR)[1];
    assert_eq!(addresses[8..16], bench.rings[1].table.to_ne_bytes());
    assert_eq!(addresses[16..24], bench.rings[1].used.to_ne_bytes());
    assert_eq!(addresses[24..32], bench.rings[1].available.to_ne_bytes());
    assert_eq!(bench.interrupt.pending(), USED_BUFFER, "the backend raises the line, and cannot set the bit");
    bench.interrupt.acknowledge(USED_BUFFER);
    assert_eq!(bench.interrupt.pending(), USED_BUFFER);
}

#[test]
fn the_kicks_are_left_to_the_backend() {
    let (_backend, socket) = agreeable();
    let mut bench = bench(socket);
    bench.activate(1 << 32).unwrap();
    bench.kick(1);
    assert_eq!(bench.device.lock().unwrap().kicks()[1].read().unwrap(), 1);
}

#[test]
fn a_pause_keeps_the_positions_and_a_reset_forgets_them() {
    let (backend, socket) = agreeable();
    let mut bench = bench(socket);
    bench.activate(1 << 32).unwrap();
    backend.forget();
    bench.device.lock().unwrap().pause();
    assert_eq!(backend.heard(), [FrontendReq::GET_VRING_BASE; 2]);
    let state = bench.device.lock().unwrap().save();
    assert_eq!(state.rings().iter().map(|r| r.next_avail).collect::<Vec<_>>(), [7, 7]);

    backend.forget();
    bench.device.lock().unwrap().resume();
    let bases = backend.bodies(FrontendReq::SET_VRING_BASE);
    assert_eq!(bases[1], [1u32.to_ne_bytes(), 7u32.to_ne_bytes()].concat());
    assert_eq!(bench.device.lock().unwrap().kicks()[0].read().unwrap(), 1, "it looks at its rings");

    backend.forget();
    bench.device.lock().unwrap().reset();
    use FrontendReq as R;
    assert_eq!(backend.heard(), [R::GET_VRING_BASE, R::GET_VRING_BASE, R::RESET_DEVICE]);
    assert_eq!(bench.device.lock().unwrap().save().rings(), []);
    bench.activate(1 << 32).unwrap();
    assert_eq!(backend.bodies(R::SET_VRING_BASE)[0][4..], [0; 4]);
}

#[test]
fn an_active_device_is_not_restored_before_a_backend_that_does_not_know_its_guest() {
    let (_backend, socket) = agreeable();
    let mut bench = bench(socket);
    let inactive = bench.device.lock().unwrap().save();
    bench.activate(1 << 32).unwrap();
    bench.device.lock().unwrap().pause();
    let active = bench.device.lock().unwrap().save();
    let (_backend, socket) = agreeable();
    let mut other = Fs::new("share", socket, 1).unwrap();
    assert!(other.restore(&inactive));
    assert!(!other.restore(&active));
    assert!(!other.restore(&DeviceState::Rng(crate::rng::State::default())));
}

#[test]
fn a_refusal_fails_the_activation_and_no_more() {
    let refusals = Arc::new(Mutex::new(1));
    let left = refusals.clone();
    let at = FrontendReq::SET_VRING_KICK;
    let (backend, socket) = except(at, move || {
        let mut left = left.lock().unwrap();
        if *left == 0 {
            return Answer::Honest;
        }
        *left -= 1;
        Answer::Raw(number(at, 1))
    });
    let mut bench = bench(socket);
    backend.forget();
    assert!(matches!(bench.activate(1 << 32), Err(ActivateError::Backend { .. })));
    assert_eq!(backend.heard()[7..], [FrontendReq::GET_VRING_BASE; 2], "what had begun is stopped");
    assert_eq!(counted(&bench, "failures"), 1);
    bench.activate(1 << 32).unwrap();
}

#[test]
fn memory_behind_no_file_and_broken_rings_are_refused() {
    let (backend, socket) = agreeable();
    let mut bench = Bench::new(Fs::new("share", socket, 1).unwrap());
    backend.forget();
    assert!(matches!(bench.activate(1 << 32), Err(ActivateError::Backend { .. })));
    assert_eq!(backend.heard(), [FrontendReq::SET_FEATURES]);
    bench.rings[1].used = u64::from(u32::MAX) - 3;
    assert!(matches!(bench.activate(1 << 32), Err(ActivateError::Queue(1))));
}

#[test]
fn a_silent_backend_costs_its_patience_once() {
    let (_backend, socket) = except(FrontendReq::SET_MEM_TABLE, || Answer::Silence);
    let mut bench = impatient(socket);
    let begin = Instant::now();
    let Err(ActivateError::Backend { source, .. }) = bench.activate(1 << 32) else { panic!("it failed") };
    assert_eq!(source.kind(), std::io::ErrorKind::TimedOut);
    assert!(begin.elapsed() >= SHORT);
    let Err(ActivateError::Backend { source, .. }) = bench.activate(1 << 32) else { panic!("it failed") };
    assert_eq!(source.kind(), std::io::ErrorKind::NotConnected);
}

#[test]
fn a_ring_that_is_in_use_gets_more_time_to_stop() {
    let (_backend, socket) = except(FrontendReq::GET_VRING_BASE, || Answer::Silence);
    let mut bench = impatient(socket);
    bench.activate(1 << 32).unwrap();
    let begin = Instant::now();
    bench.device.lock().unwrap().pause();
    assert!(begin.elapsed() >= 2 * SHORT);
    assert!(bench.needs_reset());
}

#[test]
fn the_transport_reads_used_buffers_as_pending_until_the_reset() {
    use virtio_bindings::virtio_mmio::{
        VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS,
    };
    let (_backend, socket) = agreeable();
    let mut bench = bench(socket);
    let device = bench.device.clone();
    let mut transport = crate::mmio::Transport::new(device, bench.interrupt.clone(), bench.memory.clone());
    let status = |transport: &mut crate::mmio::Transport| {
        let mut data = [0; 4];
        transport.read(u64::from(VIRTIO_MMIO_INTERRUPT_STATUS), &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(status(&mut transport), 0);
    bench.activate(1 << 32).unwrap();
    transport.write(u64::from(VIRTIO_MMIO_INTERRUPT_ACK), &USED_BUFFER.to_le_bytes());
    assert_eq!(status(&mut transport), USED_BUFFER);
    transport.write(u64::from(VIRTIO_MMIO_STATUS), &[0; 4]);
    assert_eq!(status(&mut transport), 0);
}

#[test]
fn a_backend_that_goes_takes_the_device_along() {
    let (mut backend, socket) = except(FrontendReq::RESET_DEVICE, || Answer::HangUp);
    let mut bench = bench(socket.try_clone().unwrap());
    bench.activate(1 << 32).unwrap();
    bench.settle();
    assert!(!bench.needs_reset());
    // The backend's thread reads our end's end, as a dying process' socket would be closed for it.
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    backend.thread.take().unwrap().join().unwrap();
    bench.settle();
    assert!(bench.needs_reset() && bench.interrupted());
    assert_eq!(counted(&bench, "hang_ups"), 1);
    bench.device.lock().unwrap().reset();
    assert!(bench.activate(1 << 32).is_err());
    assert_eq!(bench.turn(0), 0, "its end is no news for ever");
}

#[test]
fn a_failed_pause_asks_for_a_reset() {
    let (_backend, socket) = except(FrontendReq::GET_VRING_BASE, || {
        Answer::Raw(reply(FrontendReq::GET_VRING_BASE, &[9, 0, 0, 0, 0, 0, 0, 0]))
    });
    let mut bench = bench(socket);
    bench.activate(1 << 32).unwrap();
    bench.device.lock().unwrap().pause();
    assert!(bench.needs_reset());
    bench.device.lock().unwrap().resume();
    bench.device.lock().unwrap().reset();
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (pipe, sent) = std::io::pipe().unwrap();
    let answer = std::thread::spawn(move || {
        let mut message = [0; 24];
        theirs.read_exact(&mut message).unwrap();
        let answer = number(FrontendReq::GET_FEATURES, 0);
        let sent = File::from(OwnedFd::from(sent));
        theirs.send_with_fds(&[answer.as_slice()], &[std::os::fd::AsRawFd::as_raw_fd(&sent)]).unwrap();
        theirs
    });
    assert_eq!(Fs::new("x", ours, 1).err().unwrap().kind(), std::io::ErrorKind::Unsupported);
    answer.join().unwrap();
    // With every copy of the writing end closed, the pipe is at its end.
    let (done, ended) = mpsc::channel();
    std::thread::spawn(move || done.send((&pipe).read(&mut [0]).unwrap()));
    assert_eq!(ended.recv_timeout(Duration::from_secs(5)), Ok(0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a backend answers to the questions at the beginning, the device is there or is not.
    #[test]
    fn no_answer_breaks_it(bytes in prop::collection::vec(any::<u8>(), 0..64), at in 0u32..3, shaped: bool) {
        let at = [FrontendReq::GET_FEATURES, FrontendReq::GET_PROTOCOL_FEATURES, FrontendReq::GET_QUEUE_NUM]
            [at as usize];
        let mut once = Some(if shaped { reply(at, &bytes) } else { bytes });
        let (_backend, socket) =
            except(at, move || once.take().map_or(Answer::HangUp, Answer::Raw));
        let _ = Fs::with_patience("share", socket, 1, Duration::from_millis(5), SHORT);
    }
}
