// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The small trait that a virtual VT-d is built on, the one it offers to its callers, and their
//! subjects: policies of requesters, and invalidations.

use std::fmt::Debug;
use std::time::Duration;

use super::config::VtdConfig;
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::page_request::{PageRequest, PageResponse};
use crate::spec::vtd::pasid::PagingMode;
use crate::spec::vtd::qi::{AddressMask, IotlbScope};
use crate::spec::vtd::root::AddressWidth;
use crate::spec::vtd::PageRange;
pub use crate::viommu::PageTicket;
use crate::viommu::{HostSideError, Requester};

/// A first-stage table (VT-d scalable mode, PGTT first-stage).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct VtdFirstStage {
    /// GPA of the top table, in bytes (FSPTPTR).
    pub table: u64,
    /// The number of levels (FSPM).
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
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct VtdSecondStage {
    /// GPA of the top table, in bytes (SSPTPTR).
    pub table: u64,
    /// Width of input addresses (AW).
    pub address_width: AddressWidth,
    /// Accessed and dirty flags are set in them (SSADE).
    pub accessed_dirty: bool,
}

/// A first stage over a second stage, both of them the guest's (PGTT nested): what a guest that is
/// a host itself programs. Addresses of and in the first-stage tables are translated by `second`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct VtdNested {
    /// The first stage.
    pub first: VtdFirstStage,
    /// The second stage.
    pub second: VtdSecondStage,
}

/// Guest-owned tables, by format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Stage1 {
    /// VT-d first-stage: hardware nests it.
    VtdFirstStage(VtdFirstStage),
    /// VT-d second-stage: only on a host with [`crate::iommufd::Extensions::guest_second_stage`].
    VtdSecondStage(VtdSecondStage),
    /// Both, the first over the second: on the same hosts.
    VtdNested(VtdNested),
}

impl Stage1 {
    /// GPAs of the top tables, in bytes. (The first one of a nested pair is an address of its
    /// second stage.)
    pub fn tables(&self) -> impl Iterator<Item = u64> {
        let (first, second) = match self {
            Self::VtdFirstStage(first) => (first.table, None),
            Self::VtdSecondStage(second) => (second.table, None),
            Self::VtdNested(VtdNested { first, second }) => (first.table, Some(second.table)),
        };
        [first].into_iter().chain(second)
    }
}

/// The treatment of a requester's DMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Policy {
    /// Every request fails with this reason, as seen by the guest.
    Blocked(FaultReason),
    /// Untranslated: the IOVA is the GPA. Always an explicit decision.
    Bypass,
    /// Translated by tables owned by the guest.
    Stage1(Stage1),
}

/// How the guest's invalidations name the cached translations of a requester.
///
/// VT-d tags by domain id and PASID; for requests without PASID, `pasid` is the context entry's
/// RID_PASID (0 in legacy mode).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct DomainTag {
    /// Domain id.
    pub domain: u16,
    /// PASID of the table entry that serves the requester.
    pub pasid: u32,
}

/// A requester's policy and everything else in the guest's tables about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct RequesterConfig {
    /// The treatment of its DMA.
    pub policy: Policy,
    /// How invalidations name it.
    pub tag: DomainTag,
    /// The guest's tables suppress fault recording (FPD).
    pub fault_disabled: bool,
}

/// An invalidation of cached translations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Invalidation {
    /// Domain id; `None` for every domain.
    pub domain: Option<u16>,
    /// PASID; `None` for every PASID of the domain.
    pub pasid: Option<u32>,
    /// Addresses; `None` for all of them. They do not apply to every kind of tables, see
    /// [`Invalidation::stage`].
    pub range: Option<PageRange>,
}

/// One of the guest's two stages of translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Its input addresses are IOVAs.
    First,
    /// Its input addresses are IOVAs, or what a first stage translates to.
    Second,
}

impl Invalidation {
    /// Everything.
    pub const ALL: Self = Self { domain: None, pasid: None, range: None };

    /// That of an IOTLB invalidation. It names no PASID, so it means every PASID of the domain.
    pub(super) fn of_scope(scope: IotlbScope) -> Self {
        match scope {
            IotlbScope::Global => Self::ALL,
            IotlbScope::Domain(domain) => Self { domain: Some(domain), ..Self::ALL },
            IotlbScope::Pages { domain, range } => {
                Self { domain: Some(domain), pasid: None, range: page_range(range) }
            }
        }
    }

    /// That of a PASID-based IOTLB invalidation, of all addresses or of `range`.
    pub(super) fn of_pasid(domain: u16, pasid: Pasid, range: Option<AddressMask>) -> Self {
        let range = range.and_then(page_range);
        Self { domain: Some(domain), pasid: Some(pasid.raw()), range }
    }

    /// Whether the invalidation names what is tagged `tag`.
    pub fn names(&self, tag: DomainTag) -> bool {
        self.domain.is_none_or(|domain| domain == tag.domain)
            && self.pasid.is_none_or(|pasid| pasid == tag.pasid)
    }

    /// The stage of tables like `stage1` that [`Invalidation::range`] has input addresses of;
    /// `None` if it has none of these: everything cached from the tables is invalidated.
    ///
    /// An invalidation without PASID is page-selective-within-domain. Its addresses are those of
    /// second-stage tables; of first-stage tables, nested or not, it invalidates every page of the
    /// domain, and every paging-structure entry, hint or not (§6.5.2.3). One with PASID invalidates
    /// nothing that is cached of the second stage of nested tables (§6.5.2.4).
    pub fn stage(&self, stage1: &Stage1) -> Option<Stage> {
        match stage1 {
            Stage1::VtdFirstStage(_) => self.pasid.is_some().then_some(Stage::First),
            Stage1::VtdSecondStage(_) => Some(Stage::Second),
            Stage1::VtdNested(_) if self.pasid.is_some() => Some(Stage::First),
            Stage1::VtdNested(_) => Some(Stage::Second),
        }
    }
}

/// The pages of `range`; `None` if it spans all addresses.
fn page_range(range: AddressMask) -> Option<PageRange> {
    Some(PageRange::from(range)).filter(|range| !range.is_all())
}

/// What is behind a virtual VT-d: turns policies into translations.
///
/// Calls come one at a time (the virtual VT-d's lock is held). A call returns only when the host is
/// done: the virtual VT-d acknowledges to the guest right after.
pub trait VtdHostSide: Debug + Send + Sync {
    /// The guest is offered `config`; before any other call.
    fn offers(&self, config: &VtdConfig) {
        let _ = config;
    }

    /// Does a part of what [`VtdHostSide::configure`] of the same would take long for, in a
    /// fraction of a millisecond. Returns whether nothing of that is left.
    fn prepare(&self, requester: Requester, config: &RequesterConfig) -> bool {
        let _ = (requester, config);
        true
    }

    /// Applies `config` to `requester`'s DMA. An unchanged configuration costs nothing, and a
    /// blocked PASID takes no memory.
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

    /// What was configured is published, by which faults are explained: those that it led to may be
    /// delivered.
    fn configured(&self) {}

    /// Does a batch of invalidations, in any order: everything between two ordering points of the
    /// guest's queue.
    ///
    /// # Errors
    /// The host could not do all of it. What it could not invalidate is then blocked, so that no
    /// stale translation is used, unless the error says [`HostSideError::still_reachable`]; the
    /// guest must be told.
    fn invalidate(&self, batch: &[Invalidation]) -> Result<(), HostSideError>;

    /// Does a part of [`VtdHostSide::invalidate`] that takes a fraction of a millisecond, starting
    /// at `progress`, and advances that: so others need not wait for a large batch.
    ///
    /// # Errors
    /// Those of [`VtdHostSide::invalidate`]. The rest can still be done.
    fn invalidate_some(
        &self,
        batch: &[Invalidation],
        progress: &mut Progress,
    ) -> Result<(), HostSideError> {
        progress.go_on_at(None);
        self.invalidate(batch)
    }

    /// Responds to a group of page requests of `rid` that [`FaultTarget::page_requests`] has taken;
    /// once. Has no effect where the host has answered it meanwhile. May be called from any thread,
    /// also at the same time as other methods.
    fn respond(&self, rid: Bdf, ticket: PageTicket, response: PageResponse) {
        let _ = (rid, ticket, response);
    }

    /// Waits, for `time` at most, until all page requests that the host had for the guest at the
    /// first call with this `progress` have been given to [`FaultTarget::page_requests`]; then it
    /// is done. Does not wait where `time` is zero. May be called like [`VtdHostSide::respond`].
    fn drain_page_requests(&self, progress: &mut Progress, time: Duration) {
        let _ = time;
        progress.go_on_at(None);
    }

    /// Tells the device `rid` to forget the translations of `range` that it has for requests with
    /// `pasid`, or for all of its requests. Comes after the invalidations that the guest has
    /// ordered before. Returns whether it has answered; where the host does this together with
    /// those, it has.
    fn invalidate_device_tlb(&self, rid: Bdf, pasid: Option<u32>, range: PageRange) -> bool {
        let _ = (rid, pasid, range);
        true
    }
}

/// The progress of a batch of invalidations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// The number of the host side to go on with, if a virtual VT-d has several: those before it
    /// are done.
    side: usize,
    /// A number defined by that host side; `None` before its start.
    next: Option<u64>,
    /// The progress inside of what `next` names: two more numbers of the host side.
    inside: Option<(u64, u64)>,
    done: bool,
}

impl Progress {
    /// Where to continue, if it has started.
    pub fn next(self) -> Option<u64> {
        self.next
    }

    /// What was given to [`Progress::go_on_inside`] last, if that was last.
    pub fn inside(self) -> Option<(u64, u64)> {
        self.inside
    }

    /// Everything before `next`, or everything, is done.
    pub fn go_on_at(&mut self, next: Option<u64>) {
        *self = Self { next, inside: None, done: next.is_none(), ..*self };
    }

    /// The host side to continue with, of several.
    pub(crate) fn side(self) -> usize {
        self.side
    }

    /// Everything is done on the host sides before number `side`, and nothing on this one.
    pub(crate) fn go_on_with(&mut self, side: usize) {
        *self = Self { side, ..Self::default() };
    }

    /// Whether a part of it was done, or all.
    pub(super) fn has_started(self) -> bool {
        self != Self::default()
    }

    /// Everything before `next` is done, and part of what that names.
    pub fn go_on_inside(&mut self, next: u64, inside: (u64, u64)) {
        *self = Self { next: Some(next), inside: Some(inside), done: false, ..*self };
    }

    /// Whether all is done.
    pub fn is_done(self) -> bool {
        self.done
    }
}

/// An unrecoverable fault of a DMA request, reported by the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaFault {
    /// The source of the request.
    pub requester: Requester,
    /// The IOVA, in bytes.
    pub address: u64,
    /// It was a write (or an atomic).
    pub write: bool,
    /// It requested execute permission.
    pub execute: bool,
    /// It requested supervisor privilege.
    pub privileged: bool,
    /// The reason reported by the host; `None` if there is none, or an undefined one. Meaningless
    /// for a requester blocked by the virtual IOMMU itself, which knows the reason better.
    pub reason: Option<FaultReason>,
    /// The host's stage 2 refused: the guest's tables point outside guest memory.
    pub stage2: bool,
}

/// What a virtual VT-d offers to the source of faults.
pub trait FaultTarget: Send + Sync {
    /// Records the fault as the architecture requires. May be called from any thread that holds no
    /// lock of the host.
    fn dma_fault(&self, fault: &DmaFault);

    /// A device asks for pages: `requests` are a whole group of one requester, the last one of
    /// which has [`PageRequest::last`]. Returns the response; or `None`, and the guest responds by
    /// [`VtdHostSide::respond`] with `ticket`. To be called like [`FaultTarget::dma_fault`].
    fn page_requests(&self, requests: &[PageRequest], ticket: PageTicket) -> Option<PageResponse> {
        let _ = (requests, ticket);
        Some(PageResponse::InvalidRequest)
    }

    /// A request of `requester` is about to fail because the host blocks it. Returns whether the
    /// requester has been unblocked by now, so that the request is to be retried: without
    /// caching mode a guest need not invalidate when its tables start to serve a requester. To be
    /// called like [`FaultTarget::dma_fault`]; takes the virtual VT-d's lock, whose holder may wait
    /// for DMA to end.
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
