// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tables that start to serve a requester without an invalidation.
//!
//! Without caching mode (CAP.CM, §6.1), entries that are not present or programmed wrongly are not
//! cached: software changes them without an invalidation, and the next request follows the new
//! entry. So before a request of a blocked requester fails, the tables are read again. A requester
//! that is served, whose entries may be cached, is not looked at.
//!
//! Each blocked request costs one read of the tables, however many requests there are and whoever
//! makes them; only those that are found to be served take the lock of the registers, for less than
//! a slice of other work.

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
        // Another thread may have found it, and anything published as served has been applied by
        // the host.
        if !standing.translating || is_served(standing.given) {
            return standing.translating;
        }
        if is_blocked(&self.tables(standing.root).config(requester)) {
            return false;
        }
        // The caller delays others while it waits, so it waits for the lock only, and not for a
        // command to complete. What is configured here is withdrawn by a command that has yet to
        // process the requester, ...
        let registers = self.lock();
        // Everything may have changed since, and the function may be gone.
        let Some(standing) = self.requesters.standing(requester) else { return false };
        if !standing.translating || self.is_halted() {
            return false;
        }
        // ... and must not be configured if a command that disables translation has already
        // processed the requester.
        if !is_served(standing.given) && !self.under_way().has_disabled(requester) {
            // The caller gets the result; nothing is acknowledged to the guest.
            let _ = self.reevaluate_requester(requester, registers.root);
        }
        let served = is_served(self.requesters.given(requester));
        self.counters.found_served.add(served.into());
        served
    }
}

/// Whether the requester has a configuration other than a block, and the host has applied it.
fn is_served(given: Option<Given>) -> bool {
    given.is_some_and(|given| given.applied && !is_blocked(&given.decision))
}
