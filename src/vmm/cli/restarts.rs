// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Between two lives of a machine (`--on-reset restart`).

use std::time::{Duration, Instant};

use crate::config::{MachineConfig, SerialConfig};
use crate::devices::virtio::none_is_left_behind;
use crate::process::signals;

/// After a shorter life of a machine, the restart waits.
const SHORT: Duration = Duration::from_secs(1);
/// The wait after the first short life.
const FIRST: Duration = Duration::from_millis(125);
/// The maximum wait.
const LONGEST: Duration = Duration::from_secs(8);

/// The wait before a restart, for machines that keep resetting themselves: doubles with each short
/// life; a longer one resets it.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    last: Duration,
    next: Duration,
}

impl Backoff {
    /// Runs and times one life.
    pub fn time<T>(&mut self, life: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = life();
        self.ended_after(started.elapsed());
        result
    }

    fn ended_after(&mut self, life: Duration) {
        self.last = life;
        self.next = match life < SHORT {
            true => self.next.saturating_mul(2).clamp(FIRST, LONGEST),
            false => Duration::ZERO,
        };
    }

    /// Waits, if it is due; a signal ends the wait and is left for the next life.
    pub fn wait(&self) {
        if self.next.is_zero() {
            return;
        }
        log::warn!(
            "the guest reset the machine after {} ms; it starts again in {} ms",
            self.last.as_millis(),
            self.next.as_millis()
        );
        signals::sleep(self.next);
    }
}

/// The old machine's devices may still hold resources such as a disk's lock: waits for their
/// threads. Returns the signal if one that ends the machine came.
pub(super) fn wait_for_devices() -> Option<i32> {
    if !none_is_left_behind() {
        log::warn!("device threads are waiting for the host: the machine restarts when they end");
    }
    signals::wait_until(none_is_left_behind)
}

/// A restarted machine appends to its files.
pub(super) fn continue_output(config: &mut MachineConfig) {
    if let SerialConfig::File(path) = &config.serial {
        config.serial = SerialConfig::Append(path.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_lives_are_ever_further_apart() {
        let mut backoff = Backoff::default();
        let mut after = |milliseconds| {
            backoff.ended_after(Duration::from_millis(milliseconds));
            backoff.next.as_millis()
        };
        let waits: Vec<_> = [5, 999, 0, 7, 0, 0, 0, 0, 1000, 1].map(&mut after).into();
        assert_eq!(waits, [125, 250, 500, 1000, 2000, 4000, 8000, 8000, 0, 125]);
    }
}
