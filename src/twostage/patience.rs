// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How tests wait for what another thread or process does: by looking again, with a limit in real
//! time that a machine with much else to do keeps, too.

use std::time::{Duration, Instant};

/// What tests wait at the most.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `over`.
///
/// # Panics
///
/// When [`PATIENCE`] is over, with `what` was waited for.
#[track_caller]
pub fn wait_until(what: &str, mut over: impl FnMut() -> bool) {
    wait_for(what, || over().then_some(()));
}

/// Waits until `look` finds something.
///
/// # Panics
///
/// When [`PATIENCE`] is over, with `what` was waited for.
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
