// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tables that came to serve a requester, and nobody was told.
//!
//! Without caching mode (CAP.CM, §6.1) nothing is cached of entries that are not present or
//! programmed wrongly: software changes them to others and tells nobody, and the next request goes
//! by what they are then. So a request of a requester that its tables blocked is not blocked before
//! they have been read again. What served the requester, and may be cached, is not looked at.
//!
//! A request costs one look at the tables, whoever makes how many: only those that find themselves
//! served take the lock of the registers, for less than a slice of what others do.

use super::apply::is_blocked;
use super::VtdIommu;
use crate::viommu::vtd::requesters::Given;
use crate::viommu::Requester;

impl VtdIommu {
    /// See [`crate::viommu::vtd::FaultTarget::served_late`].
    pub(super) fn find_served(&self, requester: Requester) -> bool {
        if self.caps.cap.cm() || self.is_halted() {
            return false;
        }
        let Some(standing) = self.requesters.standing(requester) else { return false };
        // Another thread may have found it, and what is published as served is the host's already.
        if !standing.translating || is_served(standing.given) {
            return standing.translating;
        }
        if is_blocked(&self.tables(standing.root).config(requester)) {
            return false;
        }
        // Who asks holds others up while it waits: for its turn, and not until a command is done.
        // What is given here is taken away again by one that is yet to come to it, ...
        let registers = self.lock();
        // All may have changed since, and the function may be gone.
        let Some(standing) = self.requesters.standing(requester) else { return false };
        if !standing.translating || self.is_halted() {
            return false;
        }
        // ... and must not be given where translation is disabled already but for the last word.
        if !is_served(standing.given) && !self.under_way().has_disabled(requester) {
            // Who asks is told what came of it; to the guest nothing is acknowledged.
            let _ = self.reevaluate_requester(requester, registers.root);
        }
        let served = is_served(self.requesters.given(requester));
        self.counters.found_served.add(served.into());
        served
    }
}

/// Whether the requester was given something else than to be blocked, and the host has it.
fn is_served(given: Option<Given>) -> bool {
    given.is_some_and(|given| given.applied && !is_blocked(&given.decision))
}
