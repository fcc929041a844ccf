// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long the end of a machine waits for those who read what it writes: for all of them together,
//! a second from the stop on when somebody asked for it, and ten when the guest came to its end.

use std::sync::MutexGuard;
use std::time::{Duration, Instant};
use twostage::sync::Mutex;

/// The stop of the machine of this process, once it was stopped.
static STOPPED: Mutex<Option<Stop>> = Mutex::new(None);

/// A stop.
#[derive(Debug, Clone, Copy)]
struct Stop {
    at: Instant,
    /// Somebody waits for it.
    asked: bool,
}

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
    /// How long after a stop that was asked for it is over.
    fn length(self) -> Duration {
        Duration::from_millis(match self {
            Self::Output => 800,
            Self::Report => 900,
            Self::End => 1000,
        })
    }

    fn over(self, stop: Stop, now: Instant) -> Instant {
        let length = if stop.asked { self.length() } else { self.length() * 10 };
        (stop.at + length).max(now + LEAST)
    }
}

/// The machine is stopped, and `asked` to: the time runs, unless it does already.
pub(crate) fn begin(asked: bool) {
    stopped().get_or_insert_with(|| Stop { at: Instant::now(), asked });
}

/// There is another machine.
pub(crate) fn clear() {
    *stopped() = None;
}

/// When the turn is over, if the machine was stopped.
pub(crate) fn of(turn: Turn) -> Option<Instant> {
    stopped().map(|stop| turn.over(stop, Instant::now()))
}

/// Who takes nothing for so long is given up.
pub(crate) fn patience() -> Duration {
    match *stopped() {
        Some(Stop { asked: true, .. }) => Duration::from_millis(500),
        _ => Duration::from_secs(1),
    }
}

/// When something that is not to be waited for, but may not be ready at once, is given up.
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
            for turn in [Turn::Output, Turn::Report, Turn::End] {
                // Each waits as long as it may.
                let over = turn.over(stop, now);
                assert!(over > now, "{turn:?}");
                now = over;
            }
            assert_eq!(now, at + Duration::from_secs(seconds));
            // One that comes late has time to say something.
            let late = at + Duration::from_secs(15);
            assert_eq!(Turn::End.over(stop, late), late + LEAST);
        }
    }
}
