// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The units of a host, as far as a virtual one in front of them must know them.

use crate::spec::vtd::regs::{Cap, Ecap};

/// What a host unit can serve, and a device behind it to name it by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostUnit {
    /// The device whose `IOMMU_GET_HW_INFO` this is.
    pub device: String,
    /// CAP of the unit.
    pub cap: Cap,
    /// ECAP of the unit.
    pub ecap: Ecap,
    /// The host walks second-stage tables of the guest on top of its own
    /// ([`crate::iommufd::Extensions::guest_second_stage`]). No register says so.
    pub guest_second_stage: bool,
    /// The host tells of requests that it blocks ([`crate::iommufd::Extensions::fault_reports`]).
    pub fault_reports: bool,
}
