// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The action for each descriptor (§6.5.2): whether the unit accepts it, and the invalidation for
//! the host, by the granularities of an IOTLB invalidation (§6.5.2.3, §6.5.2.4).

use super::caps::Capabilities;
use crate::spec::pci::Pasid;
use crate::spec::vtd::qi::{AddressMask, Descriptor, InterruptEntryScope, IotlbScope};
use crate::spec::vtd::regs::IqErrorInfo;
use crate::spec::vtd::PageRange;
use crate::viommu::vtd::host_side::Invalidation;

/// Whether a unit with `caps` accepts `descriptor`, in scalable mode or not.
pub(super) fn check_offered(
    caps: &Capabilities,
    scalable: bool,
    descriptor: &Descriptor,
) -> Result<(), IqErrorInfo> {
    let ecap = caps.ecap;
    let supported = match descriptor {
        Descriptor::ContextCache(_) | Descriptor::Iotlb { .. } | Descriptor::Wait { .. } => true,
        Descriptor::DeviceTlb { .. } => ecap.dt(),
        Descriptor::InterruptEntryCache(_) => ecap.ir(),
        Descriptor::PasidIotlb { .. } | Descriptor::PasidCache(_) => scalable,
        Descriptor::PasidDeviceTlb { .. } => scalable && ecap.dt(),
        Descriptor::PageGroupResponse { .. } => scalable && ecap.prs(),
    };
    if !supported {
        return Err(IqErrorInfo::InvalidType);
    }
    let reserved = match *descriptor {
        Descriptor::Iotlb { scope: IotlbScope::Pages { range, .. }, .. } => {
            range.mask > caps.cap.mamv()
        }
        Descriptor::InterruptEntryCache(InterruptEntryScope::Index { mask, .. }) => {
            mask > ecap.mhmv()
        }
        Descriptor::Wait { drain_page_requests, .. } => drain_page_requests && !ecap.pds(),
        Descriptor::DeviceTlb { physical_function, .. }
        | Descriptor::PasidDeviceTlb { physical_function, .. } => {
            physical_function != 0 && !ecap.dit()
        }
        _ => false,
    };
    if reserved {
        return Err(IqErrorInfo::ReservedField);
    }
    Ok(())
}

/// The host's invalidation for an IOTLB invalidation. It names no PASID, so it means every PASID of
/// the domain.
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

/// The host's invalidation for a PASID-based IOTLB invalidation.
pub(super) fn pasid_iotlb(domain: u16, pasid: Pasid, range: Option<AddressMask>) -> Invalidation {
    Invalidation {
        domain: Some(domain),
        pasid: Some(pasid.raw()),
        range: range.and_then(page_range),
    }
}

/// The pages of `range`; `None` if it spans all addresses.
fn page_range(range: AddressMask) -> Option<PageRange> {
    Some(PageRange::from(range)).filter(|range| !range.is_all())
}
