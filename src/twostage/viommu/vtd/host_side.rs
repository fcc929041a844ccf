// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The small trait that a virtual VT-d stands on, the one it offers upward, and what both are
//! about: policies of requesters, and invalidations.

use std::fmt::Debug;

use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::pasid::PagingMode;
use crate::spec::vtd::root::AddressWidth;
use crate::spec::vtd::PageRange;
use crate::viommu::{HostSideError, Requester};

/// A first-stage table (VT-d scalable mode, PGTT first-stage).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VtdFirstStage {
    /// GPA of the top table, in bytes (FSPTPTR).
    pub table: u64,
    /// How many levels there are (FSPM).
    pub paging_mode: PagingMode,
    /// Supervisor requests are allowed (SRE).
    pub supervisor_requests: bool,
    /// Supervisor writes honour R/W (WPE).
    pub write_protect: bool,
    /// The extended-accessed flag is kept (EAFE).
    pub extended_accessed: bool,
}

/// A second-stage table that the guest owns (VT-d legacy mode, or PGTT second-stage).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VtdSecondStage {
    /// GPA of the top table, in bytes (SSPTPTR).
    pub table: u64,
    /// Width of input addresses (AW).
    pub address_width: AddressWidth,
}

/// Guest-owned tables, by format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage1 {
    /// VT-d first-stage: hardware nests it.
    VtdFirstStage(VtdFirstStage),
    /// VT-d second-stage: only a host with [`crate::iommufd::Extensions::guest_second_stage`].
    VtdSecondStage(VtdSecondStage),
}

/// What becomes of a requester's DMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Every request fails, and the guest is told this reason of each.
    Blocked(FaultReason),
    /// Untranslated: the IOVA is the GPA. A decision, never a leftover.
    Bypass,
    /// Through tables that the guest owns.
    Stage1(Stage1),
}

/// How the guest's invalidations name what a requester caches.
///
/// VT-d tags by domain id and PASID; for requests without PASID, `pasid` is the context entry's
/// RID_PASID (0 in legacy mode).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DomainTag {
    /// Domain id.
    pub domain: u16,
    /// PASID of the table entry that serves the requester.
    pub pasid: u32,
}

/// A requester's policy with all the guest has said of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequesterConfig {
    /// What becomes of its DMA.
    pub policy: Policy,
    /// How invalidations name it.
    pub tag: DomainTag,
    /// The guest's tables ask that faults be not recorded (FPD).
    pub fault_disabled: bool,
}

/// "What you cache under this name is no longer true."
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Invalidation {
    /// Domain id; `None` for every domain.
    pub domain: Option<u16>,
    /// PASID; `None` for every PASID of the domain.
    pub pasid: Option<u32>,
    /// Addresses; `None` for all of them. Not every kind of tables is named by them, see
    /// [`Invalidation::is_by_address`].
    pub range: Option<PageRange>,
}

impl Invalidation {
    /// Everything.
    pub const ALL: Self = Self { domain: None, pasid: None, range: None };

    /// Whether the invalidation names what is tagged `tag`.
    pub fn names(&self, tag: DomainTag) -> bool {
        self.domain.is_none_or(|domain| domain == tag.domain)
            && self.pasid.is_none_or(|pasid| pasid == tag.pasid)
    }

    /// Whether [`Invalidation::range`] counts for tables like `stage1`; if not, all that is cached
    /// of them goes.
    ///
    /// What names no PASID is a page-selective-within-domain invalidation. Its addresses are those
    /// of second-stage tables; of first-stage tables it names every page of the domain, and every
    /// paging-structure entry, hint or not (§6.5.2.3).
    pub fn is_by_address(&self, stage1: &Stage1) -> bool {
        match stage1 {
            Stage1::VtdFirstStage(_) => self.pasid.is_some(),
            Stage1::VtdSecondStage(_) => true,
        }
    }
}

/// What is behind a virtual VT-d: it turns policies into translations.
///
/// Calls come one at a time (the virtual VT-d's lock is held). A call returns only when the host
/// has done what was asked: the virtual VT-d acknowledges to the guest right after.
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

/// What a virtual VT-d offers to whoever brings faults back.
pub trait FaultTarget: Send + Sync {
    /// Records the fault as the architecture says. May be called from any thread that holds no
    /// lock of the host.
    fn dma_fault(&self, fault: &DmaFault);

    /// A request of `requester` is about to fail because the host blocks it. Whether the host was
    /// given something else for it by now, so that the request is to be tried again: tables that
    /// serve a requester need not be told of everywhere. Called as [`FaultTarget::dma_fault`] is;
    /// takes the virtual VT-d's lock, whose holder may wait for DMA to end.
    fn served_late(&self, requester: Requester) -> bool {
        let _ = requester;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalidation_names_tags_by_what_it_gives() {
        let tag = DomainTag { domain: 3, pasid: 9 };
        let of = |domain, pasid| Invalidation { domain, pasid, range: None };
        assert!(Invalidation::ALL.names(tag));
        assert!(of(Some(3), None).names(tag));
        assert!(of(Some(3), Some(9)).names(tag));
        assert!(!of(Some(3), Some(8)).names(tag));
        assert!(!of(Some(4), Some(9)).names(tag));
    }
}
