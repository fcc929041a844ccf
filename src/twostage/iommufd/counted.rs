// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A host that counts the calls to another one and reports each to an observer.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::forwarding::Forwarding;
use super::{HostError, HostIommu, ObjectId, Verb};

/// Is called after every host call.
pub trait VerbObserver: Send + Sync {
    /// `verb` took `duration` and failed with `error`, if any. `objects` are those of the call, in
    /// its order, after the one that it created.
    fn called(
        &self,
        verb: Verb,
        objects: &[ObjectId],
        started: Instant,
        duration: Duration,
        error: Option<&dyn fmt::Display>,
    );
}

/// Calls and failures, by verb. Reads are not consistent with each other.
#[derive(Debug, Default)]
pub struct VerbCounters {
    calls: [AtomicU64; Verb::ALL.len()],
    failures: [AtomicU64; Verb::ALL.len()],
}

impl VerbCounters {
    /// Number of calls of `verb`.
    pub fn calls(&self, verb: Verb) -> u64 {
        // A verb's discriminant is its index in ALL, so it is in range.
        self.calls[verb as usize].load(Ordering::Relaxed)
    }

    /// Number of failures of `verb`.
    pub fn failures(&self, verb: Verb) -> u64 {
        self.failures[verb as usize].load(Ordering::Relaxed)
    }

    fn count(&self, verb: Verb, failed: bool) {
        self.calls[verb as usize].fetch_add(1, Ordering::Relaxed);
        if failed {
            self.failures[verb as usize].fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// `inner`, counted.
pub struct CountedHost {
    inner: Arc<dyn HostIommu>,
    counters: Arc<VerbCounters>,
    observer: Option<Arc<dyn VerbObserver>>,
}

impl CountedHost {
    /// Counts the calls to `inner` and reports them to `observer`, if there is one.
    pub fn new(inner: Arc<dyn HostIommu>, observer: Option<Arc<dyn VerbObserver>>) -> Self {
        Self { inner, counters: Arc::default(), observer }
    }

    /// The live counters.
    pub fn counters(&self) -> Arc<VerbCounters> {
        self.counters.clone()
    }
}

impl Forwarding for CountedHost {
    type Inner = dyn HostIommu;

    fn served_by(&self) -> &Self::Inner {
        &*self.inner
    }

    fn call<T, E: From<HostError> + fmt::Display>(
        &self,
        verb: Verb,
        named: &[ObjectId],
        made: fn(&T) -> Option<ObjectId>,
        call: impl FnOnce(&Self::Inner) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let started = self.observer.is_some().then(Instant::now);
        let result = call(&*self.inner);
        self.counters.count(verb, result.is_err());
        if let (Some(observer), Some(started)) = (&self.observer, started) {
            let duration = started.elapsed();
            let new = result.as_ref().ok().and_then(made);
            let objects: Vec<_> = new.into_iter().chain(named.iter().copied()).collect();
            let error = result.as_ref().err().map(|error| error as &dyn fmt::Display);
            observer.called(verb, &objects, started, duration, error);
        }
        result
    }
}

impl fmt::Debug for CountedHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CountedHost").field("inner", &self.inner).finish_non_exhaustive()
    }
}
