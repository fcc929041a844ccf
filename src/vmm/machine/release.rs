// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Releasing what a machine used, for a limited time: a guest decides how many objects the host
//! has for it.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::process::stop::StopReason;

/// Polling interval for signals.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// The outcome of the work.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Released<T> {
    /// It was finished, with this result.
    All(T),
    /// The deadline passed. The rest is left to the end of the process.
    TimedOut,
    /// This signal came. The rest is left to the end of the process.
    Interrupted(i32),
    /// The thread panicked: a bug.
    Panicked,
}

/// Runs `work` in its own thread, until it is finished, `deadline` passes or `signal` returns one.
///
/// Without a thread the work is abandoned at once.
pub(super) fn release<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
    deadline: Option<Instant>,
    signal: impl Fn() -> Option<i32>,
) -> Released<T> {
    let (sender, result) = mpsc::channel();
    let thread = thread::Builder::new().name("release".into());
    // Nobody receives the result of a thread that was abandoned.
    if let Err(error) = thread.spawn(move || drop(sender.send(work()))) {
        log::warn!("no thread releases the host's objects: {error}");
        return Released::TimedOut;
    }
    loop {
        match result.recv_timeout(BETWEEN_LOOKS) {
            Ok(result) => return Released::All(result),
            Err(RecvTimeoutError::Disconnected) => return Released::Panicked,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Some(signal) = signal() {
            return Released::Interrupted(signal);
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Released::TimedOut;
        }
    }
}

impl<T> Released<T> {
    /// The result, if the work was finished.
    pub fn all(&self) -> Option<&T> {
        match self {
            Self::All(result) => Some(result),
            Self::TimedOut | Self::Interrupted(_) | Self::Panicked => None,
        }
    }

    /// The reason why the machine stopped, which was `reason` until now.
    pub fn reason(&self, reason: StopReason) -> StopReason {
        match (self, &reason) {
            // It must not start again: the objects are still there.
            (Self::Interrupted(signal), StopReason::Reset(_)) => StopReason::Signal(*signal),
            (Self::Panicked, _) => {
                StopReason::Software("releasing the host's objects panicked".to_owned())
            }
            _ => reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::stop::ResetCause;
    use twostage::patience::PATIENCE;

    const NONE: fn() -> Option<i32> = || None;

    /// Work that ends with the test.
    fn endless() -> (mpsc::Sender<()>, impl FnOnce() + Send + 'static) {
        let (end, ended) = mpsc::channel();
        let work = move || {
            // Fails when the test ends.
            let _ = ended.recv();
        };
        (end, work)
    }

    #[test]
    fn finished_work_has_its_result() {
        let deadline = Some(Instant::now() + PATIENCE);
        let released = release(|| 7, deadline, NONE);
        assert_eq!((released.all(), &released), (Some(&7), &Released::All(7)));
    }

    #[test]
    fn endless_work_ends_with_the_deadline_or_a_signal() {
        let (_end, work) = endless();
        assert_eq!(release(work, Some(Instant::now()), NONE), Released::TimedOut);
        let (_end, work) = endless();
        assert_eq!(release(work, None, || Some(15)), Released::Interrupted(15));
    }

    #[test]
    fn a_panic_is_a_bug() {
        let panics = || -> u8 { panic!("of the test") };
        let released = release(panics, None, NONE);
        assert_eq!(released, Released::Panicked);
        assert!(matches!(released.reason(StopReason::PowerOff), StopReason::Software(_)));
    }

    #[test]
    fn an_interrupted_machine_does_not_start_again() {
        let reset = StopReason::Reset(ResetCause::ResetRegister);
        let (interrupted, timed_out) = (Released::<()>::Interrupted(15), Released::<()>::TimedOut);
        assert_eq!(interrupted.reason(reset.clone()), StopReason::Signal(15));
        assert_eq!(interrupted.reason(StopReason::PowerOff), StopReason::PowerOff);
        assert_eq!(timed_out.reason(reset.clone()), reset);
    }
}
