// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The abilities of an emulated VT-d unit, and the registers that report them.

use crate::units::engine::CacheSizes;
use crate::units::hardware::UserTables;
use twostage::iommufd::{
    iommu_hw_info_vtd, iommu_hwpt_vtd_s1, HwptVtdNested, HwptVtdSecondStage,
    HW_INFO_VTD_ERRATA_772415_SPR17, VTD_S1_EAFE, VTD_S1_SRE,
};
use twostage::spec::vtd::regs::{Cap, Ecap};

/// Entries of each device TLB.
const DEVICE_TLB: usize = 128;

/// Bits of the widest PASID (PCIe §6.20).
const MAX_PASID_BITS: u8 = 20;

/// Widths of guest addresses that a unit translates (CAP.MGAW).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressWidth {
    /// 39 bits: 3-level tables of the second stage, as in desktop processors. First-stage tables
    /// have 4 levels all the same.
    Bits39,
    /// 48 bits: 4-level tables.
    Bits48,
    /// 57 bits: 5-level tables too.
    Bits57,
}

impl AddressWidth {
    /// The width in bits.
    pub const fn bits(self) -> u8 {
        match self {
            Self::Bits39 => 39,
            Self::Bits48 => 48,
            Self::Bits57 => 57,
        }
    }
}

/// The abilities and cache sizes of an emulated VT-d unit.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VtdUnitConfig {
    /// Widest guest address (CAP.MGAW, CAP.SAGAW, CAP.FS5LP).
    pub address_width: AddressWidth,
    /// 1 GiB pages, of both stages (CAP.FS1GP, CAP.SSLPS).
    pub huge_pages: bool,
    /// Width of a PASID in bits, at most 20 (ECAP.PSS); 0 for none (ECAP.PASID).
    pub pasid_bits: u8,
    /// Supervisor requests (ECAP.SRS).
    pub supervisor_requests: bool,
    /// The extended accessed flag (ECAP.EAFS).
    pub extended_accessed: bool,
    /// Takes translation requests of devices and invalidations of their TLBs (ECAP.DT). A device of
    /// this process has one while its ATS is enabled
    /// ([`DeviceControl::set_device_tlb`](crate::DeviceControl::set_device_tlb)).
    pub device_tlb: bool,
    /// Takes page requests, if it has device-TLBs and PASIDs (ECAP.PRS, ECAP.PDS).
    pub page_requests: bool,
    /// User-owned first-stage tables nested on the host's stage 2 (ECAP.NEST).
    pub nesting: bool,
    /// User-owned second-stage tables on the host's stage 2, and first-stage tables over those (if
    /// the unit has nesting): no hardware supports this.
    pub guest_second_stage: bool,
    /// Accessed and dirty flags in the second stage (ECAP.SSADS): written pages can be tracked.
    pub dirty_tracking: bool,
    /// Reports erratum 772415 (GET_HW_INFO's flags): nested translation may write through read-only
    /// mappings, so an IOAS with a nesting parent allows none (`EINVAL`). Linux 7.2 reports it for
    /// every VT-d.
    pub erratum_772415: bool,
    /// Entries of the IOTLB, rounded up to a power of two; 0 for no IOTLB.
    pub iotlb_entries: usize,
    /// Entries of the paging-structure cache, likewise.
    pub paging_structure_entries: usize,
    /// Entries of the cache of stage-2 translations, likewise.
    pub stage2_entries: usize,
    /// Compares every translation with the tables when it is used, and reports missing
    /// invalidations ([`VtdUnit::sanitizer_report`](super::VtdUnit::sanitizer_report)). Slow.
    pub sanitize: bool,
}

impl Default for VtdUnitConfig {
    /// A recent unit with 48 bits: everything except supervisor requests, the extended accessed
    /// flag, device-TLBs and page requests; with the erratum that Linux reports for all.
    fn default() -> Self {
        Self {
            address_width: AddressWidth::Bits48,
            huge_pages: true,
            pasid_bits: MAX_PASID_BITS,
            supervisor_requests: false,
            extended_accessed: false,
            device_tlb: false,
            page_requests: false,
            nesting: true,
            guest_second_stage: true,
            dirty_tracking: true,
            erratum_772415: true,
            iotlb_entries: 4096,
            paging_structure_entries: 1024,
            stage2_entries: 1024,
            sanitize: false,
        }
    }
}

impl VtdUnitConfig {
    twostage::setters! {
        with_address_width address_width: AddressWidth;
        with_huge_pages huge_pages: bool;
        with_pasid_bits pasid_bits: u8;
        with_supervisor_requests supervisor_requests: bool;
        with_extended_accessed extended_accessed: bool;
        with_device_tlb device_tlb: bool;
        with_page_requests page_requests: bool;
        with_nesting nesting: bool;
        with_guest_second_stage guest_second_stage: bool;
        with_dirty_tracking dirty_tracking: bool;
        with_erratum_772415 erratum_772415: bool;
        with_iotlb_entries iotlb_entries: usize;
        with_paging_structure_entries paging_structure_entries: usize;
        with_stage2_entries stage2_entries: usize;
        with_sanitize sanitize: bool;
    }

    /// CAP, as GET_HW_INFO gives it.
    pub(super) fn cap(&self) -> Cap {
        let five_levels = self.address_width == AddressWidth::Bits57;
        Cap::new()
            .with_nd(6)
            .with_sagaw(match self.address_width {
                AddressWidth::Bits39 => 0b0010,
                AddressWidth::Bits48 => 0b0110,
                AddressWidth::Bits57 => 0b1110,
            })
            .with_mgaw(self.address_width.bits() - 1)
            .with_sslps(self.second_stage_large_pages())
            .with_psi(true)
            .with_mamv(18)
            .with_dwd(true)
            .with_drd(true)
            .with_fs1gp(self.huge_pages)
            .with_fs5lp(five_levels)
            .with_esirtps(true)
            .with_esrtps(true)
    }

    /// ECAP, as GET_HW_INFO gives it.
    pub(super) fn ecap(&self) -> Ecap {
        let pasid_bits = self.pasid_bits();
        Ecap::new()
            .with_c(true)
            .with_qi(true)
            .with_dt(self.device_tlb)
            .with_pt(true)
            .with_sc(true)
            .with_nest(self.nesting)
            .with_prs(self.page_requests())
            .with_srs(self.supervisor_requests)
            .with_eafs(self.extended_accessed)
            .with_pss(pasid_bits.saturating_sub(1))
            .with_pasid(pasid_bits > 0)
            .with_pds(self.page_requests())
            .with_smts(true)
            .with_ssts(true)
            .with_fsts(true)
            .with_smpwcs(true)
            .with_ssads(self.dirty_tracking)
    }

    /// The result of GET_HW_INFO: flags and both registers.
    pub(super) fn info(&self) -> iommu_hw_info_vtd {
        let erratum = if self.erratum_772415 { HW_INFO_VTD_ERRATA_772415_SPR17 } else { 0 };
        iommu_hw_info_vtd {
            flags: erratum,
            cap_reg: self.cap().into_bits(),
            ecap_reg: self.ecap().into_bits(),
            ..Default::default()
        }
    }

    /// Its cache sizes.
    pub(super) fn cache_sizes(&self) -> CacheSizes {
        CacheSizes {
            iotlb: self.iotlb_entries,
            paging_structures: self.paging_structure_entries,
            stage2: self.stage2_entries,
            device_tlb: if self.device_tlb { DEVICE_TLB } else { 0 },
        }
    }

    /// Width of a PASID, in bits.
    pub(super) fn pasid_bits(&self) -> u8 {
        self.pasid_bits.min(MAX_PASID_BITS)
    }

    /// Whether it takes page requests, which needs device-TLBs and PASIDs.
    pub(super) fn page_requests(&self) -> bool {
        self.page_requests && self.device_tlb && self.pasid_bits() > 0
    }

    /// CAP.SSLPS.
    pub(super) fn second_stage_large_pages(&self) -> u8 {
        if self.huge_pages {
            0b11
        } else {
            0b01
        }
    }

    /// Whether the unit can walk `tables`.
    pub(super) fn walks(&self, tables: &UserTables) -> bool {
        match tables {
            UserTables::FirstStage(tables) => self.nesting && self.walks_first_stage(tables),
            UserTables::SecondStage(tables) => {
                self.guest_second_stage && self.walks_second_stage(tables)
            }
            UserTables::Nested(HwptVtdNested { first, second }) => {
                self.nesting
                    && self.guest_second_stage
                    && self.walks_first_stage(first)
                    && self.walks_second_stage(second)
            }
        }
    }

    fn walks_first_stage(&self, tables: &iommu_hwpt_vtd_s1) -> bool {
        let width = match tables.addr_width {
            48 => true,
            57 => self.address_width == AddressWidth::Bits57,
            _ => false,
        };
        let supervisor = tables.flags & VTD_S1_SRE == 0 || self.supervisor_requests;
        let extended = tables.flags & VTD_S1_EAFE == 0 || self.extended_accessed;
        width && supervisor && extended
    }

    fn walks_second_stage(&self, tables: &HwptVtdSecondStage) -> bool {
        let width = match tables.addr_width {
            39 => true,
            48 => self.address_width != AddressWidth::Bits39,
            57 => self.address_width == AddressWidth::Bits57,
            _ => false,
        };
        width && (!tables.accessed_dirty || self.dirty_tracking)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::iommufd::VTD_S1_WPE;

    fn first_stage(addr_width: u32, flags: u64) -> UserTables {
        UserTables::FirstStage(iommu_hwpt_vtd_s1 { flags, addr_width, ..Default::default() })
    }

    fn second_stage(addr_width: u32) -> UserTables {
        UserTables::SecondStage(HwptVtdSecondStage {
            pgtbl_addr: 0,
            addr_width,
            accessed_dirty: false,
        })
    }

    #[test]
    fn tables_must_fit_the_features() {
        let plain = VtdUnitConfig::default();
        let rich = VtdUnitConfig {
            address_width: AddressWidth::Bits57,
            supervisor_requests: true,
            extended_accessed: true,
            ..VtdUnitConfig::default()
        };
        let poor =
            VtdUnitConfig { nesting: false, guest_second_stage: false, ..VtdUnitConfig::default() };
        let nested = |of_first, flags, of_second| match (
            first_stage(of_first, flags),
            second_stage(of_second),
        ) {
            (UserTables::FirstStage(first), UserTables::SecondStage(second)) => {
                UserTables::Nested(HwptVtdNested { first, second })
            }
            other => panic!("{other:?}"),
        };
        for (tables, by_plain, by_rich) in [
            (first_stage(48, VTD_S1_WPE), true, true),
            (first_stage(57, 0), false, true),
            (first_stage(39, 0), false, false),
            (first_stage(48, VTD_S1_SRE), false, true),
            (first_stage(48, VTD_S1_EAFE), false, true),
            (second_stage(39), true, true),
            (second_stage(57), false, true),
            (second_stage(40), false, false),
            (nested(48, 0, 39), true, true),
            (nested(48, 0, 57), false, true),
            (nested(57, 0, 48), false, true),
            (nested(48, VTD_S1_SRE, 48), false, true),
            (nested(48, 0, 40), false, false),
        ] {
            assert_eq!(plain.walks(&tables), by_plain, "{tables:?}");
            assert_eq!(rich.walks(&tables), by_rich, "{tables:?}");
            assert!(!poor.walks(&tables), "{tables:?}");
        }
        // Both abilities are needed for both stages.
        for half in [poor.clone().with_nesting(true), poor.with_guest_second_stage(true)] {
            assert!(!half.walks(&nested(48, 0, 48)), "{half:?}");
        }
    }

    #[test]
    fn flags_of_the_second_stage_need_the_unit_to_have_them() {
        let tables = HwptVtdSecondStage { pgtbl_addr: 0, addr_width: 48, accessed_dirty: true };
        let config = VtdUnitConfig::default();
        assert!(config.walks(&UserTables::SecondStage(tables)));
        let without = config.with_dirty_tracking(false);
        assert!(!without.walks(&UserTables::SecondStage(tables)));
        let nested = HwptVtdNested {
            first: iommu_hwpt_vtd_s1 { addr_width: 48, ..Default::default() },
            second: tables,
        };
        assert!(!without.walks(&UserTables::Nested(nested)));
    }

    #[test]
    fn registers_say_what_the_unit_can_do() {
        let config = VtdUnitConfig { pasid_bits: 16, ..VtdUnitConfig::default() };
        assert_eq!(config.cap().guest_address_width(), 48);
        assert!(!config.cap().fs5lp() && config.cap().fs1gp());
        assert_eq!(config.ecap().pasid_bits(), 16);
        assert!(config.ecap().nest() && config.ecap().smts() && !config.ecap().srs());
        let narrow = VtdUnitConfig::default().with_address_width(AddressWidth::Bits39);
        assert_eq!((narrow.cap().guest_address_width(), narrow.cap().sagaw()), (39, 0b0010));
        assert!(narrow.walks(&first_stage(48, 0)) && narrow.walks(&second_stage(39)));
        assert!(!narrow.walks(&second_stage(48)));
        let none = VtdUnitConfig { pasid_bits: 0, ..VtdUnitConfig::default() };
        assert!(!none.ecap().pasid());
        let wide = VtdUnitConfig { pasid_bits: 200, ..VtdUnitConfig::default() };
        assert_eq!(wide.ecap().pasid_bits(), 20);
    }
}
