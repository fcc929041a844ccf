// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long the end of a machine waits for slow readers and for the host: in total, a second after
//! a requested stop, and ten seconds after the guest ended by itself.

use std::sync::MutexGuard;
use std::time::{Duration, Instant};
use twostage::sync::Mutex;

/// The stop of this process's machine, if it was stopped.
static STOPPED: Mutex<Option<Stop>> = Mutex::new(None);

/// A stop.
#[derive(Debug, Clone, Copy)]
struct Stop {
    at: Instant,
    /// It was requested, so somebody waits for it.
    asked: bool,
}

/// The minimum for each turn, if earlier ones took too long.
const LEAST: Duration = Duration::from_millis(100);

/// Steps that may take long, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// The guest's output.
    Output,
    /// Releasing the host's objects.
    Release,
    /// The last report.
    Report,
    /// Final messages.
    End,
}

impl Turn {
    /// The end of the turn, relative to a requested stop.
    fn length(self) -> Duration {
        Duration::from_millis(match self {
            Self::Output => 700,
            Self::Release => 800,
            Self::Report => 900,
            Self::End => 1000,
        })
    }

    fn over(self, stop: Stop, now: Instant) -> Instant {
        let length = if stop.asked { self.length() } else { self.length() * 10 };
        (stop.at + length).max(now + LEAST)
    }
}

/// The machine is stopped, and by request if `asked`: starts the clock, unless it is running.
pub(crate) fn begin(asked: bool) {
    stopped().get_or_insert_with(|| Stop { at: Instant::now(), asked });
}

/// A new machine starts.
pub(crate) fn clear() {
    *stopped() = None;
}

/// The end of the turn, if the machine was stopped.
pub(crate) fn of(turn: Turn) -> Option<Instant> {
    stopped().map(|stop| turn.over(stop, Instant::now()))
}

/// The limit for a reader without progress.
pub(crate) fn patience() -> Duration {
    match *stopped() {
        Some(Stop { asked: true, .. }) => Duration::from_millis(500),
        _ => Duration::from_secs(1),
    }
}

/// The deadline for something that is not waited for, but may need a moment.
pub(crate) fn soon() -> Instant {
    Instant::now() + LEAST
}

fn stopped() -> MutexGuard<'static, Option<Stop>> {
    STOPPED.lock()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_turns_together_take_so_long() {
        let at = Instant::now();
        for (asked, seconds) in [(true, 1), (false, 10)] {
            let (stop, mut now) = (Stop { at, asked }, at);
            for turn in [Turn::Output, Turn::Release, Turn::Report, Turn::End] {
                // Each waits as long as allowed.
                let over = turn.over(stop, now);
                assert!(over > now, "{turn:?}");
                now = over;
            }
            assert_eq!(now, at + Duration::from_secs(seconds));
            // A late one still has the minimum.
            let late = at + Duration::from_secs(15);
            assert_eq!(Turn::End.over(stop, late), late + LEAST);
        }
    }
}
