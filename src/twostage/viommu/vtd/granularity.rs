// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the granularities of an IOTLB invalidation name (§6.5.2.3, §6.5.2.4).

use crate::spec::pci::Pasid;
use crate::spec::vtd::qi::{AddressMask, IotlbScope};
use crate::spec::vtd::PageRange;
use crate::viommu::Invalidation;

/// What an IOTLB invalidation asks of the host. It names no PASID: every PASID of the domain.
pub(super) fn iotlb(scope: IotlbScope) -> Invalidation {
    match scope {
        IotlbScope::Global => Invalidation::ALL,
        IotlbScope::Domain(domain) => {
            Invalidation { domain: Some(domain), pasid: None, range: None }
        }
        IotlbScope::Pages { domain, range } => {
            Invalidation { domain: Some(domain), pasid: None, range: page_range(range) }
        }
    }
}

/// What a PASID-based IOTLB invalidation asks of the host.
pub(super) fn pasid_iotlb(domain: u16, pasid: Pasid, range: Option<AddressMask>) -> Invalidation {
    Invalidation {
        domain: Some(domain),
        pasid: Some(pasid.raw()),
        range: range.and_then(page_range),
    }
}

/// The pages of `range`; `None` when it spans all addresses.
fn page_range(range: AddressMask) -> Option<PageRange> {
    Some(PageRange::from(range)).filter(|range| !range.is_all())
}
