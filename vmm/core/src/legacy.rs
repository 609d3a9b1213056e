//! What is left of the PC: a serial port, a clock, and the keyboard controller's reset line.
//! Knows port numbers; knows nothing of KVM.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use vm_superio::{I8042Device, Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// Ports of the first serial port (16550).
const SERIAL: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;
/// Index and data of the real-time clock (MC146818).
const CMOS_INDEX: u16 = 0x70;
const CMOS_DATA: u16 = 0x71;
/// Data and command of the keyboard controller (i8042).
const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;

/// Lines of the console that are kept for a panic's report, and bytes of each.
const KEPT_LINES: usize = 24;
const KEPT_BYTES: usize = 512;
/// How Linux begins the report of a panic (kernel/panic.c).
const PANIC: &str = "Kernel panic - not syncing";

/// An eventfd as vm-superio wants it.
pub(crate) struct Line(pub(crate) EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// What became of the guest's console, and whether it told of a panic.
#[derive(Debug, Default)]
pub(crate) struct ConsoleLog {
    line: Vec<u8>,
    last: VecDeque<String>,
    panic: Option<String>,
}

impl ConsoleLog {
    /// The line by which the guest's kernel said that it panicked.
    pub(crate) fn panic(&self) -> Option<&str> {
        self.panic.as_deref()
    }

    /// The last lines of the console.
    pub(crate) fn last(&self) -> Vec<String> {
        self.last.iter().cloned().collect()
    }

    fn push(&mut self, byte: u8) {
        if byte != b'\n' {
            if self.line.len() < KEPT_BYTES {
                self.line.push(byte);
            }
            return;
        }
        // Control characters of a guest must not reach a terminal, nor swell sixfold in a message.
        let text = String::from_utf8_lossy(&self.line);
        let text: String = text
            .trim_end()
            .chars()
            .map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c })
            .collect();
        self.line.clear();
        if let Some(at) = text.find(PANIC) {
            // The first one: others may follow from it.
            self.panic.get_or_insert_with(|| text[at..].to_owned());
        }
        if self.last.len() == KEPT_LINES {
            self.last.pop_front();
        }
        self.last.push_back(text);
    }
}

/// The console's log, shared by who writes it and who looks for a panic.
pub(crate) type SharedLog = Arc<Mutex<ConsoleLog>>;

/// The serial port's other end: the process's standard output, line by line, without ever waiting.
pub(crate) struct Console {
    out: Box<dyn Write + Send>,
    log: SharedLog,
    pending: Vec<u8>,
}

impl Console {
    /// A console that is shown on `out`, which must not block.
    pub(crate) fn new(out: Box<dyn Write + Send>) -> (Self, SharedLog) {
        let log = SharedLog::default();
        (Self { out, log: log.clone(), pending: Vec::new() }, log)
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        for &byte in bytes {
            log.push(byte);
            self.pending.push(byte);
            if byte == b'\n' || self.pending.len() >= KEPT_BYTES {
                // Nobody reads, or too slowly: what does not fit is lost. The guest never waits for it.
                let _ = self.out.write(&self.pending);
                self.pending.clear();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// All port I/O of the machine.
pub(crate) struct Ports {
    serial: Serial<Line, vm_superio::serial::NoEvents, Console>,
    clock: Clock,
    keyboard: I8042Device<Line>,
}

impl Ports {
    /// The ports; `irq` is the serial port's line, and `reset` is written when the guest asks for a reset.
    pub(crate) fn new(irq: EventFd, reset: EventFd, console: Console) -> Self {
        Self {
            serial: Serial::new(Line(irq), console),
            clock: Clock::default(),
            keyboard: I8042Device::new(Line(reset)),
        }
    }

    /// The guest reads. Ports without a device read as ones.
    pub(crate) fn read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let [byte] = data else { return };
        *byte = match port {
            p if SERIAL.contains(&p) => self.serial.read((p - SERIAL.start()) as u8),
            CMOS_DATA => self.clock.read(SystemTime::now()),
            KEYBOARD_DATA | KEYBOARD_COMMAND => self.keyboard.read((port - KEYBOARD_DATA) as u8),
            _ => return,
        };
    }

    /// The guest writes. Ports without a device swallow it.
    pub(crate) fn write(&mut self, port: u16, data: &[u8]) {
        let [byte] = *data else { return };
        match port {
            // What it cannot do is to raise its line, whose counter is then at its limit: it is up.
            p if SERIAL.contains(&p) => drop(self.serial.write((p - SERIAL.start()) as u8, byte)),
            CMOS_INDEX => self.clock.select(byte),
            KEYBOARD_DATA | KEYBOARD_COMMAND => {
                drop(self.keyboard.write((port - KEYBOARD_DATA) as u8, byte));
            }
            _ => {}
        }
    }
}

/// The real-time clock: the host's time in UTC, which cannot be set (MC146818 data sheet; registers in BCD).
/// A guest that looks for one and finds none polls 20,000 times.
#[derive(Debug, Default)]
struct Clock {
    index: u8,
}

impl Clock {
    fn select(&mut self, index: u8) {
        // Bit 7 masks the NMI, of which there is none.
        self.index = index & 0x7f;
    }

    fn read(&self, now: SystemTime) -> u8 {
        let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let (day, time) = (seconds / 86_400, seconds % 86_400);
        let (year, month, date) = civil(day);
        match self.index {
            0x00 => bcd(time % 60),
            0x02 => bcd(time / 60 % 60),
            0x04 => bcd(time / 3600),
            // 1 January 1970 was a Thursday; Sunday is 1.
            0x06 => bcd((day + 4) % 7 + 1),
            0x07 => bcd(date),
            0x08 => bcd(month),
            0x09 => bcd(year % 100),
            0x32 => bcd(year / 100),
            // A: 32 kHz divider, no update in progress. B: 24 hours. D: the battery is good.
            0x0a => 0x26,
            0x0b => 0x02,
            0x0d => 0x80,
            _ => 0,
        }
    }
}

fn bcd(n: u64) -> u8 {
    (((n / 10 % 10) << 4) | (n % 10)) as u8
}

/// Year, month and day of a number of days since 1 January 1970 in the Gregorian calendar: whole periods of
/// 400 years of 146,097 days, counted from 1 March, so that the leap day comes last.
fn civil(day: u64) -> (u64, u64, u64) {
    let day = day + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, date)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn ports() -> (Ports, SharedLog, EventFd) {
        let (console, log) = Console::new(Box::new(io::sink()));
        let reset = EventFd::new(EFD_NONBLOCK).unwrap();
        let ports = Ports::new(EventFd::new(EFD_NONBLOCK).unwrap(), reset.try_clone().unwrap(), console);
        (ports, log, reset)
    }

    #[test]
    fn dates_are_right_across_leap_years() {
        for (day, expected) in [
            (0, (1970, 1, 1)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (20_778, (2026, 11, 21)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(civil(day), expected);
        }
    }

    #[test]
    fn the_clock_tells_the_time_in_bcd() {
        // 2026-11-21 20:07:47, a Saturday.
        let now = UNIX_EPOCH + Duration::from_secs(20_778 * 86_400 + 20 * 3600 + 7 * 60 + 47);
        let mut clock = Clock::default();
        let mut read = |index| {
            clock.select(index | 0x80);
            clock.read(now)
        };
        assert_eq!(
            [0u8, 2, 4, 6, 7, 8, 9, 0x32].map(&mut read),
            [0x47, 0x07, 0x20, 0x07, 0x21, 0x11, 0x26, 0x20]
        );
        assert_eq!(read(0x0a) & 0x80, 0, "never in an update");
    }

    #[test]
    fn a_panic_on_the_console_is_noticed() {
        let (mut ports, log, _) = ports();
        for &byte in b"[    0.1] Kernel panic - not syncing: Attempted to kill init!\r\nKernel panic - not syncing: 2\n" {
            ports.write(0x3f8, &[byte]);
        }
        let log = log.lock().unwrap();
        assert_eq!(log.panic(), Some("Kernel panic - not syncing: Attempted to kill init!"));
        assert_eq!(log.last.len(), 2);
    }

    #[test]
    fn control_characters_are_made_harmless() {
        let (mut ports, log, _) = ports();
        for &byte in b"a\x1b[2Jb\n" {
            ports.write(0x3f8, &[byte]);
        }
        assert_eq!(log.lock().unwrap().last(), ["a\u{fffd}[2Jb"]);
    }

    #[test]
    fn an_endless_line_is_bounded() {
        let (mut ports, log, _) = ports();
        for _ in 0..10_000 {
            ports.write(0x3f8, b"x");
        }
        ports.write(0x3f8, b"\n");
        assert_eq!(log.lock().unwrap().last[0].len(), KEPT_BYTES);
    }

    #[test]
    fn the_keyboard_controller_resets() {
        let (mut ports, _, reset) = ports();
        ports.write(0x64, &[0xfe]);
        assert!(reset.read().is_ok());
    }

    #[test]
    fn nothing_else_answers() {
        let (mut ports, ..) = ports();
        for port in [0u16, 0x20, 0x60 + 1, 0xcf8, 0xffff] {
            let mut data = [0; 4];
            ports.read(port, &mut data);
            assert_eq!(data, [0xff; 4]);
            ports.write(port, &[1, 2, 3, 4]);
        }
    }
}
