// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The answers of `IOMMU_GET_HW_INFO`, as the configuration of a virtual IOMMU needs them.

use crate::iommufd::{Extensions, HwInfo, HwInfoData};
use crate::spec::vtd::regs::{Cap, Ecap};
use crate::viommu::smmuv3::HostSmmu;
use crate::viommu::vtd::HostUnit;

/// The VT-d unit in front of the device called `device`; `None` if that is not a VT-d.
pub fn host_vtd(device: String, info: &HwInfo, extensions: Extensions) -> Option<HostUnit> {
    let HwInfoData::Vtd(registers) = info.data else { return None };
    Some(HostUnit {
        device,
        cap: Cap::from_bits(registers.cap_reg),
        ecap: Ecap::from_bits(registers.ecap_reg),
        guest_second_stage: extensions.guest_second_stage,
        fault_reports: extensions.fault_reports,
    })
}

/// The SMMUv3 in front of the device called `device`; `None` if that is not an SMMUv3.
pub fn host_smmu(device: String, info: &HwInfo) -> Option<HostSmmu> {
    let HwInfoData::ArmSmmuV3(registers) = info.data else { return None };
    let ats = !info.capabilities.pci_ats_not_supported();
    Some(HostSmmu::new(device, registers.idr, registers.aidr, ats))
}
