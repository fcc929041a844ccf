// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A host whose n-th call fails: a test aid, like Linux's `fail-nth`.
//!
//! Run a scenario with `n` = 1, 2, 3… until the failure is not reached, and check each time for
//! leaks and panics.

use crate::sync::Mutex;
use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use super::forwarding::Forwarding;
use super::{Errno, HostError, HostIommu, ObjectId, Verb};

/// `inner`, with calls that fail without reaching it. For tests.
#[derive(Debug)]
pub struct FailNth<H: HostIommu + ?Sized> {
    inner: Arc<H>,
    calls: AtomicU64,
    /// The pending failure.
    failing: Mutex<Option<Failure>>,
}

/// The failing calls, by the numbers of the first and the last, counted from 1 over the life of the
/// value, and their error.
#[derive(Debug, Clone, Copy)]
struct Failure {
    first: u64,
    last: u64,
    errno: Errno,
}

impl<H: HostIommu + ?Sized> FailNth<H> {
    /// Passes every call on to `inner` by default.
    pub fn new(inner: Arc<H>) -> Self {
        Self { inner, calls: AtomicU64::new(0), failing: Mutex::new(None) }
    }

    /// Makes the `n`-th verb from now on (1 is the next) fail with `errno`, once. Replaces an
    /// earlier request; 0 only cancels it.
    pub fn fail_nth(&self, n: u64, errno: Errno) {
        let last = self.calls.load(Ordering::SeqCst) + n;
        *self.failing() = (n != 0).then_some(Failure { first: last, last, errno });
    }

    /// Makes the next `count` verbs fail with `errno`. Replaces an earlier request.
    pub fn fail_next(&self, count: u64, errno: Errno) {
        let calls = self.calls.load(Ordering::SeqCst);
        let failure = Failure { first: calls + 1, last: calls + count, errno };
        *self.failing() = (count != 0).then_some(failure);
    }

    /// Whether the requested failure is still pending.
    pub fn is_armed(&self) -> bool {
        self.failing().is_some()
    }

    /// Number of verbs called, including failed ones.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// The host behind it.
    pub fn inner(&self) -> &Arc<H> {
        &self.inner
    }

    fn failing(&self) -> std::sync::MutexGuard<'_, Option<Failure>> {
        self.failing.lock()
    }
}

impl<H: HostIommu + ?Sized> Forwarding for FailNth<H> {
    type Inner = H;

    fn served_by(&self) -> &H {
        &self.inner
    }

    /// Counts the call, and fails it if it is due.
    fn call<T, E: From<HostError> + Display>(
        &self,
        verb: Verb,
        named: &[ObjectId],
        _made: fn(&T) -> Option<ObjectId>,
        call: impl FnOnce(&H) -> Result<T, E>,
    ) -> Result<T, E> {
        let number = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let mut failing = self.failing();
        if let Some(Failure { last, errno, .. }) =
            failing.filter(|failure| (failure.first..=failure.last).contains(&number))
        {
            if number == last {
                *failing = None;
            }
            let object = named.first().copied();
            return Err(HostError::new(verb, object, errno, "injected failure").into());
        }
        drop(failing);
        call(&self.inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommufd::fake::RecordingHost;
    use crate::iommufd::{Extensions, InvalidateData};

    fn host() -> Arc<RecordingHost> {
        RecordingHost::new(Extensions::default())
    }

    #[test]
    fn only_the_nth_call_fails_and_does_not_reach_the_host() {
        let inner = host();
        let host = FailNth::new(inner.clone());
        host.fail_nth(2, Errno::ENOMEM);
        host.ioas_alloc().unwrap();
        let error = host.ioas_alloc().unwrap_err();
        assert_eq!((error.verb, error.errno), (Verb::IoasAlloc, Errno::ENOMEM));
        assert!(!host.is_armed());
        assert_eq!(inner.live_objects().len(), 1);
        host.ioas_alloc().unwrap();
        assert_eq!((host.calls(), inner.live_objects().len()), (3, 2));
    }

    #[test]
    fn the_count_starts_when_it_is_asked_for() {
        let host = FailNth::new(host());
        let id = host.ioas_alloc().unwrap();
        host.fail_nth(1, Errno::EIO);
        assert_eq!(host.destroy(id).unwrap_err().errno, Errno::EIO);
        host.destroy(id).unwrap();
        host.fail_nth(1, Errno::EIO);
        host.fail_nth(0, Errno::EIO);
        assert!(!host.is_armed());
        host.ioas_alloc().unwrap();
    }

    #[test]
    fn as_many_calls_fail_as_are_asked_for() {
        let host = FailNth::new(host());
        host.fail_next(2, Errno::EIO);
        for armed in [true, false] {
            assert_eq!(host.ioas_alloc().unwrap_err().errno, Errno::EIO);
            assert_eq!(host.is_armed(), armed);
        }
        host.ioas_alloc().unwrap();
        host.fail_next(0, Errno::EIO);
        assert!(!host.is_armed());
    }

    #[test]
    fn a_failed_invalidation_did_nothing() {
        let host: Arc<dyn HostIommu> = host();
        let host = FailNth::new(host);
        host.fail_nth(1, Errno::ETIMEDOUT);
        let error = host.hwpt_invalidate(ObjectId(1), InvalidateData::VtdS1(&[])).unwrap_err();
        assert_eq!((error.done, error.error.errno), (0, Errno::ETIMEDOUT));
    }
}
