// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How tests wait for another thread or process: by polling, with a limit in real time that
//! suffices on a busy machine, too.

use std::time::{Duration, Instant};

/// The time limit of tests.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `over`.
///
/// # Panics
///
/// [`PATIENCE`] is over; the message names `what` was waited for.
#[track_caller]
pub fn wait_until(what: &str, mut over: impl FnMut() -> bool) {
    wait_for(what, || over().then_some(()));
}

/// Waits until `look` returns something.
///
/// # Panics
///
/// [`PATIENCE`] is over; the message names `what` was waited for.
#[track_caller]
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}
