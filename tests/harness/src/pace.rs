//! How much longer everything takes on the machine that tests.
//! Knows no process and no test.

use std::env;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Result, bail};

/// The environment variable that says it: a whole number, 1 where it is not set.
const VARIABLE: &str = "BULKHEAD_TEST_SLOW";

static FACTOR: OnceLock<u32> = OnceLock::new();

/// Reads the environment; every deadline is stretched from then on.
pub(crate) fn read() -> Result<()> {
    let text = env::var(VARIABLE).unwrap_or_default();
    let factor = match text.as_str() {
        "" => 1,
        text => match text.parse() {
            Ok(factor @ 1..=100) => factor,
            _ => bail!("{VARIABLE}={text}: use a whole number from 1 to 100"),
        },
    };
    FACTOR.set(factor).ok();
    Ok(())
}

/// How many times longer a deadline is here than on an ordinary machine.
pub(crate) fn factor() -> u32 {
    FACTOR.get().copied().unwrap_or(1)
}

/// What becomes, on the machine that tests, of a time that is meant for an ordinary machine. Every deadline
/// of this crate goes through it; a test that measures a time itself must use it too.
pub fn stretched(time: Duration) -> Duration {
    time * factor()
}
