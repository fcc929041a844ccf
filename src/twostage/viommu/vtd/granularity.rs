// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the granularities of an IOTLB invalidation name (§6.5.2.3, §6.5.2.4).

use crate::spec::pci::Pasid;
use crate::spec::vtd::qi::{AddressMask, IotlbScope};
use crate::spec::vtd::PAGE_SHIFT;
use crate::viommu::{Invalidation, PageRange};

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
    let AddressMask { address, mask, leaf } = range;
    let shift = u32::from(mask) + PAGE_SHIFT;
    (shift < u64::BITS).then(|| PageRange {
        address: address & !((1 << shift) - 1),
        pages: 1 << mask,
        leaf,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(address: u64, mask: u8) -> Option<PageRange> {
        page_range(AddressMask { address, mask, leaf: true })
    }

    #[test]
    fn an_address_mask_is_an_aligned_range() {
        let of = |address, pages| Some(PageRange { address, pages, leaf: true });
        assert_eq!(range(0x1234_5000, 0), of(0x1234_5000, 1));
        assert_eq!(range(0x1234_5000, 9), of(0x1220_0000, 512));
        assert_eq!(range(u64::MAX << 12, 0), of(u64::MAX << 12, 1));
        assert_eq!(range(u64::MAX << 12, 51), of(1 << 63, 1 << 51));
        assert_eq!(range(0x1000, 52), None);
        assert_eq!(range(0x1000, 63), None);
    }
}
