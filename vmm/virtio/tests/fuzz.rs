//! The fuzz targets without a fuzzer: each with its corpus and with mutations of it, the same ones every
//! time. `make fuzz` searches for hours; what it finds belongs into the corpus.
#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    fs,
    path::PathBuf,
};

use bulkhead_virtio::testing::fuzz::{Mutator, TARGETS};

/// Inputs of each target beside its corpus.
const MUTATIONS: usize = 500;

/// Counts what a thread has of the heap: a device and its loop are on one.
struct Counting;

thread_local! {
    static NOW: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // Where a thread ends it has no more counters, and nobody asks.
    let _ = NOW.try_with(|now| {
        now.set(now.get() + bytes);
        PEAK.with(|peak| peak.set(peak.get().max(now.get())));
    });
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The inputs that are kept, in the order of their names.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus").join(target);
    let entries = fs::read_dir(&dir).unwrap_or_else(|e| panic!("no corpus in {}: {e}", dir.display()));
    let mut inputs: Vec<_> = entries
        .map(|e| {
            let path = e.unwrap().path();
            (path.display().to_string(), fs::read(&path).unwrap())
        })
        .collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "no input in {}", dir.display());
    inputs
}

/// What is said of an input that fails.
struct Told<'a>(&'a str, &'a [u8]);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: the input is {:?}", self.0, self.1);
        }
    }
}

fn search(name: &str) {
    let target = TARGETS.iter().find(|t| t.name == name).unwrap();
    let corpus = corpus(name);
    let play = |origin: &str, bytes: &[u8]| {
        let _told = Told(origin, bytes);
        let before = NOW.get();
        PEAK.set(before);
        (target.play)(bytes);
        let needed = (PEAK.get() - before) as usize;
        assert!(needed <= target.heap, "{needed} bytes of the heap, with {} to be had", target.heap);
    };
    for (path, bytes) in &corpus {
        play(path, bytes);
    }
    let mut mutator = Mutator::new(name.bytes().fold(1, |seed, b| seed * 31 + u64::from(b)));
    for n in 0..MUTATIONS {
        let (from, other) = (&corpus[n % corpus.len()].1, &corpus[n * 7 % corpus.len()].1);
        play("a mutation", &mutator.mutate(from, other));
    }
}

#[test]
fn every_target_has_a_test() {
    let names: Vec<&str> = TARGETS.iter().map(|t| t.name).collect();
    assert_eq!(names, ["mmio", "rng", "block", "net", "vsock", "fs", "balloon", "mem", "console"]);
}

macro_rules! tests {
    ($($name:ident),+) => { $(#[test] fn $name() { search(stringify!($name)); })+ };
}

tests!(mmio, rng, block, net, vsock, fs, balloon, mem, console);
