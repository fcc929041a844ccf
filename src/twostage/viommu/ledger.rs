// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The decision made for every requester, and whether the host has applied it.
//!
//! The model (one thread at a time) updates it around its host calls; faults, from any thread, are
//! explained by what is published here. A block is published before the host applies it, anything
//! else after, so that the reason of a blocked requester is never older than its blocking. The lock
//! is held for a look-up or an insertion, never across a call.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{RwLockReadGuard, RwLockWriteGuard};

use super::HostSideError;
use crate::counters::Counter;
use crate::ratelimit::RateLimit;
use crate::sync::RwLock;

/// Why a request of the guest must not be acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotApplied {
    /// The host left a requester with a revoked mapping, or failed to invalidate.
    Host,
    /// The virtual IOMMU was halted meanwhile.
    Halted,
}

/// Whether every requester has its policy, or is blocked where the host refused it.
pub(super) type Applied = Result<(), NotApplied>;

/// The decision made for a requester.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Given<D> {
    pub decision: D,
    /// The host has applied it. Otherwise the host refused or lost it, and must be told again.
    pub applied: bool,
}

impl<D> Given<D> {
    /// A decision that the host has applied.
    pub fn applied(decision: D) -> Self {
        Self { decision, applied: true }
    }
}

/// The storage of a model's decisions.
pub(super) trait Entries {
    type Requester: Copy;
    type Decision: Copy + PartialEq;

    /// Whether the decision blocks every request.
    fn is_block(decision: &Self::Decision) -> bool;

    /// The decision for a requester.
    fn get(&self, requester: Self::Requester) -> Option<Given<Self::Decision>>;

    /// Sets the decision. Does nothing for an unknown requester.
    fn set(&mut self, requester: Self::Requester, given: Given<Self::Decision>);

    /// Marks all decisions as not applied by the host.
    fn unapply_all(&mut self);
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Ledger<E> {
    published: RwLock<E>,
    /// How many times the host lost decisions, or left a requester with a revoked mapping. These
    /// are changed by the model only.
    losses: AtomicU64,
    /// How many of them are made up for.
    reapplied: AtomicU64,
}

impl<E> Ledger<E> {
    pub fn read(&self) -> RwLockReadGuard<'_, E> {
        self.published.read()
    }

    pub fn write(&self) -> RwLockWriteGuard<'_, E> {
        self.published.write()
    }

    /// Whether some decision must be given to the host again.
    pub fn has_unapplied(&self) -> bool {
        self.losses() != self.reapplied.load(Ordering::Relaxed)
    }

    /// Sets [`Ledger::has_unapplied`]: the host left a requester with a revoked mapping.
    pub fn set_unapplied(&self) {
        self.losses.fetch_add(1, Ordering::Relaxed);
    }

    /// The number of losses so far, for [`Ledger::set_reapplied`].
    pub fn losses(&self) -> u64 {
        self.losses.load(Ordering::Relaxed)
    }

    /// The host has all decisions again that it lost in the first `losses` losses: read before the
    /// first decision was given again, as there may have been more meanwhile.
    pub fn set_reapplied(&self, losses: u64) {
        self.reapplied.store(losses, Ordering::Relaxed);
    }
}

impl<E: Entries> Ledger<E> {
    /// The decision for `requester`.
    pub fn given(&self, requester: E::Requester) -> Option<Given<E::Decision>> {
        self.read().get(requester)
    }

    /// Whether the host has applied `decision` for `requester`.
    pub fn has(&self, requester: E::Requester, decision: E::Decision) -> bool {
        self.given(requester) == Some(Given::applied(decision))
    }

    /// The host may have lost any decision.
    pub fn unapply_all(&self) {
        self.write().unapply_all();
        self.set_unapplied();
    }

    /// Gives `decision` to the host with `configure`; `None` if the host has it already. If the
    /// host refuses, the requester is blocked: with `refused`, unless `decision` is itself a block.
    pub fn give(
        &self,
        requester: E::Requester,
        decision: E::Decision,
        refused: E::Decision,
        configure: impl FnOnce() -> Result<(), HostSideError>,
    ) -> Option<Result<(), HostSideError>> {
        if self.has(requester, decision) {
            return None;
        }
        let is_block = E::is_block(&decision);
        if is_block {
            self.set(requester, Given::applied(decision));
        }
        let result = configure();
        match &result {
            Ok(()) => self.set(requester, Given::applied(decision)),
            Err(_) => {
                let decision = if is_block { decision } else { refused };
                self.set(requester, Given { decision, applied: false });
            }
        }
        Some(result)
    }

    fn set(&self, requester: E::Requester, given: Given<E::Decision>) {
        self.write().set(requester, given);
    }
}

/// Counts in `errors` and logs a refusal of the host to `model`. A mere refusal counts as applied,
/// as the requester is blocked; a failure to block does not.
pub(super) fn host_refused(
    model: impl fmt::Display,
    errors: &Counter,
    log: &RateLimit,
    error: &HostSideError,
) -> Applied {
    errors.count();
    log.warn(format_args!("{model}: the host refused: {error}"));
    if error.still_reachable {
        log.warn(format_args!("{model}: and what it was to block is reachable still"));
        return Err(NotApplied::Host);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;

    /// Decisions are numbers; negative ones are blocks.
    #[derive(Default)]
    struct Numbers(BTreeMap<u8, Option<Given<i8>>>);

    impl Entries for Numbers {
        type Requester = u8;
        type Decision = i8;

        fn is_block(decision: &i8) -> bool {
            *decision < 0
        }

        fn get(&self, requester: u8) -> Option<Given<i8>> {
            self.0.get(&requester).copied().flatten()
        }

        fn set(&mut self, requester: u8, given: Given<i8>) {
            if let Some(place) = self.0.get_mut(&requester) {
                *place = Some(given);
            }
        }

        fn unapply_all(&mut self) {
            self.0.values_mut().flatten().for_each(|given| given.applied = false);
        }
    }

    fn ledger() -> Ledger<Numbers> {
        let ledger = Ledger::<Numbers>::default();
        ledger.write().0.insert(7, None);
        ledger
    }

    fn refusal() -> Result<(), HostSideError> {
        let source = Arc::new(std::io::Error::other("refused"));
        Err(HostSideError { what: "test".into(), still_reachable: false, source })
    }

    #[test]
    fn a_block_is_published_before_the_host_has_it_and_anything_else_after() {
        let ledger = ledger();
        for (decision, then) in [(1, None), (-1, Some(-1)), (2, Some(-1)), (3, Some(2))] {
            let look = || {
                assert_eq!(ledger.given(7).map(|given| given.decision), then);
                Ok(())
            };
            assert!(ledger.give(7, decision, -9, look).is_some_and(|result| result.is_ok()));
            assert!(ledger.has(7, decision));
        }
        assert!(ledger.give(7, 3, -9, || unreachable!("the host has it")).is_none());
        // Unknown.
        assert!(ledger.give(8, 1, -9, || Ok(())).is_some());
        assert_eq!(ledger.given(8), None);
    }

    #[test]
    fn what_is_refused_is_published_as_a_block_and_given_again() {
        let ledger = ledger();
        for (decision, published) in [(1, -9), (-1, -1)] {
            assert!(ledger.give(7, decision, -9, refusal).is_some_and(|it| it.is_err()));
            let given = Given { decision: published, applied: false };
            assert_eq!(ledger.given(7), Some(given));
            assert!(!ledger.has_unapplied(), "it is blocked");
        }
        assert!(ledger.give(7, -1, -9, || Ok(())).is_some());
        assert!(ledger.has(7, -1));
    }

    #[test]
    fn what_the_host_lost_or_does_not_block_is_to_be_given_again() {
        let ledger = ledger();
        assert!(ledger.give(7, 1, -9, || Ok(())).is_some());
        ledger.unapply_all();
        assert!(ledger.has_unapplied() && !ledger.has(7, 1));
        assert!(ledger.give(7, 1, -9, || Ok(())).is_some());
        ledger.set_reapplied(ledger.losses());
        assert!(ledger.has(7, 1) && !ledger.has_unapplied());
        ledger.set_unapplied();
        assert!(ledger.has(7, 1) && ledger.has_unapplied());
        // One more, while the host is given what it lost before.
        let losses = ledger.losses();
        ledger.set_unapplied();
        ledger.set_reapplied(losses);
        assert!(ledger.has_unapplied());
    }
}
