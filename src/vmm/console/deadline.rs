// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long the end of a machine waits for those who read what it writes: a second for all of them
//! together, from the stop on.

use std::sync::MutexGuard;
use std::time::{Duration, Instant};
use twostage::sync::Mutex;

/// When the machine of this process was stopped, once it was.
static STOPPED: Mutex<Option<Instant>> = Mutex::new(None);

/// Whoever has their turn late, because the host took long, has so much all the same.
const LEAST: Duration = Duration::from_millis(100);

/// Whose turn it is; the turns follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// What the guest wrote.
    Output,
    /// The last report.
    Report,
    /// What there is to say.
    End,
}

impl Turn {
    /// How long after the stop it is over.
    fn length(self) -> Duration {
        Duration::from_millis(match self {
            Self::Output => 800,
            Self::Report => 900,
            Self::End => 1000,
        })
    }

    fn over(self, stopped: Instant, now: Instant) -> Instant {
        (stopped + self.length()).max(now + LEAST)
    }
}

/// The machine is stopped: the time runs, unless it does already.
pub(crate) fn begin() {
    stopped().get_or_insert_with(Instant::now);
}

/// There is another machine.
pub(crate) fn clear() {
    *stopped() = None;
}

/// When the turn is over, if the machine was stopped.
pub(crate) fn of(turn: Turn) -> Option<Instant> {
    stopped().map(|stopped| turn.over(stopped, Instant::now()))
}

/// When something that is not to be waited for, but may not be ready at once, is given up.
pub(crate) fn soon() -> Instant {
    Instant::now() + LEAST
}

fn stopped() -> MutexGuard<'static, Option<Instant>> {
    STOPPED.lock()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_turns_together_take_a_second() {
        let stopped = Instant::now();
        let mut now = stopped;
        for turn in [Turn::Output, Turn::Report, Turn::End] {
            // Each waits as long as it may.
            let over = turn.over(stopped, now);
            assert!(over > now, "{turn:?}");
            now = over;
        }
        assert_eq!(now, stopped + Duration::from_secs(1));
        // One that comes late has time to say something.
        let late = stopped + Duration::from_secs(5);
        assert_eq!(Turn::End.over(stopped, late), late + LEAST);
    }
}
