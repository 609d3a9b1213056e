//! A terminal for a test: the test is the person at the keyboard.
//! Knows nothing of what runs on it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::command::{Proc, Run};
use crate::pace::stretched;

/// The keyboard's and screen's side of a terminal.
pub struct Pty {
    master: File,
    screen: Arc<(Mutex<Screen>, Condvar)>,
}

#[derive(Default)]
struct Screen {
    bytes: Vec<u8>,
    ended: bool,
}

impl Pty {
    /// Starts `program` with `args` on a new terminal of the given size, as the leader of a session whose
    /// controlling terminal it is: only so does a change of the size reach it.
    pub fn spawn(run: impl FnOnce(Run) -> Run, columns: u16, rows: u16) -> Result<(Self, Proc)> {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).context("open a pty")?;
        grantpt(&master).context("grantpt")?;
        unlockpt(&master).context("unlockpt")?;
        let name = ptsname(&master, Vec::new()).context("ptsname")?;
        let slave = open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
            .with_context(|| format!("open {name:?}"))?;
        resize(&master, columns, rows)?;
        let setsid = Run::new("/usr/bin/setsid").arg("--ctty").arg("--");
        let stdout: OwnedFd = slave.try_clone()?;
        let child = run(setsid).on_terminal(slave, stdout).spawn()?;
        let screen = Arc::new((Mutex::new(Screen::default()), Condvar::new()));
        let (mut reader, sink) = (File::from(master.try_clone()?), Arc::clone(&screen));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // EIO is how a pty says that its last holder is gone.
            while let Ok(n) = reader.read(&mut buffer) {
                if n == 0 {
                    break;
                }
                sink.0.lock().unwrap_or_else(|e| e.into_inner()).bytes.extend_from_slice(&buffer[..n]);
                sink.1.notify_all();
            }
            sink.0.lock().unwrap_or_else(|e| e.into_inner()).ended = true;
            sink.1.notify_all();
        });
        Ok((Self { master: File::from(master), screen }, child))
    }

    /// Types `text`.
    pub fn type_keys(&mut self, text: &str) -> Result<()> {
        self.master.write_all(text.as_bytes()).context("type on the terminal")
    }

    /// Changes the window's size.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        resize(&self.master, columns, rows)
    }

    /// Changes the window's size until `text`, which says that the program has noticed, is on the screen.
    ///
    /// ctr begins to listen for changes a moment after it has passed on the first size, and does not say
    /// when: a change that falls into the gap is lost, so it is made again.
    pub fn resize_until(&self, columns: u16, rows: u16, text: &str) -> Result<()> {
        for _ in 0..10 {
            self.resize(columns, rows)?;
            if self.wait_for(text, 6).is_ok() {
                return Ok(());
            }
            self.resize(columns, rows + 1)?;
        }
        self.wait_for(text, 1)
    }

    /// Everything on the screen so far, as text; a line's end is a newline alone, because ctr's terminal
    /// and that of the container each add a carriage return.
    pub fn screen(&self) -> String {
        text(&self.screen.0.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Waits until `text` is on the screen; `seconds` is the deadline.
    pub fn wait_for(&self, text: &str, seconds: u64) -> Result<()> {
        self.wait_until(seconds, &format!("{text:?} on the screen"), |screen| screen.contains(text))
    }

    /// Waits until what is on the screen satisfies `done`, which `what` describes.
    pub fn wait_until(&self, seconds: u64, what: &str, done: impl Fn(&str) -> bool) -> Result<()> {
        let time = stretched(Duration::from_secs(seconds));
        let until = Instant::now() + time;
        let mut screen = self.screen.0.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            let text = text(&screen);
            if done(&text) {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || screen.ended {
                let why = if screen.ended { "the terminal was closed" } else { "the time is up" };
                bail!("waited {time:?} for {what}: {why}; the screen shows {text:?}");
            }
            screen = self.screen.1.wait_timeout(screen, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }
}

fn text(screen: &Screen) -> String {
    String::from_utf8_lossy(&screen.bytes).replace('\r', "")
}

fn resize(fd: impl AsFd, columns: u16, rows: u16) -> Result<()> {
    let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(fd, size).context("set the terminal's size")
}
