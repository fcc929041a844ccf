// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the answers of `IOMMU_GET_HW_INFO` mean: the unit, for the configuration of a virtual
//! IOMMU; and its flags, requirements of the host for nesting, known and unknown.

use crate::sync::Mutex;
use std::collections::BTreeSet;

use crate::iommufd::{
    Extensions, HwInfo, HwInfoData, HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI,
    HW_INFO_VTD_ERRATA_772415_SPR17,
};
use crate::spec::pci::Bdf;
use crate::spec::smmuv3::regs::{Httu, Idr0, STALL_OR_TERMINATE};
use crate::spec::vtd::regs::{Cap, Ecap};
use crate::viommu::smmuv3::HostSmmu;
use crate::viommu::vtd::HostVtd;

/// The VT-d unit in front of the device called `device`; `None` if that is not a VT-d.
pub fn host_vtd(device: String, info: &HwInfo, extensions: Extensions) -> Option<HostVtd> {
    let HwInfoData::Vtd(registers) = info.data else { return None };
    let (cap, ecap) = (Cap::from_bits(registers.cap_reg), Ecap::from_bits(registers.ecap_reg));
    let unit = HostVtd::new(device, cap, ecap)
        .with_guest_second_stage(extensions.guest_second_stage)
        .with_fault_reports(extensions.fault_reports);
    Some(unit)
}

/// The SMMUv3 in front of the device called `device`; `None` if that is not an SMMUv3.
pub fn host_smmu(device: String, info: &HwInfo, extensions: Extensions) -> Option<HostSmmu> {
    let HwInfoData::ArmSmmuV3(registers) = info.data else { return None };
    let [idr0, ..] = registers.idr;
    let httu = match extensions.table_updates {
        true => Httu::from_bits(Idr0::from_bits(idr0).httu()),
        false => Httu::None,
    };
    let unit = HostSmmu::new(device, registers.idr, registers.aidr, has_ats(info)).with_httu(httu);
    Some(if extensions.smmu_faults { unit.with_faults_served(idr0) } else { unit })
}

/// Whether a device can use ATS.
pub(super) fn has_ats(info: &HwInfo) -> bool {
    !info.capabilities.pci_ats_not_supported()
}

/// Whether an IOMMU may write through a read-only stage 2 when nesting (VT-d erratum 772415).
pub(super) fn writes_through_read_only(info: &HwInfo) -> bool {
    matches!(info.data, HwInfoData::Vtd(vtd) if vtd.flags & HW_INFO_VTD_ERRATA_772415_SPR17 != 0)
}

/// Whether an SMMU may miss a CMD_TLBI_* or a CMD_CFGI_* that is issued only once (Tegra264
/// erratum; reported by Linux 7.3 and later).
pub(super) fn misses_invalidations(info: &HwInfo) -> bool {
    matches!(info.data, HwInfoData::ArmSmmuV3(smmu)
        if smmu.flags & HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI != 0)
}

/// Whether an SMMU lets context descriptors stall transactions, unless the stream table entry says
/// otherwise (S1STALLD). On any other SMMU, an entry that says so is illegal (§5.2).
pub(super) fn can_stall(info: &HwInfo) -> bool {
    matches!(info.data, HwInfoData::ArmSmmuV3(smmu) if {
        let [idr0, ..] = smmu.idr;
        Idr0::from_bits(idr0).stall_model() == STALL_OR_TERMINATE
    })
}

/// The flags of unknown meaning; 0 for none.
pub(super) fn unknown_flags(info: &HwInfo) -> u32 {
    match info.data {
        HwInfoData::Vtd(vtd) => vtd.flags & !HW_INFO_VTD_ERRATA_772415_SPR17,
        HwInfoData::ArmSmmuV3(smmu) => smmu.flags & !HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI,
        HwInfoData::Other(_) | HwInfoData::None => 0,
    }
}

/// Logs, once per flag, which flags of the IOMMU of `rid` are unknown.
pub(super) fn say_unknown(rid: Bdf, info: &HwInfo) {
    /// The flags logged so far, for all hosts of this process.
    static SAID: Mutex<BTreeSet<(&str, u32)>> = Mutex::new(BTreeSet::new());
    let mut said = SAID.lock();
    if let Some(line) = news(rid, info, &mut said) {
        log::warn!("{line}");
    }
}

/// The log line, if any of the flags has not been logged.
fn news(rid: Bdf, info: &HwInfo, said: &mut BTreeSet<(&'static str, u32)>) -> Option<String> {
    let name = match info.data {
        HwInfoData::Vtd(_) => "VT-d",
        HwInfoData::ArmSmmuV3(_) => "SMMUv3",
        HwInfoData::Other(_) | HwInfoData::None => return None,
    };
    let unknown = unknown_flags(info);
    let bits = (0..u32::BITS).map(|bit| 1 << bit).filter(|bit| unknown & bit != 0);
    // All of them, not only the first new one.
    let new = bits.fold(0, |new, bit| new | if said.insert((name, bit)) { bit } else { 0 });
    (new != 0).then(|| {
        format!(
            "the kernel sets unknown flags {new:#x} of the {name} of {rid}: what they require of a \
             VMM is not done; a newer version may support them"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommufd::{iommu_hw_info_arm_smmuv3, iommu_hw_info_vtd, HwCapabilities};

    fn info(data: HwInfoData) -> HwInfo {
        HwInfo { data, capabilities: HwCapabilities::new(), max_pasid_log2: 0 }
    }

    fn smmu(flags: u32) -> HwInfo {
        info(HwInfoData::ArmSmmuV3(iommu_hw_info_arm_smmuv3 { flags, ..Default::default() }))
    }

    fn vtd(flags: u32) -> HwInfo {
        info(HwInfoData::Vtd(iommu_hw_info_vtd { flags, ..Default::default() }))
    }

    #[test]
    fn what_is_known_is_of_its_own_architecture() {
        assert!(misses_invalidations(&smmu(1)) && !misses_invalidations(&smmu(2)));
        assert!(writes_through_read_only(&vtd(1)) && !writes_through_read_only(&vtd(2)));
        assert!(!misses_invalidations(&vtd(1)) && !writes_through_read_only(&smmu(1)));
        assert_eq!(
            [vtd(7), smmu(5), info(HwInfoData::None)].map(|it| unknown_flags(&it)),
            [6, 4, 0]
        );
    }

    #[test]
    fn only_an_extension_updates_the_tables_of_a_guest() {
        let idr = [Idr0::new().with_httu(2).into_bits(), 0, 0, 0, 0, 0];
        let data = HwInfoData::ArmSmmuV3(iommu_hw_info_arm_smmuv3 { idr, ..Default::default() });
        let unit = |extensions| host_smmu("edu0".into(), &info(data), extensions).unwrap();
        let kernel = unit(Extensions::default());
        let emulated = unit(Extensions::default().with_table_updates(true));
        assert_eq!(emulated, kernel.clone().with_httu(Httu::Dirty));
        assert_ne!(emulated, kernel);
    }

    #[test]
    fn each_flag_is_said_once() {
        let mut said = BTreeSet::new();
        let mut news = |info: &HwInfo| news(Bdf::from_raw(0x20), info, &mut said);
        assert_eq!(news(&smmu(1)), None);
        let line = news(&smmu(1 | 4 | 8)).unwrap();
        assert!(
            line.contains("0xc") && line.contains("SMMUv3") && line.contains("00:04.0"),
            "{line}"
        );
        assert_eq!(news(&smmu(4)), None);
        assert!(news(&smmu(0x18)).unwrap().contains("0x10"));
        assert!(news(&vtd(4)).unwrap().contains("VT-d"), "another's");
    }
}
