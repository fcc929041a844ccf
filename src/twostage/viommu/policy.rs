// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a virtual IOMMU asks of the host: policies of requesters, and invalidations.

use std::fmt;

use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::pasid::PagingMode;
use crate::spec::vtd::root::AddressWidth;
use crate::spec::vtd::PageRange;

/// Who makes a DMA request: a PCI function, and the PASID when the request carries one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Requester {
    /// Requester ID as the guest sees it.
    pub rid: Bdf,
    /// PASID of the request; `None` for a request without.
    pub pasid: Option<Pasid>,
}

impl Requester {
    /// `rid`'s requests without PASID.
    pub const fn rid(rid: Bdf) -> Self {
        Self { rid, pasid: None }
    }
}

impl fmt::Display for Requester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pasid {
            Some(pasid) => write!(f, "{} PASID {pasid}", self.rid),
            None => write!(f, "{}", self.rid),
        }
    }
}

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
