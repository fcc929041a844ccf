// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The small traits a virtual IOMMU stands on, and the one it offers upward.

use std::fmt::Debug;

use super::{Invalidation, Requester, RequesterConfig};
use crate::spec::vtd::fault::FaultReason;

/// What is behind a virtual IOMMU: it turns policies into translations.
///
/// Calls come one at a time (the virtual IOMMU's lock is held). A call returns only when the host
/// has done what was asked: the virtual IOMMU acknowledges to the guest right after.
pub trait HostSide: Debug + Send + Sync {
    /// From now on `requester`'s DMA goes by `config`. An unchanged configuration costs nothing,
    /// and a PASID that is blocked no memory.
    ///
    /// The tag of a request with PASID has that PASID.
    ///
    /// # Errors
    /// The host refused; the requester is then blocked, whatever it was before, unless the error
    /// says [`HostSideError::still_reachable`].
    fn configure(
        &self,
        requester: Requester,
        config: &RequesterConfig,
    ) -> Result<(), HostSideError>;

    /// Invalidates a batch, in any order within it: all of what stands between two ordering points
    /// of the guest's queue.
    ///
    /// # Errors
    /// The host could not do all of it. What it could not invalidate is then blocked, so that no
    /// stale translation is used, unless the error says [`HostSideError::still_reachable`]; the
    /// guest must be told.
    fn invalidate(&self, batch: &[Invalidation]) -> Result<(), HostSideError>;

    /// Does as much of [`HostSide::invalidate`] as takes a fraction of a millisecond, from where
    /// `progress` is, and moves that on: so others need not wait where a batch names very much.
    ///
    /// # Errors
    /// Those of [`HostSide::invalidate`]. The rest can still be done.
    fn invalidate_some(
        &self,
        batch: &[Invalidation],
        progress: &mut Progress,
    ) -> Result<(), HostSideError> {
        progress.go_on_at(None);
        self.invalidate(batch)
    }
}

/// How much of a batch of invalidations is done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// A number of the host side's own; none before it has begun.
    next: Option<u64>,
    done: bool,
}

impl Progress {
    /// Where to go on, if it has begun.
    pub fn next(self) -> Option<u64> {
        self.next
    }

    /// Everything before `next` is done, or everything.
    pub fn go_on_at(&mut self, next: Option<u64>) {
        *self = Self { next, done: next.is_none() };
    }

    /// Whether all is done.
    pub fn is_done(self) -> bool {
        self.done
    }
}

/// The host refused.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{what}: {source}")]
pub struct HostSideError {
    /// What was being done, and for which requester.
    pub what: String,
    /// Not even blocking succeeded: DMA may still take a way that the guest has taken back, so that
    /// nobody may tell the guest that it is gone.
    pub still_reachable: bool,
    /// The verb that failed.
    #[source]
    pub source: std::sync::Arc<dyn std::error::Error + Send + Sync>,
}

/// An unrecoverable fault of a DMA request, brought back from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaFault {
    /// Who made the request.
    pub requester: Requester,
    /// The IOVA, in bytes.
    pub address: u64,
    /// It was a write (or an atomic).
    pub write: bool,
    /// It asked to execute.
    pub execute: bool,
    /// It asked for supervisor privilege.
    pub privileged: bool,
    /// The reason as the host saw it; `None` when it says none, or none that there is. Meaningless
    /// for a requester that the virtual IOMMU itself has blocked: it knows the reason better.
    pub reason: Option<FaultReason>,
    /// The host's stage 2 refused: the guest's tables lead to what is no guest memory.
    pub stage2: bool,
}

/// What a virtual IOMMU offers to whoever brings faults back.
pub trait FaultTarget: Send + Sync {
    /// Records the fault as the architecture says. May be called from any thread that holds no
    /// lock of the host.
    fn dma_fault(&self, fault: &DmaFault);

    /// A request of `requester` is about to fail because the host blocks it. Whether the host was
    /// given something else for it by now, so that the request is to be tried again: tables that
    /// serve a requester need not be told of everywhere. Called as [`FaultTarget::dma_fault`] is;
    /// takes the virtual IOMMU's lock, whose holder may wait for DMA to end.
    fn served_late(&self, requester: Requester) -> bool {
        let _ = requester;
        false
    }
}
