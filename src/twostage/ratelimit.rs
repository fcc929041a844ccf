// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rate limiting of log lines that a guest can cause: a burst, then only the number of suppressed
//! lines.

use crate::sync::Mutex;
use std::fmt;
use std::time::{Duration, Instant};

/// Lines allowed in one [`WINDOW`].
const BURST: u32 = 10;
const WINDOW: Duration = Duration::from_secs(5);

/// Allows a burst of lines, then suppresses them until the window has passed.
#[derive(Debug, Default)]
pub struct RateLimit {
    window: Mutex<Option<Window>>,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    start: Instant,
    lines: u32,
}

/// Logs a warning that a guest can provoke repeatedly. Each call site has a limit of its own, for
/// all machines of the process.
#[macro_export]
macro_rules! warn_limited {
    ($($line:tt)*) => {{
        static LIMIT: $crate::ratelimit::RateLimit = $crate::ratelimit::RateLimit::new();
        LIMIT.warn(format_args!($($line)*));
    }};
}

/// What to do with a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Log it; this many were suppressed before it.
    Log(u32),
    Drop,
}

impl RateLimit {
    /// An unused limit.
    pub const fn new() -> Self {
        Self { window: Mutex::new(None) }
    }

    /// Logs a warning about the guest or the host, if the limit allows.
    pub fn warn(&self, line: fmt::Arguments<'_>) {
        match self.admit(Instant::now()) {
            Verdict::Log(0) => log::warn!("{line}"),
            Verdict::Log(dropped) => log::warn!("{line} ({dropped} earlier lines were suppressed)"),
            Verdict::Drop => {}
        }
    }

    fn admit(&self, now: Instant) -> Verdict {
        let mut window = self.window.lock();
        match &mut *window {
            Some(current) if now.saturating_duration_since(current.start) < WINDOW => {
                current.lines = current.lines.saturating_add(1);
                if current.lines > BURST {
                    return Verdict::Drop;
                }
                Verdict::Log(0)
            }
            over => {
                let dropped = over.map_or(0, |window| window.lines.saturating_sub(BURST));
                *over = Some(Window { start: now, lines: 1 });
                Verdict::Log(dropped)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_rest_is_counted() {
        let limit = RateLimit::default();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limit.admit(start), Verdict::Log(0));
        }
        assert_eq!(limit.admit(start), Verdict::Drop);
        assert_eq!(limit.admit(start + WINDOW / 2), Verdict::Drop);
        assert_eq!(limit.admit(start + WINDOW), Verdict::Log(2));
        assert_eq!(limit.admit(start + 2 * WINDOW), Verdict::Log(0));
    }
}
