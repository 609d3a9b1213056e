//! The frequency of the host's time stamp counter, which the guests of the translator see as theirs.
//! Knows clocks only.

use std::time::{Duration, Instant};

use crate::sys;

/// Where the kernel says which clock it trusts.
const CLOCK_SOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
/// Shorter measurements are not believed. Each end of one is exact to some 0.1 us, so 10 ms give it to
/// some 10 parts in a million; a second of life of the shim gives it to 0.1.
const SHORTEST: Duration = Duration::from_millis(10);

/// A measurement of the frequency that began when this was made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stopwatch {
    began: Option<Reading>,
}

#[derive(Clone, Copy, Debug)]
struct Reading {
    ticks: u64,
    at: Instant,
}

impl Stopwatch {
    /// Begins to measure, if the host trusts its counter: else no guest can.
    pub(super) fn start() -> Self {
        let trusted = std::fs::read_to_string(CLOCK_SOURCE).is_ok_and(|name| name.trim() == "tsc");
        Self { began: trusted.then(read) }
    }

    /// The frequency in kHz by the clock that the host's time is kept with. `None` if the counter is
    /// not to be trusted, or not enough time has passed.
    pub(super) fn khz(&self) -> Option<u32> {
        let began = self.began?;
        let now = read();
        khz(now.ticks.checked_sub(began.ticks)?, now.at.duration_since(began.at))
    }
}

fn khz(ticks: u64, time: Duration) -> Option<u32> {
    if time < SHORTEST {
        return None;
    }
    let khz = (u128::from(ticks) * 1_000_000 + time.as_nanos() / 2) / time.as_nanos();
    u32::try_from(khz).ok().filter(|&khz| khz > 0)
}

/// Both clocks at one moment: of several tries the one that was interrupted least.
fn read() -> Reading {
    let one = || {
        let before = sys::time_stamp_counter();
        let at = Instant::now();
        let after = sys::time_stamp_counter();
        (after.wrapping_sub(before), Reading { ticks: before + after.wrapping_sub(before) / 2, at })
    };
    (0..8).map(|_| one()).min_by_key(|&(width, _)| width).expect("several").1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_is_exact() {
        assert_eq!(khz(2_299_998_000, Duration::from_secs(1)), Some(2_299_998));
        assert_eq!(khz(23_000_000, Duration::from_millis(10)), Some(2_300_000));
        assert_eq!(khz(23_000_000, Duration::from_millis(9)), None, "too short");
        assert_eq!(khz(0, Duration::from_secs(1)), None, "it stands");
        assert_eq!(khz(u64::MAX, Duration::from_millis(10)), None, "too fast for the parameter");
    }

    #[test]
    fn two_measurements_agree() {
        let watch = Stopwatch::start();
        let measure = || {
            std::thread::sleep(Duration::from_millis(50));
            watch.khz()
        };
        // On a host that does not trust its counter both are nothing.
        match (measure(), measure()) {
            (Some(one), Some(two)) => assert!(one.abs_diff(two) < one / 10_000, "{one} {two}"),
            other => assert_eq!(other, (None, None)),
        }
    }
}
